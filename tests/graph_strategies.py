"""Hypothesis strategies of models: a drawn list of steps that an nn.Module builds its layers from and then walks.

Everything is a function of the drawn values: `Program.model()` gives the same weights each time, `Program.inputs(rows)`
the same batch. The value that flows has one of four forms, and each step maps one form to one form:

    image (N, 4, 4, 4) --flatten--> flat (N, 8) <--tokens/join--> tokens (N, 2, 4) <--swap--> swapped (2, N, 4)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from side_values import WIDTH, Sides
from torch import Tensor, nn
from torch.nn import functional as F

FORMS = ("image", "flat", "tokens", "swapped")
SHAPES = {"image": (4, 4, 4), "flat": (WIDTH,), "tokens": (2, 4), "swapped": (2, 4)}

ANYWHERE = ("relu", "relu_", "tanh", "save", "add", "iadd", "detach", "no_grad", "count", "fork", "slice_")
"""Steps that every form takes."""
STEPS = {
    "image": ("conv", "conv_frozen", "grouped", "batch_norm", "dropout2d", "cat", "flatten"),
    "flat": (
        *("linear", "linear_frozen", "shared", "batch_norm", "layer_norm", "dropout", "cat", "chunk"),
        *("transposed", "scale", "mask", "tokens", "wasted", "reuse", "size", "side"),
    ),
    "tokens": ("linear", "layer_norm", "dropout", "attention", "join", "swap"),
    "swapped": ("linear", "swap", "lstm"),
}
LEADS = {
    ("image", "flatten"): "flat",
    ("flat", "tokens"): "tokens",
    ("tokens", "join"): "flat",
    ("tokens", "swap"): "swapped",
    ("swapped", "swap"): "tokens",
}
DRAWS = ("dropout", "dropout2d")


@dataclass(frozen=True)
class Program:
    """A model as data: the form it starts with, its steps as (kind, pick), and how its outputs nest."""

    start: str
    steps: tuple[tuple[str, int], ...]
    output: str = "tensor"
    unused: bool = False
    by_name: bool = False
    """Inputs go in as a dict of keywords."""

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.steps}

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Walk(self)

    def inputs(self, rows: int = 4) -> Any:
        generator = torch.Generator().manual_seed(rows)
        values: dict[str, Tensor] = {"x": torch.randn(rows, *SHAPES[self.start], generator=generator)}
        if "scale" in self.kinds:
            values["scale"] = torch.rand(rows, WIDTH, generator=generator) + 0.5
        if "mask" in self.kinds:
            values["mask"] = torch.rand(rows, WIDTH, generator=generator) < 0.3
        return values if self.by_name else tuple(values.values())

    def call(self, model: Callable[..., Any], rows: int = 4) -> Any:
        """The output of the model, or of anything that is called like it, on fresh inputs."""
        inputs = self.inputs(rows)
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


class Walk(nn.Module):
    """Walks the steps of a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.layers = nn.ModuleDict()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("counter", torch.zeros(()))
        self.register_buffer("table", torch.arange(2.0 * WIDTH).view(2, WIDTH))
        self.saved_forms: list[str] = []
        form = program.start
        for index, (kind, pick) in enumerate(program.steps):
            layer = _layer(kind, form, pick)
            if layer is not None:
                self.layers[f"{kind}_{index}"] = layer
            form = LEADS.get((form, kind), form)
        self.classifier = nn.Linear(torch.Size(SHAPES[form]).numel(), 3)
        if program.unused:
            self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None, mask: Tensor | None = None) -> Any:
        if scale is not None and scale.dtype == torch.bool:  # positional, without a scale before it
            scale, mask = None, scale
        form, saved = self.program.start, {form: [] for form in FORMS}
        sides = Sides(x, self.table) if "side" in self.program.kinds else None
        for index, (kind, pick) in enumerate(self.program.steps):
            name = f"{kind}_{index}"
            layer = self.layers[name] if name in self.layers else None  # noqa: SIM401 - a ModuleDict has no get
            if sides is not None and kind == "side":
                x = sides.join(x, pick)
            else:
                x = self._step(kind, pick, x, form, saved[form], layer, scale, mask)
            form = LEADS.get((form, kind), form)
        if form == "swapped":
            x = x.transpose(0, 1)
        logits = self.classifier(x.flatten(1))
        aux = [value for values in saved.values() for value in values][-1:]
        if self.program.output == "dict":
            return {"logits": logits, "extra": {"aux": [value.sum() for value in aux], "rows": logits.argmax(1)}}
        return (logits, logits.detach().softmax(1)) if self.program.output == "tuple" else logits

    def _step(
        self,
        kind: str,
        pick: int,
        x: Tensor,
        form: str,
        saved: list[Tensor],
        layer: nn.Module | None,
        scale: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        other = saved[pick % len(saved)] if saved else torch.ones_like(x)
        if kind == "save":
            saved.append(x)
        elif kind in ("relu_", "relu"):
            x = F.relu(x, inplace=kind == "relu_")
        elif kind == "tanh":
            x = x.tanh()
        elif kind == "add":
            x = x + other
        elif kind == "iadd":
            x += other
        elif kind == "slice_":
            x[..., :2] *= 0.5
        elif kind == "detach":
            x = x + other.detach() * 0.5
        elif kind == "no_grad":
            with torch.no_grad():
                level = x.abs().amax().clamp(min=1.0) + 1
            x = x / level
        elif kind == "count":
            self.counter += 1
            x = x * 1.5
        elif kind == "fork":  # a diamond: two branches that meet again
            x = x.sigmoid() * x
        elif kind == "chunk":
            a, b = x.chunk(2, dim=1)
            x = torch.cat([a * b.sigmoid(), b], dim=1)
        elif kind == "cat" and layer is not None:
            x = layer(torch.cat([x, other], dim=1))
        elif kind == "shared":
            x = self.shared(x)
        elif kind == "reuse":  # a weight twice in one expression
            x = x @ self.shared.weight + x * self.shared.bias
        elif kind == "transposed":
            x = x.view(x.size(0), 2, 4).transpose(1, 2).reshape(x.size(0), WIDTH)
        elif kind == "size":
            x = x / float(x.size(1)) + x.sum(0, keepdim=True) / x.size(0)
        elif kind == "scale" and scale is not None:
            x = x * scale
        elif kind == "mask" and mask is not None:
            x = x.masked_fill(mask, 0.1)
        elif kind == "wasted" and layer is not None:  # trains nothing: only its sign reaches the output
            x = x * (layer(x).detach() > 0)
        elif kind == "tokens":
            x = x.view(-1, 2, 4)
        elif kind == "swap":
            x = x.transpose(0, 1)
        elif kind == "join":
            x = x.flatten(1)
        elif kind == "lstm" and layer is not None:
            x = layer(x)[0]
        elif kind == "flatten" and layer is not None:
            x = layer(x.flatten(1))
        elif layer is not None:
            x = layer(x)
        else:
            raise AssertionError((kind, form))
        return x


class Attention(nn.Module):
    """Self-attention written out: matrix products, which torch's own counter knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        return x + weights @ v


def _layer(kind: str, form: str, pick: int) -> nn.Module | None:
    width = WIDTH if form == "flat" else 4
    made: dict[str, Callable[[], nn.Module]] = {
        "conv": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=pick % 2 == 0)),
        "conv_frozen": lambda: nn.Conv2d(4, 4, 1).requires_grad_(False),
        "grouped": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
        "dropout2d": lambda: nn.Dropout2d(0.5),
        "flatten": lambda: nn.Linear(64, WIDTH),
        "linear": lambda: nn.Linear(width, width),
        "linear_frozen": lambda: nn.Linear(width, width).requires_grad_(False),
        "wasted": lambda: nn.Linear(width, width),
        "layer_norm": lambda: nn.LayerNorm(width),
        "dropout": lambda: nn.Dropout(0.5, inplace=pick % 3 == 0),
        "attention": lambda: Attention(width),
        "lstm": lambda: nn.LSTM(width, width),
    }
    if kind == "batch_norm":
        return nn.BatchNorm2d(4) if form == "image" else nn.BatchNorm1d(WIDTH)
    if kind == "cat":
        return nn.Conv2d(8, 4, 1) if form == "image" else nn.Linear(2 * WIDTH, WIDTH)
    return made[kind]() if kind in made else None


@st.composite
def programs(
    draw: st.DrawFn,
    min_steps: int = 2,
    max_steps: int = 14,
    without: frozenset[str] | tuple[str, ...] = (),
    outputs: tuple[str, ...] = ("tensor", "tuple", "dict"),
) -> Program:
    """Models that train: those whose plain backward autograd refuses (a wrong in-place write) are left out."""
    start = form = draw(st.sampled_from(("image", "flat", "flat")))
    steps: list[tuple[str, int]] = []
    for index in range(draw(st.integers(min_steps, max_steps))):
        # Every other step has parameters, so that there are cuts; the others are whatever the form takes.
        trained = [k for k in ("conv", "linear", "cat", "lstm", "flatten", "shared") if k in STEPS[form]]
        kinds = [k for k in (trained if index % 2 == 0 else (*STEPS[form], *ANYWHERE)) if k not in without]
        kind = draw(st.sampled_from(kinds))
        steps.append((kind, draw(st.integers(0, 5))))
        form = LEADS.get((form, kind), form)
    program = Program(start, tuple(steps), draw(st.sampled_from(outputs)), draw(st.booleans()), draw(st.booleans()))
    if not trains(program):
        reject()
    return program


def trains(program: Program) -> bool:
    """Whether plain backpropagation through the original works."""
    try:
        touch(program.call(program.model())).backward()
    except RuntimeError as error:
        if "inplace" in str(error) or "in-place" in str(error):
            return False
        raise
    return True


def leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def touch(output: Any) -> Tensor:
    """A loss that every floating point output has a part in, each element a part of its own."""
    parts = [leaf.reshape(-1) for leaf in leaves(output) if leaf.is_floating_point()]
    return sum((part * torch.linspace(0.5, 1.5, part.numel())).sum() for part in parts)  # type: ignore[return-value]
