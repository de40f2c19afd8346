"""Objectives at their stages, and the model's inputs on their way to heads that compare with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from autodecouple.graph import Graph
from autodecouple.objectives.objective import Objective, input_of
from autodecouple.passes.measuring.charges import Charge
from autodecouple.plans import Plan, TensorSpec

aten = torch.ops.aten

SAME_NUMBERS = frozenset({
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.to.dtype,
    aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.detach.default,
})  # fmt: skip
"""Operations that do no more to indices than arrange them."""


def place_objectives(objectives: Sequence[Objective], graph: Graph) -> tuple[Objective, ...]:
    """Each objective told which hidden stage it is for and what enters the model, where it asks; twice is as once."""
    known = _inputs(graph) if any(hasattr(objective, "placed") for objective in objectives) else ()
    return tuple(
        objective.placed(index, len(objectives), known) if hasattr(objective, "placed") else objective
        for index, objective in enumerate(objectives)
    )


def written_inputs(graph: Graph) -> frozenset[str]:
    """Inputs whose memory the model's forward writes into."""
    writes = {storage for node in graph.operations for storage in graph.measures[node.name].writes}
    return frozenset(spec.name for spec in graph.inputs if graph.measures[spec.name].storages & writes)


def _inputs(graph: Graph) -> tuple[TensorSpec, ...]:
    """The inputs that stay as they are; of indices of an embedding with the size of its vocabulary."""
    written = written_inputs(graph)
    kept = [spec for spec in graph.inputs if spec.name not in written]
    placeholders = {node.name: node for node in graph.train.graph.find_nodes(op="placeholder")}
    return tuple(dataclasses.replace(s, num_classes=_vocabulary(graph, placeholders[s.name])) for s in kept)


def _vocabulary(graph: Graph, node: fx.Node) -> int | None:
    """Rows of the embedding that looks an input up, in whatever order or shape; None where none does."""
    reached = [node]
    for now in reached:
        for user in now.users:
            if user.target is aten.embedding.default and user.args[1] is now and isinstance(user.args[0], fx.Node):
                spec = graph.measures[user.args[0].name].value
                return None if spec is None else spec.shape[0]
            if user.target in SAME_NUMBERS:
                reached.append(user)
    return None


def carry_inputs(plan: Plan, objectives: Sequence[Objective]) -> Plan:
    """The plan in which the inputs that heads read cross every cut before them.

    A stage holds what it is sent until its step is over, so that this adds to its activations and to its peak.
    """
    cuts, stages = list(plan.cuts), list(plan.stages)
    for k, cut in enumerate(cuts):
        read = input_of(objectives[k])
        known = {spec.name for spec in cut.crossing}
        added = [spec for name, spec in _read_behind(k, objectives).items() if name not in known]
        crossing = (*cut.crossing, *(dataclasses.replace(spec, num_classes=None) for spec in added))
        cuts[k] = dataclasses.replace(cut, crossing=crossing, input=read.name if read is not None else None)
        held, stage = sum(spec.num_bytes for spec in added), stages[k + 1]
        more = {name: getattr(stage, name) + held for name in ("activation_bytes", "step_bytes")}
        stages[k + 1] = dataclasses.replace(stage, **more)
    return dataclasses.replace(plan, cuts=tuple(cuts), stages=tuple(stages))


def reserve(charges: Sequence[Charge], objectives: Sequence[Objective]) -> list[Charge]:
    """The charges of the stages, with as much memory less as `carry_inputs` will add to each at most."""
    sent = [0, *(sum(s.num_bytes for s in _read_behind(k, objectives).values()) for k in range(len(objectives)))]
    return [dataclasses.replace(c, reserved_bytes=extra) for c, extra in zip(charges, sent, strict=True)]


def _read_behind(cut: int, objectives: Sequence[Objective]) -> dict[str, TensorSpec]:
    """The inputs that heads behind a cut read, by name."""
    read = (input_of(objective) for objective in objectives[cut + 1 :])
    return {spec.name: spec for spec in read if spec is not None}
