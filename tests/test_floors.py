"""Floors of memory: what is ruled out by them, at once for all stages, must really be too large."""

from __future__ import annotations

import gc
from unittest import mock

import pytest
import torch
from graph_strategies import Program, programs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from large_graphs import residual_tower
from torch import Tensor, nn

from autodecouple.errors import PartitionError
from autodecouple.graph import Graph
from autodecouple.objectives import Objective, SupCon
from autodecouple.objectives.backprop import Backprop
from autodecouple.passes.candidates import find_cuts
from autodecouple.passes.collecting import uncollected
from autodecouple.passes.measure import annotate
from autodecouple.passes.measuring.charges import Charge
from autodecouple.passes.measuring.memory import MemoryWalk
from autodecouple.passes.measuring.prices import Prices
from autodecouple.passes.measuring.recomputable import Needs
from autodecouple.passes.measuring.stage_costs import StageCosts
from autodecouple.passes.partition import choose_cuts
from autodecouple.passes.trace import capture

SMALL = SupCon(hidden=8, out=4)
OBJECTIVES: list[Objective] = [SMALL, Backprop(), SMALL]
"""A stage that is not coupled, one coupled to the next, one to the one before, and the last."""


def check_floors(graph: Graph, share: float, recompute: bool) -> None:
    """Every stage as every stage number: a start that is ruled out for an end takes more than the limit from there."""
    legal = [candidate for candidate in find_cuts(graph) if candidate.cut is not None]
    costs = StageCosts(graph, legal, Charge(graph, recompute=recompute))
    last = len(legal)
    for stage in range(len(OBJECTIVES) + 1):
        needs = torch.full((last + 1, last + 1), 0)  # by starts and ends
        ends = (last, last) if stage == len(OBJECTIVES) else (0, last - 1)
        for begin in range(ends[1] + 1):
            first = max(begin, ends[0])
            needs[begin, first : ends[1] + 1] = costs.needs(stage, OBJECTIVES, begin, (first, ends[1]))
        limit = int(needs.max() * share)
        first = costs.first_within(stage, OBJECTIVES, limit)
        for end in range(ends[0], ends[1] + 1):
            assert bool((needs[: int(first[end]), end][: end + 1] > limit).all())


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(without=("lstm",)), st.sampled_from((0.2, 0.5, 0.8, 1.0)), st.booleans())
def test_what_a_floor_rules_out_is_too_large(program: Program, share: float, recompute: bool) -> None:
    check_floors(annotate(capture(program.model(), program.inputs())), share, recompute)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(without=("lstm",)), st.sampled_from((0.2, 0.5, 0.8, 1.0)), st.booleans())
def test_what_a_floor_rules_out_is_too_large_for_many(program: Program, share: float, recompute: bool) -> None:
    check_floors(annotate(capture(program.model(), program.inputs())), share, recompute)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_limit_that_no_plan_keeps_is_known_from_few_stages(share: float) -> None:
    """A thousand cuts and a limit below what any plan needs: every stage from every start was looked at, seven times,
    which took minutes at ten thousand cuts."""
    graph = residual_tower(1000)
    candidates = find_cuts(graph)
    free = choose_cuts(graph, candidates, 4, [SMALL] * 3)
    limit = int(share * min(stage.memory_bytes for stage in free.stages))
    with (
        mock.patch.object(MemoryWalk, "stages", autospec=True, side_effect=MemoryWalk.stages) as looked,
        pytest.raises(PartitionError, match="memory_limit"),
    ):
        choose_cuts(graph, candidates, 4, [SMALL] * 3, memory_limit=limit)
    assert looked.call_count <= 4 + 50, "four stages of the plan without a limit"


# --- what planning looks up in the graph ------------------------------------------------------------------------------


class Masked(nn.Module):
    """A mask that is computed again, a chain of it, and one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        keep = (lengths > 1)[:, None].expand(-1, 4)
        scale = keep.to(torch.float32) + 1
        for layer in self.layers:
            x = torch.relu(layer(x)) * scale
        return x.masked_fill(keep, 0.0)


def needed(graph: Graph, node: torch.fx.Node) -> set[int]:
    """Positions at which a value is needed, from the definition: a search from it through what is computed again."""
    found, waiting = set(), [node]
    while waiting:
        for user in waiting.pop().users:
            found.add(graph.positions.get(user, len(graph.operations)))
            if user.op != "output" and graph.measures[user.name].recomputed:
                waiting.append(user)
    return found


def test_where_values_are_needed() -> None:
    graph = annotate(capture(Masked(), (torch.randn(3, 4), torch.arange(3))))
    needs, again = Needs(graph), {name for name, measure in graph.measures.items() if measure.recomputed}
    assert len(again) >= 3, "a chain of values that are computed again"
    last = needs.last
    for node in (*graph.names, *graph.train.graph.find_nodes(op="placeholder"), *graph.operations):
        assert needs.of(node) == needed(graph, node)
        used = needs.readers(node) if node.name in again else needs.of(node)
        assert last.get(node, -1) == max(used, default=-1)


def test_prices_of_a_stage_are_those_of_its_operations() -> None:
    graph = residual_tower(40)
    charge = Charge(graph, recompute=True)
    prices, count = Prices.of(charge), len(graph.operations)
    for start, stop, begin in ((0, count, 0), (0, count, -1), (3, 9, 3), (3, 9, -1), (count - 1, count, 5)):
        forward, backward = prices.between(start, stop, begin)
        amounts = [charge.amount(node.name) for node in graph.operations[start:stop]]
        assert forward.tolist() == [amount for amount, _ in amounts]
        assert backward.tolist() == [sum(p for threshold, p in pairs if threshold >= begin) for _, pairs in amounts]


def test_what_the_caller_froze_stays_frozen() -> None:
    """What planning makes is old when it ends, but the collector's state is the caller's."""
    theirs: list[object] = []
    gc.freeze()
    try:
        with uncollected():
            made = [[] for _ in range(10)]
        assert not any(each is theirs for each in gc.get_objects())  # which lists what is not frozen
        assert gc.isenabled()
        assert made
    finally:
        gc.unfreeze()
    with uncollected():
        made = [[] for _ in range(10)]
    assert gc.get_freeze_count() == 0
    assert any(known is made for known in gc.get_objects(generation=2))
