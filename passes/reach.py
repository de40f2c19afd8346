"""Which trained parameters lead to which values, so that no head leaves a parameter of its stage out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from autodecouple.graph import Graph


class Reach:
    """Follows gradients through the operations, visited one by one in execution order.

    Parameters are bits of an integer, in the order of their first use; a value's set is kept per storage, since a
    write into a view reaches every value in that memory. Linear in the graph.
    """

    def __init__(self, graph: Graph) -> None:
        self.measures = {node: graph.measures[node.name] for node in graph.train.graph.nodes if node.op != "output"}
        uses = {name: at for name, at in graph.parameter_uses().items() if name in graph.trained and at}
        ordered = sorted(uses, key=lambda name: min(uses[name]))
        self.first_use = [min(uses[name]) for name in ordered]
        self.last = max((max(at) for at in uses.values()), default=-1)
        self.sets: dict[int, int] = {}
        bits = {name: 1 << index for index, name in enumerate(ordered)}
        for node in graph.train.graph.find_nodes(op="get_attr"):
            for storage in self.measures[node].storages:
                self.sets[storage] = self.sets.get(storage, 0) | bits.get(graph.parameter_name(node), 0)

    def visit(self, node: fx.Node) -> None:
        """Let what the operation reads reach what it gives and writes."""
        measure = self.measures[node]
        reached = self._union(node.all_input_nodes, measure.position)
        for storage in measure.storages | measure.writes if reached else ():
            self.sets[storage] = self.sets.get(storage, 0) | reached

    def thresholds(
        self, features: Sequence[fx.Node], carrying: Sequence[fx.Node], position: int
    ) -> tuple[list[int], int]:
        """For each of the features, the last first use of a parameter that those before it do not see; then the same
        for what the features together do not see of all that carries a gradient. -1 where nothing is missed."""
        seen, found = 0, []
        for value in features:
            reached = self._union([value], position)
            found.append(self._last_first_use(reached & ~seen))
            seen |= reached
        return found, self._last_first_use(self._union(carrying, position) & ~seen)

    def _union(self, values: Iterable[fx.Node], position: int) -> int:
        union = 0
        for value in values:
            measure = self.measures[value]
            if measure.carries_gradient(position):
                for storage in measure.storages:
                    union |= self.sets.get(storage, 0)
        return union

    def _last_first_use(self, parameters: int) -> int:
        return self.first_use[parameters.bit_length() - 1] if parameters else -1
