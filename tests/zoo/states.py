"""Models with state, chance, control flow on data, and several precisions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry
from zoo.stack import ROW, WIDTH, Stack


class Counting(Stack):
    """Buffers change in every forward: a counter, a moving average, a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("queue", torch.zeros(4, WIDTH))

    def between(self, x: Tensor, index: int) -> Tensor:
        if index == 0:
            self.steps += 1
            return x.tanh() / self.steps.float().clamp(max=2)
        if index == 1 and self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            return x - self.mean
        if index == 2:
            self.queue.copy_(torch.cat([x.detach().mean(0, keepdim=True), self.queue[:-1]]))
            return x + self.queue.mean(0)
        return x.relu()


class Swapped(Stack):
    """Assigns its buffer anew instead of writing into it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def between(self, x: Tensor, index: int) -> Tensor:
        if index == 1:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean
        return x.relu()


class Undecided(nn.Module):
    """Asks the data which way to go."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.low(x) if x.abs().mean() < 10 else self.high(x)
        return out


class Branching(Stack):
    """One small submodule has control flow on data; the rest is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = Undecided()

    def between(self, x: Tensor, index: int) -> Tensor:
        return self.branch(x).relu() if index == 1 else x.relu()


class Halting(nn.Module):
    """Adaptive computation: repeats a cell until the data says stop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.halt = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[0], 1)
        for _ in range(3):
            p = self.halt(x).sigmoid()
            x = x + p * self.cell(x).tanh()
            total = total + p
            if float(total.detach().min()) > 0.9:
                break
        return x


class Adaptive(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.think = Halting()

    def between(self, x: Tensor, index: int) -> Tensor:
        return self.think(x) if index == 2 else x.relu()


class Sampled(Stack):
    """Draws noise in many ways: Gumbel softmax, dropout of whole layers by a tensor, multinomial, rand_like."""

    def between(self, x: Tensor, index: int) -> Tensor:
        if index == 0:
            return x * F.gumbel_softmax(x, tau=1.0)
        if index == 1 and self.training:
            keep = (torch.rand(x.shape[0], 1, device=x.device) < 0.8).float()
            return x * keep / 0.8
        if index == 2:
            chosen = torch.multinomial(x.softmax(1), 1)
            return x + x.gather(1, chosen)
        return F.rrelu(x, training=self.training) + 0.01 * torch.randn(x.shape, device=x.device)


class Half(Stack):
    """bfloat16 in the middle, as models with mixed parts have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1].to(torch.bfloat16)
        self.layers[2].to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x).relu().to(torch.bfloat16)
        x = self.layers[2](self.layers[1](x).relu()).relu()
        logits: Tensor = self.out(self.layers[3](x.float()))
        return logits


class Autocast(Stack):
    """autocast inside its forward."""

    def between(self, x: Tensor, index: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=index == 1):
            return (x @ self.layers[index].weight).float().tanh()


class Double(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())


def entries() -> list[Entry]:
    makers: dict[str, Callable[[], nn.Module]] = {
        "counting": Counting,
        "swapped_buffer": Swapped,
        "branching": Branching,
        "adaptive": Adaptive,
        "sampled": Sampled,
        "half": Half,
        "autocast": Autocast,
        "double": Double,
    }
    return [
        *(Entry(f"awkward/{name}", "awkward", make, ROW, quick=True) for name, make in makers.items()),
    ]
