"""What stands beside the features of random models: masks, positions and what is made of them."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 8


class Sides:
    """Values beside the features, made of the model's input, of a table or of nothing, where a step first asks for one.

    All are as wide as the features; "written" is written into.
    """

    def __init__(self, x: Tensor, table: Tensor) -> None:
        self.keep = x.flatten(1)[:, :1] > 0
        self.table = table
        self.made: dict[str, Tensor] = {}

    def join(self, x: Tensor, pick: int) -> Tensor:
        name = ("position", "wide", "rows", "sum", "hidden", "written")[pick]
        side = self._value(name)
        return x.masked_fill(side, 0.1) if name == "hidden" else x * side

    def _value(self, name: str) -> Tensor:
        if name not in self.made:
            self.made[name] = getattr(self, f"_{name}")()
        return self.made[name]

    def _position(self) -> Tensor:
        return torch.arange(WIDTH, device=self.keep.device) / WIDTH + 0.5

    def _wide(self) -> Tensor:
        return self.keep.expand(-1, WIDTH).float() + 0.5

    def _rows(self) -> Tensor:
        return self.table[:1].expand(self.keep.size(0), -1) * 0.1

    def _sum(self) -> Tensor:
        return self._value("wide") + self._value("position") + self._value("rows")

    def _hidden(self) -> Tensor:
        return ~self.keep.repeat(1, WIDTH) & (self._value("position") > 1)

    def _written(self) -> Tensor:
        made = self._value("wide") * 2
        made[:, :2] += self._value("position")[:2]
        return made
