"""How long optimizers take, and which nodes are charged for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from autodecouple.graph import Graph
from autodecouple.passes.measuring.clock import Clock, medians
from autodecouple.passes.measuring.timing import Bench

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]

SMALL, LARGE = (64, 64), (4, 2**20)
"""Tensors and the elements of each: where what a tensor takes shows, and where memory does."""


@dataclass(frozen=True)
class UpdateTimes:
    """Nanoseconds of an optimizer's step: per parameter, however small, and per byte of it, at any node."""

    per_parameter: float = 0.0
    per_byte: float = 0.0

    def __call__(self, node: str, parameter: torch.Tensor) -> float:
        return self.per_parameter + self.per_byte * parameter.numel() * parameter.element_size()


def time_updates(optimizer: MakeOptimizer, bench: Bench) -> UpdateTimes:
    """Times the optimizer on parameters made for it, some small and some large."""
    with bench.entered() as clock:
        small, large = (_time_step(optimizer, *sizes, clock) for sizes in (SMALL, LARGE))
    (few, elements), (others, more) = SMALL, LARGE
    slope = max(0.0, (large / others - small / few) / (4 * (more - elements)))
    return UpdateTimes(max(0.0, small / few - slope * 4 * elements), slope)


def _time_step(optimizer: MakeOptimizer, count: int, elements: int, clock: Clock) -> int:
    parameters = [nn.Parameter(torch.randn(elements, device=clock.device)) for _ in range(count)]
    stepper = optimizer(parameters)

    def sample() -> tuple[int, ...]:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        start = clock.mark()
        stepper.step()
        return (clock.between(start, clock.mark()),)

    return medians(sample)[0]


def charge_updates(graph: Graph, cost: Callable[[str, nn.Parameter], float]) -> dict[str, int]:
    """What the optimizer takes, by the node that uses a parameter first; cost: of a node's name and its parameter."""
    found: dict[str, int] = {}
    parameters = dict(graph.train.named_parameters(remove_duplicate=False))
    for name, uses in graph.parameter_uses().items():
        if uses:
            node = graph.operations[min(uses)].name
            found[node] = found.get(node, 0) + round(cost(node, parameters[name]))
    return found
