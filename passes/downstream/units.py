"""Which modules a chain is made of: the innermost that one tensor enters and one leaves, two of them at least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from autodecouple.graph import Graph, module_classes

CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")
"""Say nothing of what they hold: that one of them is a block does not make blocks of the others."""


@dataclass(frozen=True)
class Extent:
    """The positions, first and last, of a module's operations that carry a gradient."""

    name: str
    first: int
    last: int


@dataclass
class _Module:
    """A module as the operations show it."""

    name: str
    kind: str
    first: int
    last: int = 0
    works: bool = False
    children: dict[str, _Module] = field(default_factory=dict)


def find_units(graph: Graph, seams: frozenset[int]) -> tuple[Extent, ...]:
    """The units in their order.

    seams: positions before which only one tensor that carries a gradient crosses

    A unit has weights and FLOPs, begins at a seam and ends at one. A module that holds two of them is none itself,
    unless another module of its class is one: an inverted residual without a shortcut is a block like those with one.
    Operations outside of such modules go with the unit before them. Where modules show less than two units, one begins
    with each operation that has weights and FLOPs.
    """
    root = _tree(graph)
    end = len(graph.operations)
    found = _units(root, seams, end, frozenset())
    kinds = frozenset(unit.kind for unit in found if unit.children and unit.kind not in CONTAINERS)
    found = _units(root, seams, end, kinds)
    ordered: list[Extent] = []
    for unit in sorted(found, key=lambda unit: unit.first):
        if not ordered or unit.first > ordered[-1].last:
            ordered.append(Extent(unit.name, unit.first, unit.last))
    return tuple(ordered) if len(ordered) > 1 else _plain_units(graph, seams)


def _tree(graph: Graph) -> _Module:
    root = _Module("", "", 0)
    working = _working(graph)
    for position, node in enumerate(graph.operations):
        if graph.measures[node.name].gradient_since is None:
            continue
        inner = root
        for name, kind in module_classes(node):
            if name:
                inner = inner.children.setdefault(name, _Module(name, kind, position))
                inner.last = position
                inner.works |= position in working
    return root


def _working(graph: Graph) -> frozenset[int]:
    """Positions of the operations with FLOPs that use a trainable parameter."""
    uses = {position for at in graph.parameter_uses().values() for position in at}
    return frozenset(p for p in uses if graph.measures[graph.operations[p].name].forward_flops)


def _units(module: _Module, seams: frozenset[int], end: int, kinds: frozenset[str]) -> list[_Module]:
    closed = module.first in seams and (module.last + 1 in seams or module.last + 1 == end)
    is_unit = bool(module.name) and module.works and closed
    if is_unit and module.kind in kinds:
        return [module]
    inside = [unit for child in module.children.values() for unit in _units(child, seams, end, kinds)]
    return [module] if is_unit and len(inside) < 2 else inside


def _plain_units(graph: Graph, seams: frozenset[int]) -> tuple[Extent, ...]:
    """Units by their operations alone."""
    end = len(graph.operations)
    starts: Sequence[int] = sorted(seams)
    working = sorted(_working(graph))
    found: list[Extent] = []
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        if any(start <= position < stop for position in working):
            found.append(Extent(graph.operations[start].name, start, stop - 1))
    return tuple(found)
