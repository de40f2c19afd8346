"""Divide the evaluation graph at the plan's cuts, so that inference can stop there, and rows can leave.

Training stages are no use for that: dropout and batch normalisation of the training mode are part of their code.

    num_rows --+--------------+--------------+
    inputs --> piece 0 --+--> piece 1 --+--> piece 2 --> outputs
                         +-> head 0     +-> head 1
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from autodecouple.graph import Graph, attribute, is_free, module_path, output_leaves
from autodecouple.passes.codegen import parameter_stages, rehome_graph
from autodecouple.passes.inference import piece_ends, to_device
from autodecouple.passes.measure import annotate, batch_symbols
from autodecouple.plans import Cut, Plan

NO_ROWS, MIXED = -1, -2
"""In place of a batch dimension: a value that is the same for any rows, and one whose rows lie mixed."""


@dataclass(frozen=True)
class Piece:
    """What a stage computes in evaluation mode; values are known by their names in the evaluation graph.

    body:     forward(num_rows, *inputs) -> tuple of outputs
    inputs:   what the body takes, of what was sent
    outputs:  what it returns
    sends:    what later pieces and heads use, and the model's outputs so far: with the batch dimensions of its tensors
    features: what the stage's head reads; None where the evaluation mode has no such values
    mask:     which tokens of the first features count, where there is one
    """

    body: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sends: Mapping[str, Any]
    features: tuple[str, ...] | None
    mask: str | None

    @property
    def rows_may_leave(self) -> bool:
        """Whether everything that is sent has rows that can be told from each other."""
        return MIXED not in pytree.tree_leaves(dict(self.sends))


def divide(graph: Graph, plan: Plan) -> tuple[Piece, ...] | None:
    """One piece per stage; None where the evaluation mode was not captured, or differs too much to be cut there."""
    if graph.evaluation is None:
        return None
    evaluation = annotate(dataclasses.replace(graph, train=graph.evaluation))
    homes, alike = parameter_stages(graph, plan), Counterparts(graph, evaluation)
    found = {cut.after: alike.find(cut.after) for cut in plan.cuts}
    own = {name: evaluation.measures[node.name].position for name, node in found.items() if node is not None}
    ends = piece_ends(evaluation, plan, homes, own)
    if ends is None:
        return None
    divider = _Divider(evaluation, plan, homes, ends, alike)
    return tuple(map(divider.piece, range(len(plan.stages))))


def output_values(graph: Graph) -> tuple[Any, ...]:
    """The evaluation mode's flat outputs: nodes, whose names the values have, and constants."""
    assert graph.evaluation is not None
    return output_leaves(graph.evaluation.graph)


class _Divider:
    """Builds the pieces out of the whole evaluation graph; a value keeps its name in every piece."""

    def __init__(
        self, evaluation: Graph, plan: Plan, homes: Mapping[str, int], ends: Iterable[int], alike: Counterparts
    ) -> None:
        self.evaluation = evaluation
        self.plan = plan
        self.homes = homes
        self.nodes = evaluation.operations
        self.symbols = batch_symbols(evaluation)
        stops = [0, *(end + 1 for end in ends), len(self.nodes)]
        self.ranges = list(itertools.pairwise(stops))
        self.alike = alike
        self.reads = [self._reads(index, cut) for index, cut in enumerate(plan.cuts)]

    def piece(self, index: int) -> Piece:
        inside = dict.fromkeys(self.nodes[slice(*self.ranges[index])])
        body = [*self._sizes_again(inside, self.ranges[index][0]), *inside]
        inputs = self._outside(body)
        sends = self._needed(index + 1)
        features, mask = self.reads[index] if index < len(self.reads) else (None, None)
        wanted = dict.fromkeys([*sends, *(features or ()), *([mask] if mask is not None else [])])
        outputs = [node for node in wanted if node in inside]
        return Piece(
            body=self._body(index, body, inputs, outputs),
            inputs=tuple(node.name for node in inputs),
            outputs=tuple(node.name for node in outputs),
            sends={node.name: pytree.tree_map(self._batch_dim, node.meta.get("val")) for node in sends},
            features=tuple(node.name for node in features) if features is not None else None,
            mask=mask.name if mask is not None else None,
        )

    def _reads(self, index: int, cut: Cut) -> tuple[list[fx.Node] | None, fx.Node | None]:
        """What the head at a cut reads here: features and mask."""
        names = [*cut.features, *([cut.mask] if cut.mask is not None else [])]
        found = [self.alike.find(name) for name in names]
        stop = self.ranges[index][1]
        nodes = [node for node in found if node is not None and self._position(node) < stop]
        if len(nodes) < len(names) or self._written_since(nodes, cut, stop):
            return None, None
        return nodes[: len(cut.features)], nodes[-1] if cut.mask is not None else None

    def _position(self, node: fx.Node) -> int:
        return self.evaluation.measures[node.name].position

    def _written_since(self, nodes: Iterable[fx.Node], cut: Cut, stop: int) -> bool:
        """Whether the piece goes on behind the cut, and writes there into what the head reads."""
        own = self.alike.find(cut.after)
        start = self._position(own) + 1 if own is not None else min(map(self._position, nodes), default=0) + 1
        later = self.nodes[start:stop]
        memory = {storage for node in nodes for storage in self.evaluation.measures[node.name].storages}
        return any(self.evaluation.measures[node.name].writes & memory for node in later)

    def _needed(self, index: int) -> list[fx.Node]:
        """What was there before a piece and is used from it on: by operations, heads and the model's output."""
        start = self.ranges[index][0] if index < len(self.ranges) else len(self.nodes)
        later = self.nodes[start:]
        used = {source for node in [*self._sizes_again(later, start), *later] for source in node.all_input_nodes}
        used |= {leaf for leaf in output_leaves(self.evaluation.train.graph) if isinstance(leaf, fx.Node)}
        for features, mask in self.reads[index:]:
            used |= {node for node in (*(features or ()), mask) if node is not None}
        earlier = [*self.evaluation.train.graph.find_nodes(op="placeholder"), *self.nodes[:start]]
        return [node for node in earlier if node in used and not self._is_num_rows(node)]

    def _sizes_again(self, inside: Iterable[fx.Node], start: int) -> list[fx.Node]:
        """Sizes from before that follow the number of rows: they are worked out anew from it, since rows may leave."""
        needed = {source for node in inside for source in node.all_input_nodes}
        again = []
        for node in reversed(self.nodes[:start]):
            if node in needed and self._follows_rows(node.meta.get("val")) and not self._is_num_rows(node):
                again.append(node)
                needed.update(node.all_input_nodes)
        return again[::-1]

    def _follows_rows(self, size: Any) -> bool:
        return is_free(size) and any(str(symbol) in self.symbols for symbol in size.node.expr.free_symbols)

    def _is_num_rows(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return is_free(value) and str(value) in self.symbols

    def _batch_dim(self, value: Any) -> int:
        """Of a tensor; NO_ROWS where none of its sizes follows the number of rows, MIXED where one does otherwise."""
        if not isinstance(value, torch.Tensor):
            return NO_ROWS
        following = [dim for dim, size in enumerate(value.shape) if self._follows_rows(size)]
        if not following:
            return NO_ROWS
        return following[0] if len(following) == 1 and str(value.shape[following[0]]) in self.symbols else MIXED

    def _outside(self, body: list[fx.Node]) -> list[fx.Node]:
        """What the body takes from elsewhere, parameters and the number of rows aside."""
        inside = set(body)
        used = {source for node in body for source in node.all_input_nodes}
        found = [node for node in self.evaluation.train.graph.nodes if node in used and node not in inside]
        return [node for node in found if node.op != "get_attr" and not self._is_num_rows(node)]

    def _body(self, index: int, body: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
        graph, device = fx.Graph(), torch.device(self.plan.stages[index].device)
        num_rows = graph.placeholder("num_rows")
        copies = {node: graph.placeholder(node.name) for node in inputs}
        for node in body:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in copies:
                    copies[source] = self._owned(graph, source, device)
            known = {
                n: num_rows if n not in copies and self._is_num_rows(n) else copies[n] for n in node.all_input_nodes
            }
            copies[node] = graph.node_copy(node, known.__getitem__)
        rehome_graph(graph, device)
        graph.output(tuple(copies[node] for node in outputs))
        root = {str(n.target): attribute(self.evaluation.train, n) for n in graph.find_nodes(op="get_attr")}
        return fx.GraphModule(root, graph, f"Piece{index}")

    def _owned(self, graph: fx.Graph, source: fx.Node, device: torch.device) -> fx.Node:
        """The user's own tensor; where its home is another stage's device, a copy."""
        home = self.homes.get(str(source.target))
        copy = graph.node_copy(source)
        if home is not None and torch.device(self.plan.stages[home].device) == device:
            return copy
        return graph.call_function(to_device, (copy, device))


class Counterparts:
    """Finds in the evaluation mode what does the same as an operation of the training mode.

    It is the same operation in the same module, its value has the same form, and the same parameters lead to it.
    """

    def __init__(self, graph: Graph, evaluation: Graph) -> None:
        self._mine = {node.name: likeness for node, likeness in _likenesses(graph).items()}
        self._theirs: dict[Any, list[fx.Node]] = {}
        for node, likeness in _likenesses(evaluation).items():
            self._theirs.setdefault(likeness, []).append(node)

    def find(self, name: str) -> fx.Node | None:
        """Of several the one of the same name; None where that is not clear."""
        found = self._theirs.get(self._mine.get(name), [])
        named = [node for node in found if node.name == name]
        return named[0] if named else found[0] if len(found) == 1 else None


def _likenesses(graph: Graph) -> dict[fx.Node, Any]:
    """By node: what another capture of the same model has in common with it."""
    parameters = {name: 1 << i for i, (name, _) in enumerate(graph.model.named_parameters(remove_duplicate=False))}
    behind: dict[fx.Node, int] = {}  # the parameters that lead to a node, as bits
    found = {}
    for node in graph.train.graph.nodes:
        bits = parameters.get(str(node.target), 0) if node.op == "get_attr" else 0
        for source in node.all_input_nodes:
            bits |= behind[source]
        behind[node] = bits
        measure = graph.measures.get(node.name)
        value = dataclasses.replace(measure.value, name="") if measure and measure.value is not None else None
        found[node] = (
            node.op,
            str(node.target) if node.op != "placeholder" else node.name,
            module_path(node),
            value,
            bits,
        )
    return found
