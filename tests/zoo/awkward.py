"""Models that write in place, split into tuples, and use parameters again and again."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry
from zoo.stack import ROW, WIDTH, Stack, layers


class InPlace(Stack):
    """Writes into activations, slices and views of them."""

    def between(self, x: Tensor, index: int) -> Tensor:
        if index == 0:
            x += 1
            return F.relu(x, inplace=True)
        if index == 1:
            x = x.clone()
            x[:, :3] *= 2
            x[:, 3] = x[:, 4]
            return x.view(-1, 3, 4).transpose(1, 2).reshape(-1, WIDTH)
        if index == 2:
            return F.dropout(x, 0.2, self.training, inplace=True).add_(0.5).clamp_(-2, 2)
        return x.mul_(0.5)


class Chunks(Stack):
    """Tuples: chunk, split, unbind, max with indices, topk, sort."""

    def between(self, x: Tensor, index: int) -> Tensor:
        if index == 0:
            a, b = x.chunk(2, dim=1)
            return torch.cat([b, a * b.sigmoid()], 1)
        if index == 1:
            a, b, c = x.split([2, 4, 6], dim=1)
            return torch.cat([c, b, a], 1).tanh()
        if index == 2:
            values, order = x.sort(dim=1)
            return values + 0.1 * x.gather(1, order.flip(1))
        top, _ = x.topk(4, dim=1)
        return torch.cat([*torch.stack([top, top.tanh()]).unbind(0), x[:, :4]], 1)


class Shared(nn.Module):
    """One block applied three times between layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.block, self.out = (
            layers(3),
            layers(3),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.before:
            x = layer(x).relu()
        for _ in range(3):
            x = x + self.block(x).tanh()
        for layer in self.after:
            x = layer(x).relu()
        logits: Tensor = self.out(x)
        return logits


class Mirrored(nn.Module):
    """An autoencoder whose decoder has its encoder's weights, transposed: every cut divides a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 4 for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = (x @ weight).tanh()
        for weight in reversed(self.weights):
            x = (x @ weight.t()).tanh()
        return x


class Ode(Stack):
    """Runge-Kutta steps of a learned field between layers: fixed steps, parameters used again and again."""

    def between(self, x: Tensor, index: int) -> Tensor:
        field, step = self.layers[index], 0.25
        for _ in range(2):
            a = field(x).tanh()
            b = field(x + step / 2 * a).tanh()
            x = x + step * b
        return x


class Deep(nn.Module):
    """Deep equilibrium: the fixed point without gradient, then one step with it."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.cell, self.outward = layers(2), nn.Linear(WIDTH, WIDTH), layers(2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inward:
            x = layer(x).relu()
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(4):
                z = (0.5 * self.cell(z) + x).tanh()
        z = (0.5 * self.cell(z) + x).tanh()
        for layer in self.outward:
            z = layer(z)
        return z


class Frozen(Stack):
    """Frozen layers, an unused one, one that nothing comes back to, and a frozen BatchNorm."""

    count = 6

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.watched = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH).eval().requires_grad_(False)
        self.layers[1].requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def between(self, x: Tensor, index: int) -> Tensor:
        gate = (self.watched(x).detach() > 0).float()
        return self.norm(x).relu() * (0.5 + gate)


class Attached(Stack):
    """Parameters without a module: in a list, in a dict, alone; and a module that is called by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.ones(WIDTH) for _ in range(4))
        self.shifts = nn.ParameterDict({f"of_{i}": torch.zeros(1, WIDTH) for i in range(4)})
        self.token = nn.Parameter(torch.randn(1, WIDTH))

    def between(self, x: Tensor, index: int) -> Tensor:
        x = x * self.scales[index] + self.shifts[f"of_{index}"]
        return (x + self.token).relu() if index == 0 else F.linear(x, self.layers[index].weight.t()).relu()


class Dense(nn.Module):
    """Every layer reads all earlier ones: many tensors cross everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6 + 4 * i, 4) for i in range(6))
        self.inward, self.out = nn.Linear(WIDTH, 6), nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.inward(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)).relu())
        logits: Tensor = self.out(torch.cat(found, 1))
        return logits


class Constant(Stack):
    """Tensors made in the forward, by shape, by device, by value; shapes as numbers."""

    def between(self, x: Tensor, index: int) -> Tensor:
        rows, width = x.shape
        if index == 0:
            return x + torch.arange(width, device=x.device) / width
        if index == 1:
            return x * torch.tensor([1.0, -1.0] * 6) + torch.full((rows, 1), 0.5)
        if index == 2:
            return x.view(rows, 3, width // 3).flip(1).reshape(-1, width) / math.sqrt(width)
        return x + torch.eye(WIDTH)[torch.arange(rows) % WIDTH] + x.new_ones(x.size(0), 1)


class Cut(Stack):
    """Stops its own gradient half-way: plain backpropagation never reaches the first layers."""

    count = 6

    def between(self, x: Tensor, index: int) -> Tensor:
        return x.detach().relu() if index == 1 else x.relu()


class Wide(nn.Sequential):
    """Nothing but nn.Sequential, with the layers that torch has."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 6, 3, padding="same"), nn.InstanceNorm1d(6, affine=True),
            nn.Hardswish(),
            nn.ConstantPad1d(1, 0.1), nn.Conv1d(6, 6, 3), nn.GLU(dim=1), nn.AdaptiveMaxPool1d(4),
            nn.AlphaDropout(0.1),
            nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.SELU(),
            nn.Linear(8, 8), nn.LayerNorm(8), nn.Softplus(), nn.Linear(8, 3), nn.LogSoftmax(dim=1),
        )  # fmt: skip


def entries() -> list[Entry]:
    makers: dict[str, Callable[[], nn.Module]] = {
        "in_place": InPlace,
        "chunks": Chunks,
        "shared": Shared,
        "ode": Ode,
        "equilibrium": Deep,
        "frozen": Frozen,
        "attached": Attached,
        "dense": Dense,
        "constants": Constant,
        "stopped_gradient": Cut,
        "sequential": Wide,
    }
    return [
        *(Entry(f"awkward/{name}", "awkward", make, ROW, quick=True) for name, make in makers.items()),
        Entry("awkward/mirrored", "awkward", Mirrored, ROW, quick=True, tied="untie"),
    ]
