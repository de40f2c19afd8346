"""Which values later stages compute again instead of being sent: masks, positions, rotary angles.

A value is computed again where that is cheap and what it takes is smaller than itself:

    attention_mask (N, T) --> ne --> expand (N, 1, T, T) --+--> layer 0 --|cut|--> layer 1
                          (N, T) crosses ------------------|--------------|--> expand --^
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import fx

from autodecouple.graph import LEAF, Graph, Measure
from autodecouple.plans import TensorSpec

aten = torch.ops.aten
M = TypeVar("M", bound=Measure)


def mark_recomputed(graph: Graph, measures: Mapping[str, M]) -> dict[str, M]:
    """The measures, with `recomputed` set where it is so."""
    found = _Search(graph, measures).recomputed()
    return {name: dataclasses.replace(m, recomputed=True) if name in found else m for name, m in measures.items()}


class Needs:
    """Positions of the operations whose stage needs a value: those that read it, or read what is computed of it again.

    The model's output stands behind the last operation.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._again: dict[fx.Node, set[int]] = {}  # of what is computed again
        for node in reversed(graph.operations):
            if graph.measured[node].recomputed:
                self._again[node] = self.of(node)

    @staticmethod
    def known(graph: Graph) -> Needs:
        """Those of a graph, found once."""
        memo: dict[str, Needs] = graph.memo
        if "needs" not in memo:
            memo["needs"] = Needs(graph)
        return memo["needs"]

    def of(self, node: fx.Node) -> set[int]:
        return self.readers(node).union(*(self._again.get(user, ()) for user in node.users))

    def readers(self, node: fx.Node) -> set[int]:
        """Positions of the operations that read a value themselves."""
        end = len(self.graph.operations)
        return {self.graph.positions.get(user, end) for user in node.users}

    @functools.cached_property
    def last(self) -> Mapping[fx.Node, int]:
        """The last of them for every value that is needed. What is computed again is needed where it is read itself."""
        operations = self.graph.operations
        last = {source: at for at, node in enumerate(operations) for source in node.all_input_nodes}
        last |= dict.fromkeys(self.graph.train.graph.output_node().all_input_nodes, len(operations))
        for node, at in self._again.items():
            for source in node.all_input_nodes if at else ():
                if source not in self._again:
                    last[source] = max(last[source], *at)
        return last


class _Search:
    """Follows the operations in execution order, with the values that each would be computed from again.

    A value's sources are those of its inputs that are not computed again, and the sources of those that are. Where
    memory is shared with a value that crosses, nothing in it is computed again: one stage would have it twice.
    """

    def __init__(self, graph: Graph, measures: Mapping[str, Measure]) -> None:
        self.operations = graph.operations
        self.measures = {n: measures[n.name] for n in graph.train.graph.nodes if n.op != "output"}
        self.fixed = frozenset[int]().union(*(measure.writes for measure in self.measures.values()))

    def recomputed(self) -> set[str]:
        while True:
            sources: dict[fx.Node, frozenset[fx.Node]] = {}
            for node in self.operations:
                found = self._sources(node, sources)
                if found is not None and sum(map(self._bytes, found)) < self._bytes(node):
                    sources[node] = found
            shared = self._shared(sources)
            if not shared:
                return {node.name for node in sources}
            self.fixed |= shared

    def _sources(self, node: fx.Node, known: Mapping[fx.Node, frozenset[fx.Node]]) -> frozenset[fx.Node] | None:
        """What a value would be computed from again, None where it must not be."""
        if not self._is_constant(node) or self.measures[node].forward_flops or not self._is_cheap(node):
            return None
        found = frozenset[fx.Node]()
        for source in node.all_input_nodes:
            if not self._is_constant(source):
                return None
            if source.op != "get_attr":  # each stage has what the model owns
                found |= known.get(source, frozenset([source]))
        return found if all(self.measures[source].value is not None for source in found) else None

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a value is the same whenever it is read: nothing is trained through it, nothing writes into it."""
        measure = self.measures[node]
        return measure.gradient_since is None and not measure.storages & self.fixed

    def _is_cheap(self, node: fx.Node) -> bool:
        if LEAF in node.meta or node.op != "call_function":
            return False
        given = [self.measures[source].value for source in node.all_input_nodes]
        if all(map(_is_number, [self.measures[node].value, *given])):
            return True
        return isinstance(node.target, torch._ops.OpOverload) and _is_light(node.target)

    def _shared(self, recomputed: Mapping[fx.Node, object]) -> frozenset[int]:
        """Memory that a value which is computed again has made, and one that crosses lies in."""
        makers: dict[int, fx.Node] = {}
        crossing: set[int] = set()
        for node, measure in self.measures.items():
            for storage in measure.storages:
                makers.setdefault(storage, node)
            crossing |= measure.storages if node not in recomputed else frozenset()
        return frozenset(storage for storage in crossing if makers[storage] in recomputed)

    def _bytes(self, node: fx.Node) -> int:
        """What crosses with a value; a tuple cannot cross at all."""
        value = self.measures[node].value
        return value.num_bytes if value is not None else _ENDLESS


_ENDLESS = 2**60


def _is_number(value: TensorSpec | None) -> bool:
    return value is not None and value.dtype in ("int", "float")


def _is_light(operation: torch._ops.OpOverload) -> bool:
    """Whether an operation only views, fills, copies or works element by element, the same way each time."""
    if operation.namespace != "aten" or operation._schema.is_mutable or _UNSTEADY.intersection(operation.tags):
        return False
    arguments = operation._schema.arguments
    views = any(argument.alias_info is not None for argument in arguments)
    fills = not any("Tensor" in str(argument.type) for argument in arguments)
    return views or fills or torch.Tag.pointwise in operation.tags or operation.overloadpacket in _LIGHT


_UNSTEADY = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}

_LIGHT = {
    *(aten.sym_size, aten.full_like, aten.zeros_like, aten.ones_like, aten.new_full, aten.new_zeros, aten.new_ones),
    *(aten.clone, aten._to_copy, aten.type_as, aten.lift_fresh_copy, aten.where, aten.triu, aten.tril, aten.outer),
    *(aten.__and__, aten.__or__, aten.__xor__, aten.floor_divide, aten.cat, aten.stack, aten.repeat, aten.flip),
}
"""Those that torch gives no tag that says so."""
