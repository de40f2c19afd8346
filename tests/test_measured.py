"""cost="measured": what is timed, that the model does not notice it, and that the plan is the optimum of it."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from graph_strategies import DRAWS, Program, leaves, programs
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from plan_strategies import make_plan
from torch import Tensor, nn

import autodecouple
from autodecouple.cost import TableCost, TimedCost
from autodecouple.devices import Device
from autodecouple.errors import InputError, PartitionError, PlanError
from autodecouple.graph import Graph
from autodecouple.objectives import Objective, SupCon
from autodecouple.objectives.backprop import Backprop
from autodecouple.passes import charge
from autodecouple.passes.candidates import Candidate, find_cuts
from autodecouple.passes.measure import HeadCost, head_cost
from autodecouple.passes.measuring import blocks, timing
from autodecouple.passes.measuring.charges import Amount, Charge, charged, slowness, with_updates
from autodecouple.passes.measuring.clock import Clock
from autodecouple.passes.measuring.entering import entering
from autodecouple.passes.measuring.profile import PeakMemory
from autodecouple.passes.measuring.timing import Bench, apportion, time_nodes
from autodecouple.passes.measuring.updates import UpdateTimes, charge_updates, time_updates
from autodecouple.passes.partition import choose_cuts
from autodecouple.passes.place import assign_lanes
from autodecouple.plans import Link, Plan, TensorSpec
from autodecouple.schedules.actions import Op

SWEEP = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
CPU = Bench(torch.device("cpu"), 1)


class Net(nn.Module):
    """Two kinds of inputs, a skip connection, dropout, statistics and a counter: all that timing might disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.first = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh())
        self.third = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.last = nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        self.seen += 1
        h = self.first(self.embed(tokens).mean(1) * scale)
        h = h + self.second(h)
        return self.last(self.third(h))


EXAMPLE = (torch.tensor([[0, 4, 1], [2, 3, 0]] * 4), torch.rand(8, 8))


@cache
def captured() -> tuple[Graph, tuple[Candidate, ...]]:
    torch.manual_seed(0)
    graph = autodecouple.capture(Net(), EXAMPLE)
    return graph, find_cuts(graph)


def ends_of(candidates: Sequence[Candidate]) -> list[int]:
    return [candidate.position for candidate in candidates if candidate.cut is not None]


# --- blocks -----------------------------------------------------------------------------------------------------------


@SWEEP
@given(programs(without=DRAWS))
def test_blocks_one_after_the_other_are_the_model(program: Program) -> None:
    """Each block is timed on what it would meet: the values of a run from the inputs to the outputs."""
    model = program.model()
    graph = autodecouple.capture(model, program.inputs())
    device = torch.device("cpu")
    flat = torch.utils._pytree.tree_leaves(program.inputs())
    values = entering(graph, device, flat)
    for block in blocks.split(graph, ends_of(find_cuts(graph))):
        module = blocks.assemble(graph, block, device)
        values |= zip(block.outputs, module(*(values[node] for node in block.inputs)), strict=True)
    found = [values[leaf] if isinstance(leaf, torch.fx.Node) else leaf for leaf in graph.outputs]
    expected = leaves(program.call(program.model().train()))
    for a, b in zip([x for x in found if isinstance(x, Tensor)], expected, strict=True):
        assert torch.equal(a, b)


def test_blocks_are_the_operations_between_legal_cuts() -> None:
    graph, candidates = captured()
    found = list(blocks.split(graph, ends_of(candidates)))
    assert [node for block in found for node in block.nodes] == graph.operations
    assert [block.nodes[-1].name for block in found[:-1]] == [c.node for c in candidates if c.cut is not None]


def test_equal_blocks_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(8, 8), nn.Tanh())], nn.Linear(8, 3))
    graph = autodecouple.capture(model, (torch.randn(4, 8),))
    timed: list[Any] = []
    original = timing._Walk._time

    def counted(self: Any, *args: Any) -> Any:
        timed.append(args)
        return original(self, *args)

    monkeypatch.setattr(timing._Walk, "_time", counted)
    amounts = time_nodes(graph, ends_of(find_cuts(graph)), CPU)
    assert len(amounts) == 13
    # the block that does nothing; the first layer, whose input has no gradient, and its tanh, which is like all others
    assert len(timed) == 1 + 4
    assert len({amounts[name][0] for name in amounts if "tanh" in name}) == 1


# --- timing -----------------------------------------------------------------------------------------------------------


def test_timing_leaves_no_trace() -> None:
    """Parameters, buffers, gradients, flags, random states, threads and the example: bit for bit as before."""
    torch.manual_seed(0)
    model, example = Net(), tuple(x.clone() for x in EXAMPLE)
    model.third.eval()
    model(*example).sum().backward()
    model.first[0].weight.grad = None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    flags = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    autodecouple.plan(model, example, 2, devices=["cpu"] * 2, cost="measured")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        kept = gradients[name]
        assert parameter.data_ptr() == places[name] and parameter.requires_grad
        assert parameter.grad is None if kept is None else torch.equal(parameter.grad, kept)
    assert flags == [module.training for module in model.modules()]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), torch.get_num_threads())
    assert all(torch.equal(a, b) for a, b in zip(example, EXAMPLE, strict=True))


@pytest.mark.slow
@SWEEP
@given(programs())
def test_any_model_can_be_timed_and_does_not_notice(program: Program) -> None:
    model = program.model()
    graph = autodecouple.capture(model, program.inputs())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    ends = ends_of(find_cuts(graph))
    amounts = time_nodes(graph, ends, CPU)
    assert list(amounts) == [graph.operations[end].name for end in (*ends, len(graph.operations) - 1)]
    assert sum(forward for forward, _ in amounts.values()) > 0
    assert all(cost >= 0 for _, pairs in amounts.values() for _, cost in pairs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_a_failure_leaves_no_trace_either(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, candidates = captured()
    before = {name: value.clone() for name, value in graph.model.state_dict().items()}
    original = timing._Walk._forget

    def fail(self: Any, block: Any) -> None:
        original(self, block)
        if len(self.known) == 3:
            raise RuntimeError("no more")

    monkeypatch.setattr(timing._Walk, "_forget", fail)
    with pytest.raises(RuntimeError) as caught:
        time_nodes(graph, ends_of(candidates), CPU)
    assert "random inputs" in caught.value.__notes__[0]
    assert all(torch.equal(value, before[name]) for name, value in graph.model.state_dict().items())
    assert all(p.grad is None for p in graph.model.parameters())


def test_only_what_later_blocks_use_is_kept() -> None:
    """Forty layers of 1 MiB each, whose whole graph would keep 80: at any moment a few of them are alive."""
    model = nn.Sequential(*[m for _ in range(40) for m in (nn.Linear(64, 64), nn.Tanh())], nn.Linear(64, 3))
    graph = autodecouple.capture(model, (torch.randn(4096, 64),))
    with PeakMemory() as memory:
        time_nodes(graph, ends_of(find_cuts(graph)), CPU)
    weights = sum(4 * p.numel() for p in model.parameters())  # kept aside while the model runs
    assert memory.peak - weights < 12 * 2**20


@MANY
@given(st.integers(0, 10**6), st.data())
def test_a_backward_is_shared_out_to_the_nanosecond(backward: int, data: st.DataObject) -> None:
    """By thresholds, as their FLOPs; a block without FLOPs has it wherever a gradient passes through."""
    graph, candidates = captured()
    block = data.draw(st.sampled_from(list(blocks.split(graph, ends_of(candidates)))))
    pairs = apportion(graph, block, backward)
    assert sum(cost for _, cost in pairs) == backward
    flops: dict[int, int] = {}
    for node in block.nodes:
        for threshold, amount in graph.measures[node.name].backward_flops:
            flops[threshold] = flops.get(threshold, 0) + amount
    if backward and any(flops.values()):
        assert {threshold for threshold, _ in pairs} == set(flops)
        for threshold, cost in pairs:
            assert abs(Fraction(backward * flops[threshold], sum(flops.values())) - cost) < 1
    elif backward:
        assert [threshold for threshold, _ in pairs] == [max(graph.measures[n.name].depends for n in block.nodes)]


def test_whole_numbers_stay_within_the_table_they_are_looked_up_in() -> None:
    graph, _ = captured()
    for seed in range(5):
        torch.manual_seed(seed)
        tokens, scale = entering(graph, torch.device("cpu")).values()
        assert tokens.dtype == torch.int64 and int(tokens.min()) >= 0 and int(tokens.max()) <= 4
        assert scale.shape == (8, 8)


def test_inputs_of_the_example_are_taken_where_they_are_real() -> None:
    graph, _ = captured()
    given = list(entering(graph, torch.device("cpu"), EXAMPLE).values())
    assert all(torch.equal(a, b) and a is not b for a, b in zip(given, EXAMPLE, strict=True))
    meta = [x.to("meta") for x in EXAMPLE]
    assert not any(x.is_meta for x in entering(graph, torch.device("cpu"), meta).values())


def test_an_optimizer_is_charged_for_parameters_and_for_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that takes a known time is found to take it; the node that uses a parameter first pays."""
    now = 0

    class Known(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            nonlocal now
            now += sum(5_000 + 4 * parameter.numel() for parameter in self.param_groups[0]["params"])

    monkeypatch.setattr(Clock, "mark", lambda self: now)
    times = time_updates(lambda params: Known(params, lr=0.1), CPU)
    assert times.per_parameter == pytest.approx(5_000) and times.per_byte == pytest.approx(1)
    graph, _ = captured()
    found = charge_updates(graph, times)
    trained = [parameter for parameter in graph.model.parameters() if parameter.requires_grad]
    assert sum(found.values()) == pytest.approx(sum(5_000 + 4 * parameter.numel() for parameter in trained))
    amounts = with_updates({name: (7, ((0, 1),)) for name in found}, found)
    assert all(amounts[name] == (7 + update, ((0, 1),)) for name, update in found.items())


def test_a_slow_optimizer_moves_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers with nearly all the parameters, side by side: a stage each, whatever else takes time."""
    monkeypatch.setattr(charge, "time_updates", lambda *_: UpdateTimes(0.0, 1e6))
    model = nn.Sequential(nn.Linear(4, 512), nn.Linear(512, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    graph = autodecouple.capture(model, torch.randn(2, 4))
    with_it = autodecouple.plan(graph, n_stages=2, devices=["cpu"] * 2, loss="bp", cost="measured")
    assert [cut.module for cut in with_it.cuts] == ["0"]
    assert [stage.update_seconds for stage in with_it.stages] == pytest.approx([1e-3 * 4 * 5 * 512, 1e-3 * 4 * 2107])


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(InputError, match="weights are on the meta device"):
        autodecouple.plan(model, (torch.randn(2, 4, device="meta"),), 2, devices=["cpu"], cost="measured")


def test_an_unknown_cost_is_named() -> None:
    with pytest.raises(InputError, match="cost='seconds' is not known; there are: 'flops', 'measured'"):
        autodecouple.plan(*captured()[:1], n_stages=2, cost="seconds")


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timed() -> Plan:
    return autodecouple.plan(captured()[0], n_stages=3, devices=["cpu"] * 3, cost="measured")


def test_a_timed_plan_holds_seconds_and_links(timed: Plan) -> None:
    assert timed.is_timed and len(timed.links) == 2
    for stage in timed.stages:
        parts = (stage.forward_seconds, stage.backward_seconds, stage.head_seconds, stage.update_seconds)
        assert stage.head_seconds and stage.seconds == pytest.approx(sum(part or 0.0 for part in parts))
    assert all(link.bytes_per_second > 0 and link.latency_seconds > 0 for link in timed.links)
    assert timed.speedup == pytest.approx(sum(timed.costs) / max(timed.costs))
    assert timed.bottleneck.seconds == max(timed.costs)


def test_seconds_go_to_json_and_back(timed: Plan) -> None:
    assert Plan.from_json(timed.to_json()) == timed
    old = timed.to_json().replace('"links"', '"lynx"')
    with pytest.raises(PlanError, match="unknown key 'lynx'"):
        Plan.from_json(old)


def test_a_plan_of_seconds_and_of_none_is_refused(timed: Plan) -> None:
    untimed = dataclasses.replace(timed.stages[1], head_seconds=None)
    with pytest.raises(PlanError, match="some stages of the plan have seconds"):
        dataclasses.replace(timed, stages=(timed.stages[0], untimed, timed.stages[2]))


def test_the_table_and_the_figure_show_seconds(timed: Plan) -> None:
    plan = dataclasses.replace(
        timed,
        stages=tuple(
            dataclasses.replace(
                s, forward_seconds=0.0012, backward_seconds=0.0024, head_seconds=0.0004, update_seconds=0.0
            )
            for s in timed.stages
        ),
    )
    assert "forward" in str(plan) and " ms " in str(plan) and "slowest: stage 0, 4.00 ms a step" in str(plan)
    assert "1.20" in str(plan) and "2.40" in str(plan) and "FLOP  backward" not in str(plan)
    assert "4.00 ms (33 %)" in plan._repr_mimebundle_()["image/svg+xml"]


def test_simulation_takes_the_seconds_of_the_plan(timed: Plan) -> None:
    table = {}
    for s in timed.stages:
        table |= {(s.index, Op.FORWARD): s.forward_seconds, (s.index, Op.BACKWARD): s.backward_seconds}
        table |= {(s.index, Op.LOSS): s.head_seconds, (s.index, Op.UPDATE): s.update_seconds}
    transfers = [
        link.latency_seconds + cut.num_bytes / link.bytes_per_second
        for cut, link in zip(timed.cuts, timed.links, strict=True)
    ]
    by_hand = TableCost(table, transfers)  # type: ignore[arg-type]
    expected = autodecouple.simulate(timed, batches=5, cost=by_hand)
    assert autodecouple.simulate(timed, batches=5).spans == expected.spans
    with pytest.raises(InputError, match="holds no seconds"):
        TimedCost(autodecouple.plan(captured()[0], n_stages=2, devices=["cpu"]))


def test_micro_batches_share_the_seconds_of_a_batch(timed: Plan) -> None:
    whole, slices = TimedCost(timed), TimedCost(timed, 4)
    for stage in range(3):
        one, part = (autodecouple.schedules.actions.Action(stage, Op.FORWARD, 0) for _ in range(2))
        assert slices.seconds(part) == whole.seconds(one) / 4
    assert slices.transfer(0) > whole.transfer(0) / 4  # the latency comes every time


def test_compile_takes_a_timed_plan_as_it_is(timed: Plan) -> None:
    graph, _ = captured()
    with autodecouple.compile(graph, plan=timed, executor="inline") as decoupled:
        assert decoupled.plan == timed
    cuts = [c.node for c in find_cuts(graph) if c.cut is not None]
    other = autodecouple.plan(graph, n_stages=3, devices=["cpu"] * 3, cut_at=[cuts[0], cuts[-1]])
    moved = dataclasses.replace(timed, cuts=other.cuts)  # edited by hand: the seconds are of other stages
    with autodecouple.compile(graph, plan=moved, executor="inline") as decoupled:
        assert not decoupled.plan.is_timed


def test_compile_measures_at_the_first_batch() -> None:
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU())], nn.Linear(8, 3))
    with autodecouple.compile(model, 2, devices=["cpu"] * 2, cost="measured") as decoupled:
        step = decoupled.train_step(torch.randn(16, 8), torch.randint(3, (16,)))
        assert decoupled.plan.is_timed and all(loss is not None for loss in step.losses)


# --- the optimum at given costs ---------------------------------------------------------------------------------------

OBJECTIVES: tuple[Objective, ...] = (SupCon(hidden=8, out=4), SupCon(hidden=16, out=4), Backprop())


def drawn_charge(graph: Graph, chance: random.Random, recompute: bool) -> Charge:
    """Any whole nanoseconds for nodes, heads and the criterion, on a lane of any speed and memory."""

    def few() -> int:
        return chance.randint(0, 9)

    amounts: dict[str, Amount] = {}
    for position, node in enumerate(graph.operations):  # no gradient starts behind its node
        pairs = [(chance.randint(-1, position), few()) for _ in range(chance.randint(0, 2))]
        amounts[node.name] = few(), tuple(pairs)
    prices = [few() for _ in range(7)]

    def head(objective: Objective, features: Sequence[TensorSpec], signal: TensorSpec) -> HeadCost:
        price = prices[sum(map(ord, str((objective, features)))) % len(prices)]
        return dataclasses.replace(head_cost(objective, features, signal), flops=price)

    limit = chance.choice((None, None, chance.randint(3_000, 12_000)))
    updates = {name: chance.randint(0, forward) for name, (forward, _) in amounts.items()}
    speed = chance.choice((1.0, 1.0, 2.0, 0.5, 1.7))
    return Charge(charged(graph, amounts), head, few(), speed, limit, updates, recompute)


@cache
def plan_at(cuts: tuple[str, ...], objectives: tuple[Objective, ...], recompute: bool) -> Plan | None:
    """What each stage trains, reads and takes with these cuts; its costs are not looked at."""
    graph, candidates = captured()
    try:
        charges = (Charge(graph, recompute=recompute),) * (len(cuts) + 1)
        return choose_cuts(graph, candidates, len(cuts) + 1, objectives, cut_at=cuts, charges=charges)
    except PartitionError:
        return None


class Brute:
    """Every combination of legal cuts, and each stage's cost from its definition."""

    def __init__(self, graph: Graph, candidates: Sequence[Candidate], objectives: Sequence[Objective]) -> None:
        self.graph = graph
        self.legal = [c for c in candidates if c.cut is not None]
        self.objectives = objectives

    def best(self, stages: Sequence[Charge]) -> Fraction | None:
        """The slowest stage of the best plan, in nanoseconds at speed 1; None if no plan is allowed."""
        found = []
        for cuts in itertools.combinations(self.legal, len(stages) - 1):
            plan = plan_at(tuple(cut.node for cut in cuts), tuple(self.objectives), stages[0].recompute)
            found.append(self.slowest(plan, stages) if plan is not None else None)
        return min((value for value in found if value is not None), default=None)

    def slowest(self, plan: Plan, stages: Sequence[Charge]) -> Fraction | None:
        costs = [self.cost(plan, index, charge) for index, charge in enumerate(stages)]
        limits = [charge.memory_limit for charge in stages]
        if any(limit and stage.memory_bytes > limit for stage, limit in zip(plan.stages, limits, strict=True)):
            return None
        return max(Fraction(cost) / Fraction(str(charge.speed)) for cost, charge in zip(costs, stages, strict=True))

    def cost(self, plan: Plan, index: int, charge: Charge) -> int:
        stage, measures = plan.stages[index], charge.graph.measures
        positions = {node.name: position for position, node in enumerate(self.graph.operations)}
        coupled = index > 0 and self.objectives[index - 1].name == "bp"
        start = positions[stage.nodes[0]]
        total = sum(measures[name].forward_flops for name in stage.nodes)
        if charge.recompute:  # the optimizer is part of the forward of some nodes, but does not run twice
            total += sum(measures[name].forward_flops - charge.updates[name] for name in stage.nodes)
        for name in stage.nodes:
            total += sum(cost for at, cost in measures[name].backward_flops if coupled or at >= start)
        if index == len(plan.cuts):
            return total + charge.criterion
        if self.objectives[index].name == "bp":
            return total
        cut = plan.cuts[index]
        specs = [dataclasses.replace(cut.spec(name), name="features") for name in cut.features]
        return total + charge.head(self.objectives[index], specs, self.graph.signal).flops


@MANY
@given(st.integers(0, 2**32), st.integers(1, 3), st.booleans())
def test_the_plan_is_the_optimum_of_what_was_measured(seed: int, n_stages: int, recompute: bool) -> None:
    """Law 6 with other costs than FLOPs, one charge per stage: devices of any speed, each with its own memory."""
    graph, candidates = captured()
    chance = random.Random(seed)
    objectives = [chance.choice(OBJECTIVES) for _ in range(n_stages - 1)]
    stages = [drawn_charge(graph, chance, recompute) for _ in range(n_stages)]
    brute = Brute(graph, candidates, objectives)
    best = brute.best(stages)
    if best is None:
        with pytest.raises(PartitionError, match="memory_limit="):
            choose_cuts(graph, candidates, n_stages, objectives, charges=stages)
        return
    assert brute.slowest(choose_cuts(graph, candidates, n_stages, objectives, charges=stages), stages) == best


def test_speeds_in_ratios_of_small_numbers_are_exact() -> None:
    assert slowness([2.0, 1.0, 0.5, 1.7], 2**20) == (17, 34, 68, 20)
    assert slowness([0.1, 0.3], 2**20) == (3, 1)
    assert slowness([7.3], 1) == (1,)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8), st.integers(1, 2**60))
@example([1.0005, 1.0], 2**60)
def test_slowness_is_never_above_what_there_is_room_for(speeds: list[float], most: int) -> None:
    """And in the ratio of the speeds, to a thousandth of a per cent where there is room for that."""
    factors = slowness(speeds, most)
    assert all(1 <= factor <= most for factor in factors)
    ratios = [Fraction(max(speeds)) / Fraction(speed) for speed in speeds]
    if most > 2**20 * max(ratios):
        least = min(factors)
        assert all(abs(factor / least / ratio - 1) < 1e-5 for factor, ratio in zip(factors, ratios, strict=True))


def test_given_nanoseconds_move_the_cut() -> None:
    """By hand: five layers of which the first takes as long as the four others together."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)], nn.Linear(8, 3))
    graph = autodecouple.capture(model, (torch.randn(4, 8),))
    found = find_cuts(graph)
    amounts: dict[str, Amount] = {
        node.name: (0 if "tanh" in node.name else 400 if node.name == "linear" else 100, ())
        for node in graph.operations
    }

    def free(objective: Objective, features: Sequence[TensorSpec], signal: TensorSpec) -> HeadCost:
        return HeadCost(0, 0, 0)

    charge = Charge(charged(graph, amounts), free)
    plan = choose_cuts(graph, found, 2, OBJECTIVES[:1], charges=[charge] * 2)
    assert plan.cuts[0].after == "tanh" and plan.stages[1].nodes[0] == "linear_1"
    fast = dataclasses.replace(charge, speed=3.0)  # 600 / 3 against 200
    plan = choose_cuts(graph, found, 2, OBJECTIVES[:1], charges=[fast, charge])
    assert plan.cuts[0].after == "tanh_2"


# --- devices of unlike speed and memory -------------------------------------------------------------------------------


def test_a_slow_lane_gets_less() -> None:
    graph, _ = captured()
    even = autodecouple.plan(graph, n_stages=2, loss=OBJECTIVES[0], devices=["cpu"] * 2)
    plan = autodecouple.plan(graph, n_stages=2, loss=OBJECTIVES[0], devices=[Device("cpu", speed=0.2), "cpu"])
    assert plan.stages[0].flops < even.stages[0].flops
    assert [stage.speed for stage in plan.stages] == [0.2, 1.0] and "0: cpu x 0.2" in str(plan)
    assert plan.costs == (plan.stages[0].flops / 0.2, plan.stages[1].flops)
    assert Plan.from_json(plan.to_json()) == plan
    spans = autodecouple.simulate(plan, batches=1).spans
    first = next(span for span in spans if str(span.action) == "0F0")
    assert first.seconds == pytest.approx(plan.stages[0].forward_flops / 0.2e12)


def test_a_speed_multiplies_what_was_measured() -> None:
    graph, _ = captured()
    plan = autodecouple.plan(graph, n_stages=2, devices=[Device("cpu", speed=1e-3), "cpu"], cost="measured")
    assert len(plan.stages[0].nodes) < len(plan.stages[1].nodes)
    assert plan.costs[0] > plan.costs[1]


def test_each_lane_keeps_within_its_own_memory() -> None:
    graph, _ = captured()
    free = autodecouple.plan(graph, n_stages=2, devices=["cpu"] * 2)
    limit = free.stages[1].memory_bytes - 1
    plan = autodecouple.plan(graph, n_stages=2, devices=["cpu", Device("cpu", memory_limit=limit)])
    assert plan.stages[1].memory_bytes <= limit
    with pytest.raises(PartitionError, match="memory_limit=10 bytes"):
        autodecouple.plan(graph, n_stages=2, devices=["cpu", Device("cpu", memory_limit=10)])


def test_stages_that_share_lanes_share_their_memory() -> None:
    graph, _ = captured()
    largest = max(s.memory_bytes for s in autodecouple.plan(graph, n_stages=3, devices=["cpu"] * 3).stages)
    with pytest.raises(PartitionError, match="no run of stages fits the lanes' memory limits"):
        autodecouple.plan(graph, n_stages=3, devices=[Device("cpu", memory_limit=largest)] * 2)


@MANY
@given(st.data(), st.integers(1, 6), st.integers(1, 4))
def test_runs_of_stages_on_unlike_lanes_are_optimal(data: st.DataObject, n_stages: int, num_lanes: int) -> None:
    """Any cost of every stage on every lane, any memory: the slowest lane of all contiguous runs is the fastest."""
    few = st.integers(0, 9)
    plan = make_plan([0] * n_stages)
    stages = tuple(dataclasses.replace(stage, step_bytes=data.draw(few)) for stage in plan.stages)
    plan = dataclasses.replace(plan, stages=stages)
    costs = [[data.draw(few) for _ in range(n_stages)] for _ in range(num_lanes)]
    devices = [Device("cpu", memory_limit=data.draw(st.none() | st.integers(1, 25))) for _ in range(num_lanes)]
    lanes = min(n_stages, num_lanes)
    values = []
    for ends in itertools.combinations(range(1, n_stages), lanes - 1):
        runs = [range(a, b) for a, b in itertools.pairwise((0, *ends, n_stages))]
        limits = [device.memory_limit or 10**9 for device in devices]
        if all(sum(stages[k].step_bytes for k in run) <= limit for run, limit in zip(runs, limits, strict=False)):
            values.append(max(sum(costs[lane][k] for k in run) for lane, run in enumerate(runs)))
    if not values:
        with pytest.raises(PartitionError, match="no run of stages fits"):
            assign_lanes(plan, devices, costs=costs)
        return
    placed = assign_lanes(plan, devices, costs=costs)
    assert max(sum(costs[lane][k] for k in run) for lane, run in enumerate(placed.lanes)) == min(values)


@pytest.mark.parametrize("wrong", [{"speed": 0.0}, {"speed": -1.0}, {"speed": float("inf")}, {"memory_limit": 0}])
def test_devices_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        autodecouple.Device("cpu", **wrong)


@pytest.mark.parametrize("num_bytes, seconds", [(0, 0.5), (100, 0.6), (1000, 1.5)])
def test_a_link_takes_its_latency_and_its_bytes(num_bytes: int, seconds: float) -> None:
    assert Link(1000.0, 0.5).seconds(num_bytes) == pytest.approx(seconds)
