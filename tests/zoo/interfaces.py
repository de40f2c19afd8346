"""Models whose inputs and outputs are unusual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, generator
from zoo.ops import transformers
from zoo.stack import ROW, WIDTH, Stack


class Nested(Stack):
    """Inputs and outputs nest: tuples in lists in dicts, with None and numbers among them."""

    def forward(self, batch: dict[str, Any], extra: tuple[Tensor, list[Tensor | None]]) -> Any:  # type: ignore[override]
        x = batch["x"] * batch["options"]["scale"]
        shift, (first, second) = extra
        for layer in self.layers:
            x = layer(x).tanh() + shift
        x = x + first if second is None else x
        return {"logits": self.out(x), "more": [(x, None), {"mean": x.mean(1)}], "steps": len(self.layers)}


def _nested(rows: int) -> Any:
    x, shift, first = torch.randn(3, rows, WIDTH, generator=generator(rows))
    return {"x": x, "options": {"scale": 0.5}}, (shift, [first, None])


class Keywords(Stack):
    """Keyword inputs with defaults; one of them is None."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor | None = None, **more: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
            x = x * scale if scale is not None else x
            x = x.masked_fill(mask, 0.0) if mask is not None else x
        logits: Tensor = self.out(x + more["bias"])
        return logits


def _keywords(rows: int) -> dict[str, Any]:
    x, scale, bias = torch.randn(3, rows, WIDTH, generator=generator(rows))
    return {"x": x, "mask": None, "scale": scale, "bias": bias}


@dataclass
class Output(transformers.utils.ModelOutput):  # type: ignore[misc]
    """As transformers returns it: None fields vanish."""

    logits: Tensor | None = None
    hidden: Tensor | None = None
    attention: Tensor | None = None


class Dataclass(Stack):
    def forward(self, x: Tensor) -> Output:  # type: ignore[override]
        hidden = None
        for layer in self.layers:
            x = layer(x).relu()
            hidden = x if hidden is None else hidden
        return Output(logits=self.out(x), hidden=hidden)


class Pair(NamedTuple):
    mean: Tensor
    spread: Tensor


class Gaussian(Stack):
    """A named tuple comes out."""

    def forward(self, x: Tensor) -> Pair:  # type: ignore[override]
        for layer in self.layers:
            x = layer(x).relu()
        return Pair(self.out(x), F.softplus(x[:, :3]))


class Exits(Stack):
    """A classifier after every layer; all their outputs are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.exits = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        found = []
        for layer, side in zip(self.layers, [*self.exits, self.out], strict=True):
            x = layer(x).relu()
            found.append(side(x))
        return found


class Contrast(Stack):
    """Compares the rows of the batch with each other; the temperature is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        for layer in self.layers:
            x = layer(x).relu()
        z = F.normalize(self.out(x), dim=1)
        similarity = z @ z.t() / self.temperature
        return z, similarity.logsumexp(1)


class Named(nn.Module):
    """Inputs and parts with names that a compiler may want for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.criterion, self.body, self.model = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.self = nn.Linear(WIDTH, 3)

    def forward(self, target: Tensor, randomness: Tensor, loss_0: Tensor) -> Tensor:
        x = target + randomness * loss_0
        for layer in (*self.heads, self.criterion, self.body, self.model):
            x = layer(x).relu()
        logits: Tensor = self.self(x)
        return logits


def _named(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    target, randomness, loss = torch.randn(3, rows, WIDTH, generator=generator(rows))
    return target, randomness, loss


def entries() -> list[Entry]:
    makers: dict[str, Callable[[], nn.Module]] = {
        "dataclass": Dataclass,
        "named_tuple": Gaussian,
        "exits": Exits,
        "contrast": Contrast,
    }
    return [
        *(Entry(f"awkward/{name}", "awkward", make, ROW, quick=True) for name, make in makers.items()),
        Entry("awkward/nested", "awkward", Nested, _nested, quick=True),
        Entry("awkward/keywords", "awkward", Keywords, _keywords, quick=True),
        Entry("awkward/names", "awkward", Named, _named, quick=True),
    ]
