"""The head itself: copies of blocks and output layers, joined by adapters, and the criterion."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from autodecouple.errors import InputError
from autodecouple.graph import LEAF, Graph, attribute, operations
from autodecouple.objectives.adapter import Adapter
from autodecouple.objectives.criterion import Criterion
from autodecouple.objectives.layout import label_sizes
from autodecouple.passes.downstream.fresh import own_copy
from autodecouple.passes.downstream.needs import Needs
from autodecouple.passes.downstream.route import Route
from autodecouple.passes.insert import OURS, draws, key_randomness
from autodecouple.plans import Cut, TensorSpec
from autodecouple.randomness import Randomness

aten = torch.ops.aten
UNKEYED = Randomness(None)


class DownstreamHead(nn.Module):
    """forward(*features, *sides, signal, randomness=...) gives (loss, signal).

    draws: whether anything in it draws random numbers; they are keyed by the randomness, as in a stage
    """

    def __init__(self, body: fx.GraphModule, criterion: Criterion, draws: bool) -> None:
        super().__init__()
        self.body = body
        self.criterion = criterion
        self.draws = draws

    def forward(self, *inputs_and_signal: Any, randomness: Randomness = UNKEYED) -> tuple[Tensor, Any]:
        *inputs, signal = inputs_and_signal
        outputs = self.body(*inputs, *([randomness] if self.draws else []))
        loss, _ = self.criterion(*outputs, signal)
        return loss, signal


def build_head(graph: Graph, cut: Cut, route: Route, needs: Needs, weights: str, criterion: Criterion) -> nn.Module:
    """The head of a route, its weights drawn from torch's default generator."""
    if whole := [node.meta[LEAF].path for node in needs.operations if LEAF in node.meta]:
        raise InputError(
            f"the head of 'downstream' at {cut.after!r} would have to copy {whole[0]!r}, which runs whole: cut"
            ' elsewhere, or pass another loss for that stage, like "early_exit"'
        )
    return _Builder(graph, cut, route, needs, weights).head(criterion)


def make_criterion(graph: Graph, criterion: Callable[[Any, Any], Tensor] | None) -> Criterion:
    """The task's loss for one head: a module among it is copied, since no two stages may share its state."""
    own = copy.deepcopy(criterion) if isinstance(criterion, nn.Module) else criterion
    constants = {index: leaf for index, leaf in enumerate(graph.outputs) if not isinstance(leaf, fx.Node)}
    return Criterion(own, graph.out_spec, constants)


class _Builder:
    """Writes the head's graph, operation by operation."""

    def __init__(self, graph: Graph, cut: Cut, route: Route, needs: Needs, weights: str) -> None:
        self.graph = graph
        self.cut = cut
        self.needs = needs
        self.weights = weights
        self.work = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.root: dict[str, Any] = {}
        self.tensors: dict[int, Tensor] = {}
        self.adapters: list[Adapter] = []
        self.labels = label_sizes(graph.signal)
        joints = route.joints.items()
        self.sources = {entry: needs.features if source is None else (source,) for entry, source in joints}

    def head(self, criterion: Criterion) -> DownstreamHead:
        self._read()
        for node in self.needs.operations:
            for source in node.all_input_nodes:
                self._ensure(source)
            self.values[node] = self._copied(node)
        outputs = [leaf for leaf in self.graph.outputs if isinstance(leaf, fx.Node)]
        for leaf in outputs:
            self._ensure(leaf)
        self.work.output(tuple(self.values[leaf] for leaf in outputs))
        drawing = any(map(draws, operations(self.work)))
        if drawing:
            with self.work.inserting_after(list(self.work.find_nodes(op="placeholder"))[-1]):
                key_randomness(self.work, self.work.placeholder("randomness"))
        return DownstreamHead(fx.GraphModule(self.root, self.work, "Downstream"), criterion, drawing)

    def _read(self) -> None:
        read = (*self.needs.features, *self.needs.sides)
        given = [self.work.placeholder(node.name) for node in read]
        for node, value in zip(read, given, strict=True):
            # an operation may write into what it reads, and a leaf of autograd is not for that
            copied = self.needs.written and isinstance(node.meta.get("val"), torch.Tensor)
            self.values[node] = self.work.call_function(aten.clone.default, (value,)) if copied else value
        for node, (feature, dim) in self.needs.sizes.items():
            self.values[node] = self.work.call_function(aten.sym_size.int, (given[feature], dim))
        self.values |= self.needs.fixed

    def _ensure(self, node: fx.Node) -> None:
        """Have a value that no operation of the head gives: owned, adapted or mapped from the features."""
        if node in self.values:
            return
        if node.op == "get_attr":
            self.values[node] = self._own(node)
        elif node in self.sources:
            self.values[node] = self._adapted(self.sources[node], node)
        else:
            assert node in self.needs.guessed, node
            self.values[node] = self._adapted(self.needs.features, node)

    def _copied(self, node: fx.Node) -> fx.Node:
        made = self.work.node_copy(node, lambda source: source)
        made.args, made.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self.values[source])
        if made.target is aten.view.default:  # what comes here may lie in memory in another order than in the model
            made.target = aten.reshape.default
        if draws(node):  # its key: no other head may draw the same numbers
            made._rename(f"{self.cut.after}__{node.name}")
        return made

    def _own(self, node: fx.Node) -> fx.Node:
        """A tensor of the head's own in the place of the model's; one for all names of a tied one."""
        value = attribute(self.graph.train, node)
        if isinstance(value, Tensor):
            if id(value) not in self.tensors:
                self.tensors[id(value)] = own_copy(value, self.weights)
            value = self.tensors[id(value)]
        self.root[str(node.target)] = value
        return self.work.get_attr(str(node.target))

    def _adapted(self, sources: Sequence[fx.Node], target: fx.Node) -> fx.Node:
        """What is given instead of a value; of several sources each has a map of its own, and their sum is taken."""
        parts = []
        for source in sources:
            adapter = Adapter(self._spec(source), self._spec(target), self.labels, project=len(sources) > 1)
            if adapter.is_identity:
                return cast(fx.Node, self.values[source])
            name = f"{OURS}.adapters.{len(self.adapters)}"
            self.adapters.append(adapter)
            self.root[name] = adapter
            parts.append(self.work.call_module(name, (self.values[source],)))
        total = parts[0]
        for part in parts[1:]:
            total = self.work.call_function(operator.add, (total, part))
        return total

    def _spec(self, node: fx.Node) -> TensorSpec:
        spec = self.graph.measures[node.name].value
        assert spec is not None, node
        return spec
