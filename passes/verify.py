"""What must hold after each pass; a broken promise stops the compiler, not the training run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from autodecouple.graph import Graph, operations
from autodecouple.passes.codegen import StageCode
from autodecouple.passes.insert import ORIGIN, ROLE, STAGE
from autodecouple.passes.verifying.agree import matches_original
from autodecouple.passes.verifying.rehearse import own_errors
from autodecouple.passes.verifying.snapshot import preserved, seeded
from autodecouple.plans import Plan


def untrained_parameters(graph: Graph) -> list[str]:
    """Trainable parameters of the model that no gradient of its outputs reaches: unused, detached, used for nothing."""
    trained = graph.trained
    reached = {id(value) for node, value in graph.owned.items() if graph.names[node] in trained}
    return [name for name, p in graph.model.named_parameters() if p.requires_grad and id(p) not in reached]


def plan_fits(graph: Graph, plan: Plan) -> None:
    """The stages hold every operation once and in order, and all uses of a trained parameter lie in one of them."""
    planned = [name for stage in plan.stages for name in stage.nodes]
    assert planned == [node.name for node in graph.operations], "the stages are not the operations in their order"
    assert [stage.index for stage in plan.stages] == list(range(len(plan.stages))), "stages are not counted from 0"
    stage_of = {name: stage.index for stage in plan.stages for name in stage.nodes}
    trained = graph.trained
    for name, uses in graph.parameter_uses().items():
        used = {stage_of[planned[position]] for position in uses}
        assert name not in trained or len(used) <= 1, f"stages {sorted(used)} share the parameter {name!r}"


def heads_fit(module: fx.GraphModule, graph: Graph, plan: Plan) -> None:
    """In the graph with the plan in it, values only go to later stages, and across detached cuts without gradient."""
    ends = {cut.after: graph.measures[cut.after].position for cut in plan.cuts}
    for node in operations(module.graph):
        for source in node.all_input_nodes:
            if source.op in ("get_attr", "placeholder"):
                continue
            here, there = source.meta[STAGE], node.meta[STAGE]
            assert here <= there, f"{node.name!r} in stage {there} reads {source.name!r} of stage {here}"
            for cut in plan.cuts[here:there]:
                held = cut.attached or _is_free(source, graph, ends[cut.after])
                assert held, f"{source.name!r} carries a gradient across the cut after {cut.after!r}"


def stages_fit(codes: Sequence[StageCode], plan: Plan) -> None:
    """What the stages send is what the plan says crosses, and every parameter lives in one stage."""
    for code, cut in zip(codes, plan.cuts, strict=False):
        sent = {code.origin(name) for name in code.sends}
        said = {spec.name for spec in cut.crossing}
        assert sent == said, f"cut after {cut.after!r}: {sorted(sent ^ said)} sent or planned, but not both"
    owners = Counter(id(p) for code in codes for p in code.body.parameters() if p.requires_grad)
    assert all(count == 1 for count in owners.values()), "a parameter lives in two stages"


def _is_free(value: fx.Node, graph: Graph, position: int) -> bool:
    """Whether a value is without gradient at this position: by nature, or since the cut detached it.

    The signal that a head passes on is the objective's to keep free.
    """
    if ROLE in value.meta:
        return True
    if value.target is torch.ops.aten.detach.default and ORIGIN in value.meta:
        return True
    if ORIGIN in value.meta and any(_is_free(source, graph, position) for source in value.all_input_nodes):
        return True
    measure = graph.measures.get(value.meta.get(ORIGIN, value.name))
    return measure is None or not measure.carries_gradient(position)


__all__ = [
    "heads_fit",
    "matches_original",
    "own_errors",
    "plan_fits",
    "preserved",
    "seeded",
    "stages_fit",
    "untrained_parameters",
]
