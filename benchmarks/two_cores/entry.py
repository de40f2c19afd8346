"""What a contestant is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tools import networks
from tools.networks import Network

NETWORKS: dict[str, tuple[Callable[[], Network], Callable[[], Network]]] = {
    "vgg": (lambda: networks.vgg(0.5), lambda: networks.vgg(0.05, rows=8)),
    "transformer": (
        lambda: networks.transformer(150, layers=4),
        lambda: networks.transformer(12, layers=4, length=8, rows=8),
    ),
    "resnet18": (lambda: networks.resnet18(0.5), lambda: networks.resnet18(0.05, rows=8)),
}
"""As published, and tiny (to see whether everything runs)."""


class Unavailable(Exception):
    """This contestant cannot run here; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A network, and for how many batches it is trained.

    name, tiny: of the network
    warm_up:    batches before the clock starts, until every pipeline is full; batches: timed ones
    cost:       what balances the stages of `ours`
    """

    name: str
    tiny: bool = False
    warm_up: int = 6
    batches: int = 8
    cost: str = "flops"

    @property
    def network(self) -> Network:
        return NETWORKS[self.name][self.tiny]()
