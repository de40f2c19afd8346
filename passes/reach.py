"""Which trained parameters lead to which values, so that no head leaves a parameter of its stage out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from autodecouple.graph import Graph, Measure

ROOM = 256
"""Bits that may be taken before parameters that cannot be told apart any more are merged."""


class Reach:
    """Follows gradients through the operations, visited one by one in execution order.

    Parameters are bits of an integer, in the order of their first use; a value's set is kept per storage, since a
    write into a view reaches every value in that memory. What is not used any more is forgotten; and of parameters
    that now are in the same sets, and always will be, only the one that is used first at the latest is kept. So the
    integers stay short where few values live at a time, and the whole is linear in the graph.
    """

    def __init__(self, graph: Graph) -> None:
        self.measures = graph.measured
        trained, uses = graph.trained, graph.parameter_uses()
        first = {name: at for name, at in graph.first_uses.items() if name in trained}
        self.last = max((max(uses[name]) for name in first), default=-1)
        self.first_use: list[int] = []  # by bits
        self.sets: dict[int, int] = {}
        self.room = ROOM
        self._starting: dict[int, list[frozenset[int]]] = {}  # the storages of parameters, by their first use
        self._list_parameters(graph, first)
        self._ending = self._list_endings(graph)

    def _list_parameters(self, graph: Graph, first: dict[str, int]) -> None:
        storages: dict[str, frozenset[int]] = {}
        for node, name in graph.names.items():
            found = self.measures[node].storages
            known = storages.setdefault(name, found)
            if known is not found:
                storages[name] = known | found
        for name, position in first.items():
            self._starting.setdefault(position, []).append(storages[name])

    def _list_endings(self, graph: Graph) -> list[list[int]]:
        """By operations, the storages that are used for the last time; what the model returns is used to the end."""
        storages = {node: measure.storages for node, measure in self.measures.items()}
        last: dict[int, int] = {}
        for position, node in enumerate(graph.operations):
            for value in (node, *node.all_input_nodes):
                for storage in storages[value]:
                    last[storage] = position
        for value in graph.train.graph.output_node().all_input_nodes:
            last |= dict.fromkeys(storages[value], len(graph.operations))
        ending: list[list[int]] = [[] for _ in range(len(graph.operations) + 1)]
        for storage, position in last.items():
            ending[position].append(storage)
        return ending

    def visit(self, node: fx.Node) -> None:
        """Let what the operation reads reach what it gives and writes."""
        measure = self.measures[node]
        self._begin(measure.position)
        reached = 0
        for source in map(self.measures.__getitem__, node.all_input_nodes):
            if source.carries_gradient(measure.position):
                reached |= self._reaching(source)
        for storage in (*measure.storages, *measure.writes) if reached else ():
            self.sets[storage] = self.sets.get(storage, 0) | reached
        for storage in self._ending[measure.position]:
            self.sets.pop(storage, None)

    def _begin(self, position: int) -> None:
        """The parameters that are first used here get a bit each."""
        for storages in self._starting.get(position, ()):
            bit = 1 << len(self.first_use)
            self.first_use.append(position)
            for storage in storages:
                self.sets[storage] = self.sets.get(storage, 0) | bit
        if len(self.first_use) > self.room:
            self._merge()
            self.room = 2 * len(self.first_use) + ROOM

    def _merge(self) -> None:
        """Of the parameters that are in the same sets, keep the last."""
        classes = [(1 << len(self.first_use)) - 1]
        for members in set(self.sets.values()):
            parts = (part for known in classes for part in (known & members, known & ~members))
            classes = [part for part in parts if part]
        kept = sorted(known.bit_length() - 1 for known in classes)
        self.first_use = [self.first_use[bit] for bit in kept]
        shorter = {
            members: sum(1 << new for new, old in enumerate(kept) if members >> old & 1)
            for members in set(self.sets.values())
        }
        self.sets = {storage: shorter[members] for storage, members in self.sets.items()}

    def thresholds(self, features: Sequence[fx.Node], unread: Sequence[fx.Node]) -> tuple[list[int], int]:
        """For each of the features, the last first use of a parameter that those before it do not see; then the same
        for what they together do not see of all that carries a gradient unread. -1 where nothing is missed."""
        seen, found = 0, []
        for value in features:
            reached = self._reaching(self.measures[value])
            found.append(self._last_first_use(reached & ~seen))
            seen |= reached
        missed = 0
        for value in unread:
            missed |= self._reaching(self.measures[value])
        return found, self._last_first_use(missed & ~seen)

    def _reaching(self, measure: Measure) -> int:
        """The parameters that lead to a value."""
        union = 0
        for storage in measure.storages:
            union |= self.sets.get(storage, 0)
        return union

    def _last_first_use(self, parameters: int) -> int:
        return self.first_use[parameters.bit_length() - 1] if parameters else -1
