"""The evaluation graph over the devices of the stages: what `decoupled(x)` runs where no one device holds them all."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from autodecouple.graph import Graph, attribute, output_leaves
from autodecouple.passes.codegen import on_device, parameter_stages
from autodecouple.passes.measure import annotate
from autodecouple.plans import Plan


def emit_inference(graph: Graph, plan: Plan) -> fx.GraphModule | None:
    """The evaluation graph with every operation on its stage's device, and the values moved where the device changes.

    None where one device holds all, or where the two modes differ too much for the stages to follow each other.
    """
    devices = [torch.device(stage.device) for stage in plan.stages]
    if graph.evaluation is None or len(set(devices)) == 1:
        return None
    evaluation = annotate(dataclasses.replace(graph, train=graph.evaluation))
    homes = parameter_stages(graph, plan)
    ends = piece_ends(evaluation, plan, homes)
    return _Mover(evaluation, devices, homes, ends).module() if ends is not None else None


def piece_ends(
    evaluation: Graph, plan: Plan, homes: Mapping[str, int], own: Mapping[str, int] | None = None
) -> list[int] | None:
    """Last position of each stage but the last: the plan's own where it can be, else the first that can; None if none.

    evaluation: the graph with its evaluation mode in the place of the training mode, measured; homes: the stages of the
                parameters; own: where the nodes before the plan's cuts lie in it, None for those of the same names
    """
    positions = {node.name: i for i, node in enumerate(evaluation.operations)}
    own = positions if own is None else own
    uses = {name: at for name, at in evaluation.parameter_uses().items() if name in homes}
    ends: list[int] = []
    for index, cut in enumerate(plan.cuts):
        before = max((p for name, at in uses.items() if homes[name] <= index for p in at), default=0)
        behind = min((p for name, at in uses.items() if homes[name] > index for p in at), default=len(positions))
        allowed = range(max([before, *ends[-1:]]), behind)
        first = [own[cut.after]] if own.get(cut.after, -1) in allowed else []
        end = next((p for p in (*first, *allowed) if not _parts_memory(evaluation, p)), None)
        if end is None:
            return None
        ends.append(end)
    return ends


def _parts_memory(evaluation: Graph, position: int) -> bool:
    """Whether values that share memory would be moved apart here, and a later operation writes into it."""
    positions = {node: i for i, node in enumerate(evaluation.operations)}
    shared: Counter[int] = Counter()
    for node in evaluation.train.graph.nodes:
        last = max((positions.get(user, len(positions)) for user in node.users), default=-1)
        if node.op not in ("get_attr", "output") and positions.get(node, -1) <= position < last:
            shared.update(evaluation.measures[node.name].storages)
    later = {s for node in evaluation.operations[position + 1 :] for s in evaluation.measures[node.name].writes}
    return any(count > 1 and storage in later for storage, count in shared.items())


class _Mover:
    """Copies the graph operation by operation; behind every end, each value that is still needed changes its device.

    Values go from stage to stage, not straight to their user: a stage in between may have written into them. What
    stages compute again does not go at all.
    """

    def __init__(
        self, evaluation: Graph, devices: Sequence[torch.device], homes: Mapping[str, int], ends: Sequence[int]
    ) -> None:
        self.evaluation = evaluation
        self.devices = devices
        self.homes = homes
        self.ends = ends
        self.work = fx.Graph()
        self.current: dict[fx.Node, fx.Node] = {}
        self.copies: dict[tuple[fx.Node, torch.device], fx.Node] = {}

    def module(self) -> fx.GraphModule:
        source, device = self.evaluation.train, None
        for node in source.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.current[node] = self.work.node_copy(node)
        nodes = self.evaluation.operations
        for position, node in enumerate(nodes):
            now = self.devices[sum(end < position for end in self.ends)]
            if now != device:
                self._move(nodes[position:], now)
            device = now
            self._run(node, now)
        leaves = output_leaves(source.graph)
        self.work.output(tuple(self.current[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves))
        root = {str(n.target): attribute(source, n) for n in self.work.find_nodes(op="get_attr")}
        return fx.GraphModule(root, self.work, "Inference")

    def _run(self, node: fx.Node, device: torch.device) -> None:
        self.current[node] = copy = self.work.node_copy(node, functools.partial(self._read, device))
        copy.args, copy.kwargs = on_device(copy.args, device), on_device(copy.kwargs, device)

    def _move(self, behind: Sequence[fx.Node], device: torch.device) -> None:
        """Bring what these operations read to the device, or compute it there."""
        needed = {source for node in behind for source in node.all_input_nodes if source.op != "get_attr"}
        for node in reversed(self.current):
            if node in needed and self._is_recomputed(node):
                needed.update(source for source in node.all_input_nodes if source.op != "get_attr")
        for node in [node for node in self.current if node in needed]:
            if self._is_recomputed(node):
                self._run(node, device)
            else:
                self.current[node] = self.work.call_function(to_device, (self.current[node], device))

    def _is_recomputed(self, node: fx.Node) -> bool:
        return self.evaluation.measures[node.name].recomputed

    def _read(self, device: torch.device, node: fx.Node) -> fx.Node:
        """A value where it is now; a parameter of another stage as a copy, made once."""
        home = self.homes.get(str(node.target))
        if node.op != "get_attr" or (home is not None and self.devices[home] == device):
            return self.current[node]
        if (node, device) not in self.copies:
            self.copies[node, device] = self.work.call_function(to_device, (self.current[node], device))
        return self.copies[node, device]


def to_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
