"""Which modules a chain is made of: the innermost that one tensor enters and one leaves, two of them at least."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
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
    children: dict[str, _Module] = field(default_factory=dict)


def find_units(graph: Graph, seams: frozenset[int]) -> tuple[Extent, ...]:
    """The units in their order.

    seams: positions before which only one tensor that carries a gradient crosses

    A unit has weights and FLOPs, begins at a seam and ends at one. A module that holds two of them is none itself,
    unless another module of its class is one: an inverted residual without a shortcut is a block like those with one.
    A module of several layers without modules for them (LSTM) has a unit for each. Operations outside of such modules
    go with the unit before them. Where modules show less than two units, one begins with each operation that has
    weights and FLOPs.
    """
    search = _Search(graph, seams)
    ordered: list[Extent] = []
    for unit in sorted(search.units(), key=lambda unit: unit.first):
        if not ordered or unit.first > ordered[-1].last:
            ordered.append(unit)
    return tuple(ordered) if len(ordered) > 1 else tuple(search.layers("", 0, len(graph.operations) - 1))


class _Search:
    """Looks for units among the modules, the innermost first."""

    def __init__(self, graph: Graph, seams: frozenset[int]) -> None:
        self.graph = graph
        self.starts = sorted(seams)
        uses = {position for at in graph.parameter_uses().values() for position in at}
        self.trained = max(uses, default=-1)
        self.working = sorted(p for p in uses if graph.measures[graph.operations[p].name].forward_flops)
        self.seams = seams
        self.root = self._tree()

    def _tree(self) -> _Module:
        root = _Module("", "", 0)
        for position, node in enumerate(self.graph.operations):
            inner = root
            carries = self.graph.measures[node.name].gradient_since is not None
            for name, kind in module_classes(node) if carries else ():
                if name:
                    inner = inner.children.setdefault(name, _Module(name, kind, position))
                    inner.last = position
        return root

    def units(self) -> list[Extent]:
        found = self._within(self.root, frozenset())
        kinds = frozenset(module.kind for module in found if module.children and module.kind not in CONTAINERS)
        modules = self._within(self.root, kinds)
        return [unit for m in modules for unit in self._parts(m)]

    def _within(self, module: _Module, kinds: frozenset[str]) -> list[_Module]:
        is_unit = bool(module.name) and self._works(module) and self._is_closed(module)
        if is_unit and module.kind in kinds:
            return [module]
        inside = [unit for child in module.children.values() for unit in self._within(child, kinds)]
        return [module] if is_unit and len(inside) < 2 else inside

    def _works(self, module: _Module) -> bool:
        return bisect_left(self.working, module.first) < bisect_right(self.working, module.last)

    def _is_closed(self, module: _Module) -> bool:
        """Behind the last parameter there are no seams, and no need for any."""
        return module.first in self.seams and (module.last + 1 in self.seams or module.last >= self.trained)

    def _parts(self, module: _Module) -> list[Extent]:
        whole = Extent(module.name, module.first, module.last)
        layers = [] if module.children else self.layers(f"{module.name}.", module.first, module.last)
        return layers if len(layers) > 1 else [whole]

    def layers(self, prefix: str, first: int, last: int) -> list[Extent]:
        """A unit for each operation with weights and FLOPs between two positions that begins at a seam."""
        working = self.working[bisect_left(self.working, first) : bisect_right(self.working, last)]
        starts = [self.starts[i - 1] for p in working if (i := bisect_right(self.starts, p))]
        found = [start for before, start in zip([first - 1, *working], starts, strict=False) if start > before]
        stops = [*found[1:], last + 1]
        return [Extent(prefix + self.graph.operations[a].name, a, b - 1) for a, b in zip(found, stops, strict=True)]
