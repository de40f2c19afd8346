"""The plain stack of layers that awkward models change in one point each."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.entry import floats

WIDTH = 12
ROW = floats(WIDTH)


def layers(count: int = 4, width: int = WIDTH) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count))


class Stack(nn.Module):
    """Some layers and a classifier; what stands between them is the subclass's."""

    count = 4

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = layers(self.count), nn.Linear(WIDTH, 3)

    def between(self, x: Tensor, index: int) -> Tensor:
        return x.tanh()

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = self.between(layer(x), index)
        logits: Tensor = self.out(x)
        return logits
