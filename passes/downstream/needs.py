"""What of the captured graph a head has to run, and what it reads at the cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from autodecouple.graph import Graph
from autodecouple.passes.downstream.chain import positions
from autodecouple.passes.downstream.route import Route
from autodecouple.plans import Cut, TensorSpec

aten = torch.ops.aten


@dataclass(frozen=True)
class Needs:
    """features: what the head is for; sides: what else it reads of what crosses, masks and positions for instance
    operations: those that it runs, in order; owned: parameters, buffers and constants that they use
    sizes:      numbers that are a size of the features: (which of them, dimension)
    fixed:      numbers that only the example tells
    guessed:    outputs that the blocks left out would give, so that they are mapped from the features
    written:    whether an operation writes into the memory of what the head reads
    """

    features: tuple[fx.Node, ...]
    sides: tuple[fx.Node, ...]
    operations: tuple[fx.Node, ...]
    owned: tuple[fx.Node, ...]
    sizes: dict[fx.Node, tuple[int, int]]
    fixed: dict[fx.Node, int]
    guessed: tuple[fx.Node, ...]
    written: bool


def find_needs(graph: Graph, cut: Cut, route: Route) -> Needs:
    """Follow what a head gives back to what it is given."""
    return _Search(graph, cut, route).needs()


class _Search:
    """Walks from the ends of the route back to the cut.

    It stops at what crosses there and at what enters a segment: that comes from the segment before, by an adapter.
    Numbers are not taken from where they cross, since a micro-batch has other rows than the batch of the loss.
    """

    def __init__(self, graph: Graph, cut: Cut, route: Route) -> None:
        self.graph = graph
        self.route = route
        self.nodes = {node.name: node for node in graph.train.graph.nodes}
        self.features = tuple(self.nodes[name] for name in cut.features)
        self.crossing = {self.nodes[spec.name] for spec in cut.crossing}
        self.entries = set(route.joints)
        start = graph.measures[cut.after].position + 1
        end = len(graph.operations)
        self.inside = set(positions(route.segments)) if route.segments else set(range(start, end))
        self.found: dict[fx.Node, None] = {}
        self.sides: dict[fx.Node, None] = {}
        self.owned: dict[fx.Node, None] = {}
        self.sizes: dict[fx.Node, tuple[int, int]] = {}
        self.fixed: dict[fx.Node, int] = {}

    def needs(self) -> Needs:
        outputs = [leaf for leaf in self.graph.outputs if isinstance(leaf, fx.Node)]
        guessed = tuple(dict.fromkeys(leaf for leaf in outputs if self._is_left_out(leaf)))
        leaving = [segment.leaving for segment in self.route.segments if segment.leaving is not None]
        self._follow([*leaving, *(leaf for leaf in outputs if leaf not in guessed)])
        while missing := self._writers():
            self._follow(missing)
        operations = sorted(self.found, key=self._position)
        return Needs(
            self.features,
            tuple(side for side in self.sides if side not in self.features),
            tuple(operations),
            tuple(self.owned),
            self.sizes,
            self.fixed,
            guessed,
            self._overwrites(),
        )

    def _follow(self, ends: Iterable[fx.Node]) -> None:
        waiting = list(ends)
        while waiting:
            node = waiting.pop()
            if node.op == "get_attr":
                self.owned[node] = None
            elif node in self.found or node in self.entries or self._is_number_given(node):
                continue
            elif node in self.crossing and not self._is_number(node):
                self.sides[node] = None
            else:
                self.found[node] = None
                waiting += node.all_input_nodes

    def _is_left_out(self, node: fx.Node) -> bool:
        """Whether a value with a gradient is one that the skipped blocks would compute."""
        if node in self.crossing or node.op != "call_function" or self._position(node) in self.inside:
            return False
        return self.graph.measures[node.name].gradient_since is not None

    def _is_number_given(self, node: fx.Node) -> bool:
        """Note the number that the head knows without the operation that gives it."""
        if not self._is_number(node):
            return False
        value = node.meta.get("val")
        for index, feature in enumerate(self.features):
            shape = [str(size) for size in feature.meta["val"].shape]
            if isinstance(value, torch.SymInt) and str(value) in shape:
                self.sizes[node] = index, shape.index(str(value))
                return True
        source = node.args[0] if node.target is aten.sym_size.int else None
        if node.op == "placeholder" or (isinstance(source, fx.Node) and source not in self.crossing):
            self.fixed[node] = int(value) if isinstance(value, (int, torch.SymInt)) else 0
            return True
        return False

    def _is_number(self, node: fx.Node) -> bool:
        spec = self._spec(node)
        return spec is not None and spec.dtype == "int"

    def _writers(self) -> list[fx.Node]:
        """Operations of the route that write into memory which the head uses, and that nothing else leads to."""
        memory = {storage for node in self.found for storage in self.graph.measures[node.name].storages}
        return [
            node
            for node in (self.graph.operations[position] for position in sorted(self.inside))
            if node not in self.found and self.graph.measures[node.name].writes & memory
        ]

    def _overwrites(self) -> bool:
        measures = self.graph.measures
        read = {s for node in (*self.features, *self.sides, *self.entries) for s in measures[node.name].storages}
        return any(measures[node.name].writes & read for node in self.found)

    def _position(self, node: fx.Node) -> int:
        return self.graph.measures[node.name].position

    def _spec(self, node: fx.Node) -> TensorSpec | None:
        return self.graph.measures[node.name].value
