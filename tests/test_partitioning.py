"""The search for the best cuts: whatever is not computed for being worse must be worse."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from large_graphs import residual_tower
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autodecouple.errors import PartitionError
from autodecouple.graph import Graph
from autodecouple.objectives import Objective, SupCon
from autodecouple.objectives.backprop import Backprop
from autodecouple.passes import reach
from autodecouple.passes.candidates import find_cuts
from autodecouple.passes.measure import HeadCost, annotate, head_cost
from autodecouple.passes.measuring.charges import Amount, Charge, HeadPrice, charged
from autodecouple.passes.measuring.stage_costs import StageCosts
from autodecouple.passes.partition import choose_cuts
from autodecouple.passes.partitioning import columns, runs
from autodecouple.passes.partitioning.limited import Limited
from autodecouple.passes.partitioning.ranges import RangeMinimum
from autodecouple.passes.partitioning.runs import FORBIDDEN, StageRuns
from autodecouple.passes.partitioning.sums import RunSums
from autodecouple.passes.partitioning.ways import find_ways
from autodecouple.passes.trace import capture
from autodecouple.plans import TensorSpec

SMALL = SupCon(hidden=8, out=4)
Best = tuple[int, int] | None
"""(slowest stage, sum of preferences), None where no plan is allowed."""


def brute_force(tables: Sequence[Tensor], preference: Sequence[int]) -> Best:
    """By trying all cuts; tables[k][e, b] is the cost of stage k from start b to end e."""
    values = []
    for cuts in itertools.combinations(range(len(preference)), len(tables) - 1):
        values.append((slowest(tables, cuts), sum(preference[cut] for cut in cuts)))
    best = min(values, default=(FORBIDDEN, 0))
    return best if best[0] < FORBIDDEN else None


def slowest(tables: Sequence[Tensor], cuts: Sequence[int]) -> int:
    starts, ends = [0, *(cut + 1 for cut in cuts)], [*cuts, len(tables[0]) - 1]
    return max(int(table[end, start]) for table, start, end in zip(tables, starts, ends, strict=True))


# --- sums and minima --------------------------------------------------------------------------------------------------


@st.composite
def run_sums(draw: st.DrawFn) -> RunSums:
    count = draw(st.integers(1, 9))
    plain = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    pair = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1), st.integers(0, 5))
    rows = [(a, b, amount) for a, b, amount in draw(st.lists(pair, max_size=12)) if a < b]
    rows.sort(key=lambda row: row[1])
    return RunSums(torch.tensor(plain), torch.tensor(rows, dtype=torch.int64).reshape(-1, 3))


def add_up(sums: RunSums, begin: int, end: int) -> int:
    """A sum from its definition."""
    plain = sums.plain.diff().tolist()
    spanning = [amount for first, last, amount in sums.spanning.tolist() if begin <= first and last <= end]
    return sum(plain[begin : end + 1]) + sum(spanning)


@settings(max_examples=200)
@given(run_sums())
def test_sums_of_runs_are_those_of_their_definition(sums: RunSums) -> None:
    for begin in range(sums.num_segments):
        expected = [add_up(sums, begin, end) for end in range(begin, sums.num_segments)]
        assert sums.sums_from(begin, sums.num_segments).tolist() == expected


@settings(max_examples=200)
@given(run_sums(), st.data())
def test_a_search_finds_the_first_start_that_is_not_refused(sums: RunSums, data: st.DataObject) -> None:
    """For every end, with any bounds that rise with the starts: the starts before it are too dear, it is not."""
    count = sums.num_segments
    steps = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    bounds = torch.tensor(steps).cumsum(0)
    ends = torch.arange(count)
    found, before = sums.search(ends, lambda start, value: (start <= ends) & (value > bounds[start]))
    for end in range(count):
        refused = [b for b in range(end + 1) if add_up(sums, b, end) > int(bounds[b])]
        assert refused == list(range(int(found[end])))
        if refused:
            assert int(before[end]) == add_up(sums, refused[-1], end)


@settings(max_examples=100)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=20))
def test_the_minimum_of_every_range(values: list[int]) -> None:
    minimum = RangeMinimum(torch.tensor(values))
    ranges = [(a, b) for a in range(len(values)) for b in range(a, len(values))]
    first, last = torch.tensor(ranges).T
    assert minimum.within(first, last).tolist() == [min(values[a : b + 1]) for a, b in ranges]


# --- stages whose costs fall with every later start -------------------------------------------------------------------


@st.composite
def stage_runs(draw: st.DrawFn, sums: RunSums) -> StageRuns:
    """Some ends, each with ranges of starts that do not overlap, heads of any cost, and a slow device."""
    rows = []
    for end in range(sums.num_segments):
        places = draw(st.lists(st.integers(0, end + 1), min_size=2, max_size=4, unique=True)) if end else [0, 1]
        for first, stop in itertools.pairwise(sorted(places)):
            if draw(st.integers(0, 4)):
                rows.append((end, first, stop - 1, draw(st.integers(0, 6))))
    slowness = draw(st.sampled_from((1, 1, 2, 3)))
    return StageRuns(sums, *torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).T.contiguous(), slowness)


@st.composite
def stages_in_order(draw: st.DrawFn) -> tuple[list[StageRuns], list[int]]:
    sums = draw(run_sums())
    other = draw(run_sums().filter(lambda found: found.num_segments == sums.num_segments) | st.just(sums))
    count = draw(st.integers(1, 5))
    stages = [draw(stage_runs(draw(st.sampled_from((sums, other))))) for _ in range(count)]
    preference = draw(st.lists(st.integers(0, 9), min_size=sums.num_segments - 1, max_size=sums.num_segments - 1))
    return stages, preference


def table(stage: StageRuns) -> Tensor:
    """(ends, starts) from the definition."""
    count = stage.sums.num_segments
    costs = torch.full((count, count), FORBIDDEN)
    for end, first, last, head in zip(stage.end, stage.first, stage.last, stage.head, strict=True):
        for start in range(int(first), int(last) + 1):
            costs[end, start] = stage.slowness * (add_up(stage.sums, start, int(end)) + int(head))
    return costs


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(stages_in_order())
def test_the_search_over_runs_is_brute_force(found: tuple[list[StageRuns], list[int]]) -> None:
    """Law 6: heads may cost anything, also more where the stage is shorter; ends and starts may be missing."""
    stages, preference = found
    tables = [table(stage) for stage in stages]
    best = brute_force(tables, preference)
    result = runs.minimise_slowest(stages, preference)
    if best is None:
        assert result is None
        return
    assert result is not None
    value, cuts = result
    assert list(cuts) == sorted(set(cuts))
    assert (value, sum(preference[cut] for cut in cuts)) == best
    assert value == slowest(tables, cuts)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(stages_in_order())
def test_one_start_after_the_other_gives_the_same_costs(found: tuple[list[StageRuns], list[int]]) -> None:
    """A column holds every stage from a start; where a bound cuts it short, all that is left out costs more."""
    for stage in found[0]:
        costs, count = table(stage), stage.sums.num_segments
        for start in range(count):
            assert torch.equal(stage.costs_from(start, count), costs[start:, start])
            for bound in (0, 3, 20):
                assert (costs[stage.reach(start, bound) :, start] > bound).all()
            assert [stage.holds(start, end) for end in range(start, count)] == (
                costs[start:, start] < FORBIDDEN
            ).tolist()


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(stages_in_order(), st.integers(0, 30))
def test_what_no_plan_within_a_bound_goes_through_is_left_out(
    found: tuple[list[StageRuns], list[int]], bound: int
) -> None:
    """Starts that stages within the bound reach, and ends from which they go on to the model's end, by walking."""
    stages = found[0]
    tables, last = [table(stage) for stage in stages], stages[0].sums.num_segments - 1
    begun, led = [{0}], [{last}]
    for costs in tables[:-1]:
        begun.append({end + 1 for start in begun[-1] for end in range(start, last) if costs[end, start] <= bound})
    for costs in reversed(tables[1:]):
        led.insert(0, {start - 1 for end in led[0] for start in range(1, end + 1) if costs[end, start] <= bound})
    reached, leading = find_ways(stages, bound)
    assert [set(row.nonzero()[:, 0].tolist()) for row in reached] == begun
    assert [set(row.nonzero()[:, 0].tolist()) for row in leading] == led


# --- stages of any costs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """Costs of every stage, given as tables: [k][e, b]."""

    tables: tuple[Tensor, ...]
    preference: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        return len(self.tables)

    def column(self, start: int, bound: int) -> Tensor:
        return torch.stack([table[start:, start] for table in self.tables])


@st.composite
def problems(draw: st.DrawFn) -> Tables:
    """Tables of whole numbers, small ones so that many plans tie; some stages are not allowed."""
    cuts, stages = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    entry = st.one_of(st.integers(0, 5), st.integers(0, 5), st.just(FORBIDDEN))
    tables = [draw(st.lists(entry, min_size=(cuts + 1) ** 2, max_size=(cuts + 1) ** 2)) for _ in range(stages)]
    body = tuple(torch.tensor(table, dtype=torch.int64).view(cuts + 1, cuts + 1) for table in tables)
    for costs in body:  # an end before its start is no stage
        costs[torch.arange(cuts + 1)[:, None] < torch.arange(cuts + 1)[None, :]] = FORBIDDEN
    return Tables(body, tuple(draw(st.lists(st.integers(0, 9), min_size=cuts, max_size=cuts))))


@settings(max_examples=400)
@given(problems(), st.integers(0, 6))
def test_the_search_over_columns_is_brute_force(problem: Tables, bound: int) -> None:
    """Law 6 for any costs: the smallest slowest stage; among those the smallest sum of preferences. With a bound there
    is none, or the same."""
    best = brute_force(problem.tables, problem.preference)
    for most in (FORBIDDEN - 1, bound):
        found = columns.minimise_slowest(problem, most)
        if best is None or best[0] > most:
            assert found is None
            continue
        assert found is not None
        assert list(found) == sorted(set(found))
        assert (slowest(problem.tables, found), sum(problem.preference[cut] for cut in found)) == best


# --- large graphs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower() -> Graph:
    return residual_tower(600)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        assert callable(func)
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("objectives", [[SMALL] * 3, [SMALL, Backprop(), SMALL]])
def test_a_large_graph_is_cut_as_the_slow_way_cuts_it(tower: Graph, objectives: list[Objective]) -> None:
    """Two searches that share nothing but the costs."""
    legal = [candidate for candidate in find_cuts(tower) if candidate.cut is not None]
    assert len(legal) > 400
    costs = StageCosts(tower, legal)
    stages = [costs.runs(stage, objectives) for stage in range(4)]
    preference = [index * 7 % 5 for index in range(len(legal))]
    found = runs.minimise_slowest(stages, preference)
    assert found is not None
    assert found[1] == columns.minimise_slowest(Limited(costs, stages, objectives, preference, [None] * 4))


def test_planning_makes_no_table_of_all_stages(tower: Graph) -> None:
    """A table of all pairs of 100,000 cuts is 80 GB. Nothing is made that grows faster than the cuts: with twice as
    many, the largest tensor is about twice as large."""
    sizes = []
    for graph in (tower, residual_tower(1200)):
        candidates = find_cuts(graph)
        with Largest() as largest:
            choose_cuts(graph, candidates, 4, [SMALL] * 3)
        sizes.append(largest.elements)
    assert sizes[1] < 2.5 * sizes[0]


def test_a_limit_that_nothing_keeps_makes_no_table_either() -> None:
    """Every stage is looked at, a start at a time."""
    sizes = []
    for graph in (residual_tower(80), residual_tower(160)):
        candidates = find_cuts(graph)
        with Largest() as largest, pytest.raises(PartitionError, match="memory_limit"):
            choose_cuts(graph, candidates, 3, [SMALL] * 2, memory_limit=5000)
        sizes.append(largest.elements)
    assert sizes[1] < 2.5 * sizes[0]


def test_parameters_that_cannot_be_told_apart_are_merged(tower: Graph) -> None:
    """Which parameters a head sees is the same whether they are kept apart or merged as soon as can be; apart, the
    sets of a graph would take memory that grows with its square."""
    with mock.patch.object(reach, "ROOM", 10**6):
        apart = find_cuts(tower)
    with mock.patch.object(reach, "ROOM", 0):
        assert find_cuts(tower) == apart
    with mock.patch.object(reach, "ROOM", 16):
        kept = reach.Reach(tower)
        most = max(len(kept.first_use) for node in tower.operations if kept.visit(node) is None)
    assert most < 64 < len(tower.parameter_uses()), "it stays short"


class Beside(nn.Module):
    """Two layers, and one beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.beside = (nn.Linear(4, 4) for _ in range(3))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.second(self.first(x)).relu()
        y: Tensor = self.last(torch.cat([self.beside(x).relu(), deep], 1))
        return y


@pytest.mark.parametrize("room", [0, 10**6])
def test_of_merged_parameters_the_last_counts(room: int) -> None:
    """`first` and `second` lead to the same value: a head has to read it in a stage that begins at or before the
    second, not only at or before the first."""
    graph = annotate(capture(Beside(), torch.randn(4, 4)))
    with mock.patch.object(reach, "ROOM", room):
        places = {candidate.node: candidate for candidate in find_cuts(graph)}
    assert [node.name for node in graph.operations[:2]] == ["linear", "linear_1"]
    assert places["linear_2"].reads == (("linear_2", 3), ("relu", 1))


# --- other prices than FLOPs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Graph:
    return residual_tower(24)


def test_stages_are_balanced_by_what_they_are_priced_at(small: Graph) -> None:
    """Every stage with prices of its own: nodes, heads, the criterion, a slow device. The optimum is brute force's."""
    candidates = find_cuts(small)
    legal = [candidate for candidate in candidates if candidate.cut is not None]
    named: dict[str, Amount] = {
        node.name: (len(node.name), ((-1, 7), (small.measures[node.name].position, 3))) for node in small.operations
    }
    charges = [
        Charge(small, heads(lambda features: 50_000), speed=0.4),
        Charge(charged(small, named), heads(len)),
        Charge(charged(small, {node.name: (100, ()) for node in small.operations}), heads(lambda _: 0), 10_000),
    ]
    plan = choose_cuts(small, candidates, 3, [SMALL] * 2, charges=charges)
    found = [[candidate.node for candidate in legal].index(cut.after) for cut in plan.cuts]
    stages = [StageCosts(small, legal, charge).runs(stage, [SMALL] * 2) for stage, charge in enumerate(charges)]
    tables = [table(stage.slowed(factor)) for stage, factor in zip(stages, (5, 2, 2), strict=True)]
    best = brute_force(tables, [0] * len(legal))
    assert best is not None
    ends = [candidate.position + 1 for candidate in legal]
    begin, end = ends[found[0]], ends[found[1]]
    first = sum(sum_of(small, name, 0) for name in plan.stages[0].nodes)
    prices = [
        5 * (first + 50_000),
        2 * (sum(len(name) + 3 for name in plan.stages[1].nodes) + len(plan.cuts[1].features)),
        2 * (100 * (len(small.operations) - end) + 10_000),
    ]
    assert 0 < begin < end
    assert max(prices) == best[0]


def heads(price: Callable[[Sequence[TensorSpec]], int]) -> HeadPrice:
    def priced(objective: Objective, features: Sequence[TensorSpec], signal: TensorSpec) -> HeadCost:
        return dataclasses.replace(head_cost(objective, features, signal), flops=price(features))

    return priced


def sum_of(graph: Graph, name: str, start: int) -> int:
    measure = graph.measures[name]
    return measure.forward_flops + sum(flops for threshold, flops in measure.backward_flops if threshold >= start)


def test_the_limit_itself_is_allowed() -> None:
    """A plan that the limit made different takes m bytes at most: with m as the limit it is found again."""
    layers = [nn.Linear(16, 16) for _ in range(12)]
    model = nn.Sequential(nn.Embedding(50, 16), *layers)  # the embedding takes memory and no FLOPs
    graph = annotate(capture(model, torch.zeros(4, 5, dtype=torch.int64)))
    candidates = find_cuts(graph)
    free = choose_cuts(graph, candidates, 3, [SMALL] * 2)
    plan = choose_cuts(graph, candidates, 3, [SMALL] * 2, memory_limit=max(s.memory_bytes for s in free.stages) - 1)
    assert plan.cuts != free.cuts
    assert choose_cuts(graph, candidates, 3, [SMALL] * 2, memory_limit=max(s.memory_bytes for s in plan.stages)) == plan


def test_each_stage_has_a_memory_limit_of_its_own(small: Graph) -> None:
    """The device of the second stage is too small for what the fastest plan would put there."""
    candidates = find_cuts(small)
    free = choose_cuts(small, candidates, 2, [SMALL])
    limit = free.stages[1].memory_bytes - 1
    plan = choose_cuts(small, candidates, 2, [SMALL], charges=[Charge(small), Charge(small, memory_limit=limit)])
    assert plan.stages[1].memory_bytes <= limit
    assert plan.stages[0].memory_bytes > limit, "the first stage's device has no limit"
