"""Cuts and lanes: the optimum by dynamic programming is the optimum by trying everything."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from graph_strategies import Program, programs
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from plan_strategies import make_plan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import autodecouple
from autodecouple.devices import Device
from autodecouple.errors import AutodecoupleError, CutError, InputError, PartitionError
from autodecouple.graph import Graph
from autodecouple.objectives import EarlyExit, LoCo, Objective, SupCon
from autodecouple.objectives.backprop import Backprop
from autodecouple.objectives.gather import gathered_head
from autodecouple.passes.candidates import Candidate
from autodecouple.passes.measuring.stage_costs import StageCosts
from autodecouple.passes.partition import choose_cuts, find_classifier
from autodecouple.passes.partitioning.runs import FORBIDDEN
from autodecouple.passes.place import assign_lanes, default_devices
from autodecouple.pipeline import analyse
from autodecouple.plans import Plan, TensorSpec
from examples import models as networks

SWEEP = settings(max_examples=6, suppress_health_check=list(HealthCheck))
SLOW = settings(max_examples=60, suppress_health_check=list(HealthCheck))
OBJECTIVES: tuple[Objective, ...] = (SupCon(hidden=8, out=4), SupCon(hidden=32, out=4), EarlyExit(hidden=8), Backprop(),
                                     LoCo(EarlyExit(hidden=8)))  # fmt: skip


# --- on graphs --------------------------------------------------------------------------------------------------------


@cache
def _head_flops(
    objective: Objective, features: tuple[tuple[tuple[int, ...], int | None], ...], signal: TensorSpec
) -> tuple[int, int]:
    """(FLOPs of a training step, bytes of the weights) of a head that really runs."""
    specs = [TensorSpec("f", shape, "float32", batch_dim) for shape, batch_dim in features]
    head = gathered_head(objective, specs, signal)
    read = [torch.randn(spec.shape, requires_grad=True) for spec in specs]
    with FlopCounterMode(display=False) as counter:
        head(*read, torch.zeros(signal.shape, dtype=torch.int64))[0].backward()
    return counter.get_total_flops(), sum(4 * p.numel() for p in head.parameters())


class Costs:
    """Stage costs from their definition: for each combination of cuts, add up its nodes one by one."""

    def __init__(self, graph: Graph, candidates: tuple[Candidate, ...]) -> None:
        self.graph = graph
        self.legal = [c for c in candidates if c.cut is not None]
        self.operations = graph.operations
        self.memories: dict[Any, list[int]] = {}
        self.trained = {name: min(uses) for name, uses in graph.parameter_uses().items() if uses}

    def head(self, candidate: Candidate, begin: int, objective: Objective) -> tuple[int, int]:
        assert candidate.cut is not None
        if objective.name == "bp":
            return 0, 0
        specs = [candidate.cut.spec(name) for name in candidate.features(begin)]
        return _head_flops(objective, tuple((spec.shape, spec.batch_dim) for spec in specs), self.graph.signal)

    def stages(self, cuts: Sequence[int], objectives: Sequence[Objective]) -> list[tuple[int, int]]:
        """(FLOPs, parameters that are trained) per stage."""
        ends = [*(self.legal[cut].position + 1 for cut in cuts), len(self.operations)]
        return [self._stage(k, cuts, objectives, b, e) for k, (b, e) in enumerate(itertools.pairwise([0, *ends]))]

    def _stage(
        self, k: int, cuts: Sequence[int], objectives: Sequence[Objective], begin: int, end: int
    ) -> tuple[int, int]:
        measures = [self.graph.measures[node.name] for node in self.operations[begin:end]]
        coupled = k > 0 and objectives[k - 1].name == "bp"
        head, _ = self.head(self.legal[cuts[k]], begin, objectives[k]) if k < len(cuts) else (0, 0)
        before, after = ([False, *(o.name == "loco" for o in objectives), False])[k : k + 2]
        parts = [(m.position, *part) for m in measures for part in m.backward_flops]
        whole = (coupled or before) and not after
        backward = sum(f for _, threshold, f in parts if whole or threshold >= begin)
        if after and (coupled or before):  # once more to what was sent, past the weights
            backward += sum(f for position, threshold, f in parts if threshold < position)
        own = [name for name, first in self.trained.items() if begin <= first < end]
        trained = len([name for name in own if name in self.graph.trained])
        if k < len(cuts) and objectives[k].name != "bp" and begin <= self.legal[cuts[k]].blind:
            trained = 0  # not all of it can be: the plan is not allowed
        return sum(m.forward_flops for m in measures) + backward + head, trained

    def memory(self, cuts: Sequence[int], objectives: Sequence[Objective]) -> list[int]:
        """Bytes of each stage, as the plan with these cuts says; tests/test_memory.py measures whether it is right."""
        key = tuple(cuts), tuple(map(id, objectives))
        if key not in self.memories:
            plan = StageCosts(self.graph, self.legal).plan(cuts, objectives)
            self.memories[key] = [stage.memory_bytes for stage in plan.stages]
        return self.memories[key]

    def preference(self, cuts: Sequence[int]) -> tuple[int, int]:
        """Few gradients first, then module boundaries, the outermost best; then fewer bytes: sums over the cuts."""
        depth = moved = 0
        for cut in cuts:
            found = self.legal[cut].cut
            assert found is not None
            depth += 16 * len(found.carrying) + (min(16, found.module.count(".") + 1) if found.module else 16)
            moved += sum(spec.num_bytes for spec in found.crossing)
        return depth, moved

    def best(self, n_stages: int, objectives: Sequence[Objective], limit: int | None = None) -> Any:
        """(slowest, preference) of the best plan, None if there is none."""
        found = []
        for cuts in itertools.combinations(range(len(self.legal)), n_stages - 1):
            stages = self.stages(cuts, objectives)
            fits = limit is None or max(self.memory(cuts, objectives)) <= limit
            if fits and all(trained for _, trained in stages):
                found.append((max(flops for flops, _ in stages), self.preference(cuts)))
        return min(found, default=None)

    def value(self, plan: Plan, objectives: Sequence[Objective]) -> Any:
        nodes = [candidate.node for candidate in self.legal]
        cuts = [nodes.index(cut.after) for cut in plan.cuts]
        return max(flops for flops, _ in self.stages(cuts, objectives)), self.preference(cuts)


def check_optimal(program: Program, n_stages: int, picks: list[int], limited: float | None) -> None:
    graph, candidates = analyse(program.model(), program.inputs())
    costs = Costs(graph, candidates)
    assume(len(costs.legal) <= 14)
    objectives = [OBJECTIVES[pick] for pick in picks[: n_stages - 1]]
    limit = None
    if limited is not None:  # between what the best plan takes and nothing
        everything = costs.memory((), ())[0]
        limit = round(limited * everything)
    best = costs.best(n_stages, objectives, limit)
    if best is None:
        with pytest.raises(PartitionError):
            choose_cuts(graph, candidates, n_stages, objectives, memory_limit=limit)
        return
    plan = choose_cuts(graph, candidates, n_stages, objectives, memory_limit=limit)
    assert costs.value(plan, objectives) == best
    assert max(stage.flops for stage in plan.stages) == best[0], "the plan says what it costs"
    assert limit is None or all(stage.memory_bytes <= limit for stage in plan.stages)
    assert [cut.detached for cut in plan.cuts] == [objective.name != "bp" for objective in objectives]


wishes = (
    programs(max_steps=12),
    st.integers(1, 4),
    st.lists(st.integers(0, len(OBJECTIVES) - 1), min_size=3, max_size=3),
    st.one_of(st.none(), st.floats(0.2, 1.2)),
)


@SWEEP
@given(*wishes)
def test_cuts_are_optimal(program: Program, n_stages: int, picks: list[int], limited: float | None) -> None:
    """Law 6 on real graphs, with heads, coupled cuts and memory limits; ties go to module boundaries, then to bytes."""
    check_optimal(program, n_stages, picks, limited)


@pytest.mark.slow
@SLOW
@given(*wishes)
def test_cuts_are_optimal_for_many(program: Program, n_stages: int, picks: list[int], limited: float | None) -> None:
    check_optimal(program, n_stages, picks, limited)


def check_most(program: Program) -> None:
    graph, candidates = analyse(program.model(), program.inputs())
    message = _refused(graph, candidates, 1000)
    most = int(message.split("at most ")[1].split(" ")[0])
    plan = choose_cuts(graph, candidates, most, [SupCon()] * (most - 1))
    assert len(plan.stages) == most
    for spec in plan.stages:
        nodes = set(spec.nodes)
        used = [n for n in graph.train.graph.find_nodes(op="get_attr") if {u.name for u in n.users} & nodes]
        assert {str(node.target) for node in used} & graph.trained, "every stage has something to train"
    assert f"at most {most} stages" in _refused(graph, candidates, most + 1)
    assert all(repr(c.node) in message for c in candidates if c.cut is not None)


def _refused(graph: Graph, candidates: tuple[Candidate, ...], n_stages: int) -> str:
    with pytest.raises(PartitionError) as caught:
        choose_cuts(graph, candidates, n_stages, [SupCon()] * (n_stages - 1))
    return str(caught.value)


@SWEEP
@given(programs())
def test_the_largest_number_of_stages_can_be_reached(program: Program) -> None:
    """What the error offers must work, and one more must not."""
    check_most(program)


@pytest.mark.timeout(600)
@pytest.mark.slow
@SLOW
@given(programs())
def test_the_largest_number_of_stages_can_be_reached_for_many(program: Program) -> None:
    check_most(program)


# --- the networks of the papers ---------------------------------------------------------------------------------------

IMAGE, TEXT = torch.empty(8, 3, 32, 32, device="meta"), torch.zeros(8, 20, dtype=torch.int64, device="meta")
NETWORKS: dict[str, tuple[Any, torch.Tensor]] = {
    "vgg": (lambda: networks.vgg(10), IMAGE),
    "resnet18": (lambda: networks.resnet18(10), IMAGE),
    "transformer": (lambda: networks.transformer(1000, 4), TEXT),
    "lstm": (lambda: networks.lstm(1000, 4), TEXT),
    "residual_cnn": (lambda: networks.residual_cnn(10), torch.empty(8, 1, 8, 8, device="meta")),
}


@pytest.mark.parametrize(
    "name", [name if name == "residual_cnn" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_the_papers_networks_are_balanced_as_well_as_can_be(name: str) -> None:
    """In four stages with SupCon's own heads: no choice of the legal cuts has a cheaper slowest stage."""
    make, inputs = NETWORKS[name]
    with torch.device("meta"):
        model = make()
    plan = autodecouple.plan(model, (inputs,), n_stages=4, loss="supcon", devices=["cpu"])
    graph, candidates = analyse(model, (inputs,))
    costs = Costs(graph, candidates)
    ends = [candidate.position + 1 for candidate in costs.legal]
    objectives = [SupCon()] * 3
    pairs: dict[tuple[int, int], int] = {}
    for begin, end in itertools.combinations(range(-1, len(ends) + 1), 2):
        cuts = (0, 0, 0) if end == len(ends) else (end, 0, 0)
        begins, stop = 0 if begin < 0 else ends[begin], len(graph.operations) if end == len(ends) else ends[end]
        flops, trained = costs._stage(3 if end == len(ends) else 0, cuts, objectives, begins, stop)
        pairs[begin, end] = flops if trained else FORBIDDEN
    best = min(
        max(pairs[a, b] for a, b in itertools.pairwise((-1, *cuts, len(ends))))
        for cuts in itertools.combinations(range(len(ends)), 3)
    )
    assert plan.bottleneck.flops == best
    assert plan.balance > 0.6


# --- one model, by hand -----------------------------------------------------------------------------------------------


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())


@pytest.fixture(scope="module")
def found() -> tuple[Graph, tuple[Candidate, ...]]:
    """stem - three blocks - classifier: linear relu | linear_1 relu_1 linear_2 relu_2 | ..."""
    body = nn.Sequential(*(block() for _ in range(3)))
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    model.add_module("body", body)
    model.add_module("classifier", nn.Linear(8, 3))
    return analyse(model, torch.randn(4, 8))


def choose(found: Any, n_stages: int, **options: Any) -> Plan:
    graph, candidates = found
    return choose_cuts(graph, candidates, n_stages, [OBJECTIVES[0]] * (n_stages - 1), **options)


@pytest.mark.parametrize("n_stages", [0, -1, 2.5, True, "4", None, float("nan")])
def test_a_number_of_stages_must_be_one(found: Any, n_stages: Any) -> None:
    graph, candidates = found
    with pytest.raises(PartitionError, match="n_stages must be a positive integer, not ") as caught:
        choose_cuts(graph, candidates, n_stages, [])
    assert repr(n_stages) in str(caught.value)


def test_too_many_stages_name_the_maximum_and_the_cuts(found: Any) -> None:
    with pytest.raises(PartitionError) as caught:
        choose(found, 9)
    message = str(caught.value)
    assert "n_stages=9, but the legal cuts allow at most 8 stages" in message
    assert "'relu' (end of stem)" in message
    assert "'relu_2' (end of body.0)" in message
    assert len(choose(found, 8).stages) == 8


def test_one_stage_is_the_whole_model(found: Any) -> None:
    plan = choose(found, 1)
    assert plan.cuts == ()
    assert plan.stages[0].nodes == tuple(node.name for node in found[0].operations)


def test_ties_go_to_module_boundaries() -> None:
    """Behind a linear layer or behind its ReLU costs the same: the cut is where the user's module ends."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout()) for _ in range(3)))
    plan = choose(analyse(model, torch.randn(4, 8)), 3)
    assert [cut.module for cut in plan.cuts] == ["0", "1"]


def test_ties_go_to_fewer_bytes() -> None:
    """Same features, same cost, no module ends: the cut lies where the tensor beside them is narrow for a while."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 3))

        def forward(self, x: torch.Tensor) -> Any:
            narrow = x[:, :1] * 1
            h = (x @ self.first).sin() + x
            wide = narrow.repeat(1, 8).cumsum(1)  # a plain repetition would be computed again
            return h.cos() @ self.last + wide.sum(1, keepdim=True)

    found = analyse(Beside(), torch.randn(4, 8))
    sizes = [c.cut.num_bytes for c in found[1] if c.cut is not None]
    assert sizes[0] > min(sizes) < sizes[-1]
    (cut,) = choose(found, 2).cuts
    assert cut.num_bytes == min(sizes)


def test_a_model_that_trains_nothing_has_no_stages() -> None:
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).requires_grad_(False)
    graph, candidates = analyse(frozen, torch.randn(4, 4))
    with pytest.raises(PartitionError, match="nothing to train"):
        choose_cuts(graph, candidates, 1, [])


@pytest.mark.parametrize(
    ("cut_at", "after"),
    [
        (["linear", "relu_3"], ["linear", "relu_3"]),  # nodes
        (["stem", "body.0"], ["relu", "relu_2"]),  # modules that end there
        (["stem.0", "body.1.2"], ["linear", "linear_4"]),  # modules inside others
        (["stem.1", "body.2.3"], ["relu", "relu_6"]),  # not the outermost that ends there
        (["linear_1", "body"], ["linear_1", "relu_6"]),
    ],
)
def test_cuts_lie_where_they_are_asked_for(found: Any, cut_at: list[str], after: list[str]) -> None:
    assert [cut.after for cut in choose(found, 3, cut_at=cut_at).cuts] == after


@pytest.mark.parametrize(
    ("cut_at", "error", "message"),
    [
        (["relu_3", "linear"], CutError, r"in execution order, but is \['relu_3', 'linear'\]"),
        (["stem", "relu"], CutError, "different places"),
        (["stem"], PartitionError, "3 stages need 2 cuts, but cut_at has 1"),
        (["stem", "linear_1", "linear_2"], PartitionError, "3 stages need 2 cuts, but cut_at has 3"),
        (["stem", "tail"], CutError, "there is no place 'tail' to cut at; the legal cuts: 'linear'"),
        (["stem", "classifier"], CutError, "no place 'classifier' to cut at"),  # nothing follows it
    ],
)
def test_cuts_that_cannot_be_are_refused(found: Any, cut_at: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose(found, 3, cut_at=cut_at)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Any) -> Any:
        h = self.layers[0](x)
        return self.layers[3](self.layers[2](self.layers[1](self.layers[1](h).relu())))


def test_an_illegal_cut_names_its_reason_and_its_neighbours() -> None:
    graph, candidates = analyse(Twice(), torch.randn(4, 4))
    with pytest.raises(CutError) as caught:
        choose_cuts(graph, candidates, 2, [OBJECTIVES[0]], cut_at=["relu"])
    message = str(caught.value)
    assert "cannot cut after 'relu': parameter 'layers.1.weight' is used on both sides, by 'linear_1'" in message
    assert "nearest legal cuts: 'linear_2' (end of layers.1), 'linear' (end of layers.0)" in message


def test_a_place_that_repeats_a_cut_is_that_cut() -> None:
    """BatchNorm's count lies behind a linear layer: who names it means the same cut."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    graph, candidates = analyse(model, torch.randn(4, 4))
    plan = choose_cuts(graph, candidates, 2, [OBJECTIVES[0]], cut_at=["add_"])
    assert [cut.after for cut in plan.cuts] == ["linear"]


def test_asked_for_cuts_must_leave_every_stage_something_to_train(found: Any) -> None:
    with pytest.raises(PartitionError, match="with the cuts asked for, a stage of 3 would have no trainable parameter"):
        choose(found, 3, cut_at=["linear", "relu"])


def test_a_memory_limit_that_cannot_be_kept_is_named(found: Any) -> None:
    with pytest.raises(PartitionError, match="memory_limit=100 bytes") as caught:
        choose(found, 2, memory_limit=100)
    assert "raise the limit" in str(caught.value)


def test_a_memory_limit_moves_the_cuts(found: Any) -> None:
    """The fastest plan may be too large for one device; the next best that fits is taken."""
    free = choose(found, 2)
    most = max(stage.memory_bytes for stage in free.stages)
    assert max(s.memory_bytes for s in choose(found, 2, memory_limit=most).stages) <= most
    with pytest.raises(PartitionError):
        choose(found, 2, memory_limit=most // 4)


def test_a_stage_of_its_own_for_the_classifier(found: Any) -> None:
    """The papers' form of SCPL: one cut more, right before the classifier's parameters."""
    graph, candidates = found
    classifier = find_classifier(graph, candidates, True)
    assert classifier[-1] == "relu_6"
    plan = choose_cuts(graph, candidates, 2, [OBJECTIVES[0]] * 2, classifier=classifier)
    assert [cut.after for cut in plan.cuts][-1] == "relu_6"
    assert len(plan.stages) == 3
    assert find_classifier(graph, candidates, "body.1") == ("relu_4",)
    with pytest.raises(CutError, match="there is no place 'head'"):
        find_classifier(graph, candidates, "head")


def test_the_classifier_begins_where_the_head_before_it_can_read() -> None:
    """InfoNCE predicts positions, and Greedy InfoMax ends in a linear probe: no cut was found behind the pooling."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model.extend([nn.Flatten(), nn.Linear(8, 4)])
    options = {"example_inputs": torch.randn(4, 3, 12, 12), "n_stages": 2, "detach_classifier": True}
    last = {loss: autodecouple.plan(model, loss=loss, **options).cuts[-1] for loss in ("infonce", "supcon")}
    assert last["infonce"].after == "relu_1" and last["supcon"].crossing[0].shape == (4, 8)
    with pytest.raises(InputError, match="predicts positions from others, but"):  # a place that was named is kept
        autodecouple.plan(model, loss="infonce", **{**options, "detach_classifier": "5"})


# --- lanes ------------------------------------------------------------------------------------------------------------


def groupings(count: int, lanes: int) -> Any:
    """Every way to lay `count` things in a row into `lanes` runs, none empty."""
    for cuts in itertools.combinations(range(1, count), lanes - 1):
        yield [range(a, b) for a, b in itertools.pairwise([0, *cuts, count])]


@settings(max_examples=150)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(1, 9), st.data())
def test_lanes_are_optimal(flops: list[int], lanes: int, data: st.DataObject) -> None:
    """The slowest lane by brute force over contiguous runs, also where stages are glued to the one before them."""
    glued = data.draw(st.sets(st.integers(1, max(1, len(flops) - 1)), max_size=2))
    plan = make_plan([0] * len(flops), flops=[(f, 0, 0) for f in flops])
    placed = assign_lanes(plan, ["cpu"] * lanes, glued=tuple(glued))
    loose = len([i for i in range(len(flops)) if i == 0 or i not in glued])
    best = min(
        max(sum(flops[i] for i in run) for run in runs)
        for runs in groupings(len(flops), min(lanes, loose))
        if not any(run.start in glued for run in runs)
    )
    assert len(placed.lanes) == min(lanes, loose), "no lane is left empty"
    assert max(sum(flops[i] for i in run) for run in placed.lanes) == best
    assert [i for run in placed.lanes for i in run] == list(range(len(flops))), "contiguous, in order"
    assert all(placed.stages[i].lane == placed.stages[i - 1].lane for i in glued if i < len(flops))
    assert dataclasses.replace(placed, stages=plan.stages) == plan, "nothing else changes"


@settings(max_examples=150)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.data())
def test_unlike_lanes_are_optimal_within_their_memory(memory: list[int], data: st.DataObject) -> None:
    """By brute force: every lane has a cost of its own for each stage, and a limit for what it holds together."""
    lanes = data.draw(st.integers(1, len(memory)))
    costs = [data.draw(st.lists(st.integers(0, 9), min_size=len(memory), max_size=len(memory))) for _ in range(lanes)]
    limits = [data.draw(st.none() | st.integers(1, 20)) for _ in range(lanes)]
    plan = make_plan([0] * len(memory))
    plan = dataclasses.replace(
        plan, stages=tuple(dataclasses.replace(s, step_bytes=m) for s, m in zip(plan.stages, memory, strict=True))
    )
    devices = [Device("cpu", memory_limit=limit) for limit in limits]

    def slowest(runs: Any) -> int | None:
        fits = all(limit is None or sum(memory[i] for i in r) <= limit for r, limit in zip(runs, limits, strict=True))
        return max(sum(row[i] for i in run) for row, run in zip(costs, runs, strict=True)) if fits else None

    best = min((v for runs in groupings(len(memory), lanes) if (v := slowest(runs)) is not None), default=None)
    if best is None:
        with pytest.raises(PartitionError, match="no run of stages fits the lanes' memory limits"):
            assign_lanes(plan, devices, costs=costs)
    else:
        assert slowest(assign_lanes(plan, devices, costs=costs).lanes) == best


def test_stages_take_the_device_of_their_lane() -> None:
    placed = assign_lanes(make_plan([0, 0, 0]), ["cpu", "cpu:0", "meta"])
    assert [stage.device for stage in placed.stages] == ["cpu", "cpu:0", "meta"]
    assert [stage.lane for stage in placed.stages] == [0, 1, 2]


def test_more_lanes_than_stages_leave_the_last_ones_out() -> None:
    placed = assign_lanes(make_plan([0, 0]), ["cpu"] * 5)
    assert placed.lanes == ((0,), (1,))


def test_devices_by_default_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert default_devices() == ["cpu"] * 3
    assert len(assign_lanes(make_plan([0] * 4)).lanes) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert default_devices() == ["cuda:0", "cuda:1"]
    assert [s.device for s in assign_lanes(make_plan([0] * 4), ["cuda", "cuda:1"]).stages][::3] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["gpu"], "'gpu' is not a device; write 'cpu' or 'cuda:0'"),
        (["cpu", "cuda:99"], "'cuda:99' was asked for, but [0-9]+ GPUs are visible"),
        ([3.5], "3.5 is not a device"),
        ([], "devices is empty"),
    ],
)
def test_devices_that_do_not_exist_are_refused(devices: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        assign_lanes(make_plan([0, 0]), devices)
    assert isinstance(caught.value, AutodecoupleError)
