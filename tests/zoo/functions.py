"""Models with functions, hooks and parametrizations of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from zoo.entry import Entry
from zoo.stack import ROW, WIDTH, Stack


class Sign(torch.autograd.Function):
    """Forward the sign, backward the identity where it is small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * (x.abs() < 1)


class Binarise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Sign.apply(x)
        return out + 0.1 * x


class Binary(Stack):
    """A custom autograd.Function in a module: its backward is no derivative of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.binarise = Binarise()

    def between(self, x: Tensor, index: int) -> Tensor:
        out: Tensor = self.binarise(x)
        return out


class BinaryInline(Stack):
    """The same, applied by the model itself."""

    def between(self, x: Tensor, index: int) -> Tensor:
        out: Tensor = Sign.apply(x)
        return out + 0.1 * x


class Reversal(torch.autograd.Function):
    """Gradient reversal, of domain adaptation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return -ctx.scale * gradients[0], None


class Reverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Reversal.apply(x, 0.5)
        return out


class Domains(Stack):
    """Two outputs, one of them behind a reversed gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.domain = nn.Sequential(Reverse(), nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        for layer in self.layers:
            x = layer(x).relu()
        return {"label": self.out(x), "domain": self.domain(x)}


def weight_normed() -> nn.Module:
    model = Stack()
    for layer in model.layers:
        parametrizations.weight_norm(layer)
    return model


def spectral_normed() -> nn.Module:
    """Its power iteration updates buffers in every training forward."""
    model = Stack()
    for layer in model.layers:
        parametrizations.spectral_norm(layer)
    return model


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


def symmetric() -> nn.Module:
    model = Stack()
    for layer in model.layers:
        parametrize.register_parametrization(layer, "weight", Symmetric())
    return model


def old_weight_norm() -> nn.Module:
    """By forward pre-hooks, as before parametrizations."""
    model = Stack()
    for layer in model.layers[:2]:
        nn.utils.weight_norm(layer)
    return model


def pruned() -> nn.Module:

    model = Stack()
    for layer in model.layers:
        prune.random_unstructured(layer, "weight", amount=0.3)
    return model


def hooked() -> nn.Module:
    """Forward hooks that change what passes, and one that only looks."""
    model = Stack()
    seen: list[tuple[int, ...]] = []
    model.layers[0].register_forward_hook(lambda module, args, out: out * 0.5)
    model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.layers[2].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[1:])))
    return model


def compiled_part() -> nn.Module:
    """A part of it scripted."""
    model = Stack()
    model.layers[1] = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()))
    return model


class Checkpointed(Stack):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.drop = reentrant, nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = checkpoint(lambda h, layer=layer: self.drop(layer(h).relu()), x, use_reentrant=self.reentrant)
        x = checkpoint_sequential(nn.Sequential(*self.layers[2:]), 2, x, use_reentrant=self.reentrant)
        logits: Tensor = self.out(x)
        return logits


class Functional(Stack):
    """The same small network called with parameters that another computes."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(2))

    def between(self, x: Tensor, index: int) -> Tensor:
        if index not in (1, 2):
            return x.relu()
        weights = {name: p * self.scale[index - 1] for name, p in self.cell.named_parameters()}
        out: Tensor = x + functional_call(self.cell, weights, (x,)).tanh()
        return out


class Hyper(Stack):
    """A network that writes another's weights, one set per row."""

    def __init__(self) -> None:
        super().__init__()
        self.writers = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(3))

    def between(self, x: Tensor, index: int) -> Tensor:
        if index == 3:
            return x
        down, up = self.writers[index](x).view(-1, 2, WIDTH, 2).unbind(1)
        return x + torch.einsum("nd,ndk,nek->ne", x, down, up).tanh()


class Vectorised(Stack):
    """torch.vmap over an ensemble of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.ensemble = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 4)

    def between(self, x: Tensor, index: int) -> Tensor:
        if index != 1:
            return x.relu()
        members = torch.vmap(lambda weight: (x @ weight).tanh())(self.ensemble)
        return members.mean(0)


def entries() -> list[Entry]:
    makers: dict[str, Callable[[], nn.Module]] = {
        "binary": Binary,
        "binary_inline": BinaryInline,
        "domains": Domains,
        "weight_norm": weight_normed,
        "spectral_norm": spectral_normed,
        "symmetric": symmetric,
        "old_weight_norm": old_weight_norm,
        "pruned": pruned,
        "hooks": hooked,
        "scripted": compiled_part,
        "checkpoint": lambda: Checkpointed(False),
        "checkpoint_reentrant": lambda: Checkpointed(True),
        "functional_call": Functional,
        "hyper": Hyper,
        "vmap": Vectorised,
    }
    return [
        *(Entry(f"awkward/{name}", "awkward", make, ROW, quick=True) for name, make in makers.items()),
    ]
