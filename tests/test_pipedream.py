"""PipeDream: exactly the staleness that it says, in time and in weights, and the same on every executor."""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_tools import run_ranks
from torch import Tensor, nn
from torch.func import functional_call
from training_tools import (
    Batch,
    Result,
    assert_same,
    before_actions,
    comparable,
    compiled,
    delays,
    hold_until,
    make_batches,
    make_model,
    sgd,
    train,
)

import autodecouple
from autodecouple import schedules, simulator
from autodecouple.cli import main
from autodecouple.cost import TableCost
from autodecouple.decoupled import Decoupled
from autodecouple.errors import InputError, NonFiniteLossError, PartitionError, ScheduleError
from autodecouple.executors.job import Job
from autodecouple.plans import Plan
from autodecouple.schedules import Action, Op, PipeDream, Program
from autodecouple.stashing import StashingStage
from autodecouple.timeline import Span, Timeline
from tests.plan_strategies import costs, make_plan, plans

torch.set_num_threads(1)
pytestmark = pytest.mark.timeout(120)
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


# --- time ----------------------------------------------------------------------------------------------------------


def spelled(timeline: Timeline) -> list[str]:
    """What each lane does, losses and updates left out."""
    lanes = [[span for span in timeline.spans if span.lane == lane] for lane in range(timeline.num_lanes)]
    return [" ".join(f"{s.action.op}{s.batch}" for s in spans if s.action.op in "FB") for spans in lanes]


def test_the_orders_written_out() -> None:
    """Of the paper's figure: as many forwards as there are stages to the end, then one of each; in the end the rest."""
    cost = TableCost({(k, op): {"F": 1.0, "B": 2.0}.get(op, 0.0) for k in range(3) for op in Op})
    assert spelled(simulator.run(make_plan([0, 1, 2], detached=False), PipeDream(), cost, 5)) == [
        "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4",
    ]


@st.composite
def simulations(draw: st.DrawFn) -> tuple[Plan, TableCost, int, Timeline]:
    plan = draw(plans(detached=False))
    cost, batches = draw(costs(plan)), draw(st.integers(1, 9))
    timeline = simulator.run(plan, PipeDream(queue_depth=draw(st.integers(1, 3))), cost, batches)
    return plan, cost, batches, timeline


Simulation = tuple[Plan, TableCost, int, Timeline]


@given(simulations())
def test_every_wait_is_kept_and_all_is_done_once(case: Simulation) -> None:
    """Activations come from the stage before, gradients from the one behind, and each takes its way's time."""
    plan, cost, batches, timeline = case
    last = len(plan.stages) - 1
    done = {(str(span.action), span.batch): span for span in timeline.spans}
    expected = {f"{k}{op}" for k in range(last + 1) for op in ("F0", "B0", "U")} | {f"{last}L"}
    assert len(done) == len(timeline.spans)
    assert set(done) == {(action, batch) for action in expected for batch in range(batches)}

    def after(span: Span, name: str, cut: int | None = None) -> bool:
        source = done[name, span.batch]
        away = cut is not None and source.lane != span.lane
        return source.stop + (cost.transfers[cut] if away and cut is not None else 0.0) <= span.start

    for span in timeline.spans:
        k = span.action.stage
        match span.action.op:
            case Op.FORWARD:
                assert k == 0 or after(span, f"{k - 1}F0", k - 1)
            case Op.LOSS:
                assert after(span, f"{k}F0")
            case Op.BACKWARD:
                assert after(span, f"{k}F0")
                assert after(span, f"{k}L") if k == last else after(span, f"{k + 1}B0", k)
            case Op.UPDATE:
                assert after(span, f"{k}B0")


@given(simulations())
def test_a_batch_finds_exactly_the_updates_that_the_plan_says(case: Simulation) -> None:
    """With batch t, stage k of K has been updated t - (K-1-k) times; at most K-k batches are under way in it."""
    plan, _, _, timeline = case
    count = len(plan.stages)
    for k in range(count):
        forwards = updates = backwards = 0
        for span in timeline.spans:
            if span.action.stage != k:
                continue
            if span.action.op is Op.FORWARD:
                assert (span.batch, updates) == (forwards, max(0, forwards - (count - 1 - k)))
                forwards += 1
            backwards += span.action.op is Op.BACKWARD
            updates += span.action.op is Op.UPDATE
            assert 0 <= forwards - backwards <= count - k
    assert plan.staleness == (0,) * count  # which the plan does not know yet
    assert schedules.placed(plan, PipeDream()).staleness == tuple(range(count - 1, -1, -1))


@given(simulations())
def test_lanes_do_one_thing_at_a_time_and_never_idle_without_a_reason(case: Simulation) -> None:
    _, cost, _, timeline = case
    stops = {span.stop for span in timeline.spans}
    for lane in range(timeline.num_lanes):
        free = 0.0
        for span in (span for span in timeline.spans if span.lane == lane):
            assert free <= span.start
            arrivals = {stop + way for stop in stops for way in (0.0, *cost.transfers)}
            assert span.start in {0.0, free} | arrivals
            free = span.stop


@given(plans(detached=False), st.data(), st.integers(1, 60))
def test_a_batch_takes_what_the_slowest_lane_takes(plan: Plan, data: st.DataObject, batches: int) -> None:
    """No bubble but filling and draining, however unequal the stages are and however long the run is.

    It said that twice the batches take exactly the slowest lane's time longer. Where two lanes are all but equal (15
    and 14), the pipeline still settles after that many batches: the first half took one second more than its share.
    """
    cost = data.draw(costs(plan, transfers=False))
    timeline = simulator.run(plan, PipeDream(3), cost, batches)
    slowest = max(simulator.run(plan, PipeDream(3), cost, 1).busy)
    assert batches * slowest <= timeline.makespan <= (batches + len(plan.stages) - 1) * slowest


def test_it_is_faster_than_schedules_with_a_flush() -> None:
    cost = TableCost({(k, op): {"F": 1.0, "B": 2.0}.get(op, 0.0) for k in range(4) for op in Op})
    plan = make_plan([0, 1, 2, 3], detached=False)
    assert autodecouple.simulate(plan, "pipedream", 100, cost).makespan == 3 * 100 + 3 * 3  # 3 (K-1) to fill and drain
    assert autodecouple.simulate(plan, "sequential", 100, cost).makespan == 4 * 3 * 100


# --- what is said about it -----------------------------------------------------------------------------------------


def test_the_plan_says_what_is_stale_and_counts_it() -> None:
    graph = autodecouple.capture(make_model("plain"), make_batches("plain", [8])[0][0])
    asked: dict[str, Any] = {"n_stages": 4, "loss": "bp", "devices": ["cpu"] * 4}
    plain = autodecouple.plan(graph, **asked)
    plan = autodecouple.plan(graph, schedule="pipedream", **asked)
    assert plan.staleness == (3, 2, 1, 0) and [stage.versions for stage in plan.stages] == [4, 3, 2, 1]
    assert "lack the last 3, 2, 1, 0 updates" in str(plan) and "updates" not in str(plain)
    assert "at most" in str(plain) and "at most" not in str(plan)
    assert Plan.from_json(plan.to_json()) == plan
    for before, after in zip(plain.stages, plan.stages, strict=True):
        versions = 4 - after.index
        more = versions * after.parameter_bytes + (versions - 1) * after.activation_bytes
        assert after.memory_bytes - before.memory_bytes == (more if versions > 1 else 0)
    limit = max(stage.memory_bytes for stage in plain.stages)
    with pytest.raises(PartitionError, match=r'stage \d would take .* "1f1b"|recompute'):
        autodecouple.plan(graph, schedule="pipedream", memory_limit=limit, **asked)
    asked["devices"] = [autodecouple.Device("cpu", memory_limit=plan.stages[0].memory_bytes - 1), "cpu", "cpu", "cpu"]
    with pytest.raises(PartitionError, match=r"stage 0 would take"):
        autodecouple.plan(graph, schedule="pipedream", **asked)
    assert autodecouple.plan(graph, **asked) == dataclasses.replace(plain, warnings=())


def test_timelines_say_it_predicted_and_measured() -> None:
    with compiled("plain", 4, "bp", schedule="pipedream", executor="streams") as decoupled:
        for x, y in make_batches("plain", [8] * 6):
            decoupled.train_step(x, y)
        assert decoupled.timeline.staleness == {0: 3, 1: 2, 2: 1, 3: 0}
        predicted = autodecouple.simulate(decoupled.plan, "pipedream", 6)
    assert predicted.staleness == {0: 3, 1: 2, 2: 1, 3: 0}
    assert "weights up to 3 updates old" in str(predicted)
    assert set(autodecouple.simulate(make_plan([0, 1, 2]), "streaming", 6).staleness.values()) == {0}


def test_the_command_line_says_it(tmp_path: Path) -> None:
    tiny = "from torch import nn\n\n\ndef make():\n    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))\n"
    (tmp_path / "tiny.py").write_text(tiny)
    options = ["--input", "8x4", "--stages", "3", "--loss", "bp", "--devices", "cpu,cpu,cpu"]
    found = CliRunner().invoke(main, ["inspect", f"{tmp_path}/tiny.py:make", *options, "--schedule", "pipedream"])
    assert found.exit_code == 0 and "lack the last 2, 1, 0 updates" in found.output


def test_a_plan_is_what_the_schedule_in_force_makes_of_it() -> None:
    """Of a plan that is given back only cuts and lanes count; another number of stages is as stale as that number."""
    with compiled("plain", 4, "bp", schedule="pipedream", executor="inline") as decoupled:
        for x, y in make_batches("plain", [8] * 6):
            decoupled.train_step(x, y)
        given = Plan.from_json(decoupled.plan.to_json())
        assert decoupled.replan(3).staleness == (2, 1, 0)
        decoupled.train_step(x, y)
        decoupled.to("cpu").train_step(x, y)
    with compiled("plain", 4, "bp", plan=given, schedule="1f1b") as decoupled:
        assert decoupled.plan.staleness == (0, 0, 0, 0)
        assert not any(isinstance(stage, StashingStage) for stage in decoupled.stages)


# --- weights -------------------------------------------------------------------------------------------------------


def by_hand(
    cuts: Sequence[str], optimizer: Optimizer, batches: Sequence[Batch], waits: Collection[int] = ()
) -> tuple[dict[str, Tensor], list[float]]:
    """The paper's rule in plain autograd, one batch at a time and nothing streamed.

    The gradient of batch t, of the whole network at the weights that stage k had after t - (K-1-k) updates, is what
    updates its present weights. waits: batches after which the caller waits, so that all updates are known from there
    """
    model = make_model("plain").train()
    ends = [0, *(int(name.split(".")[0]) + 1 for name in cuts), len(model)]
    stages = [model[a:b] for a, b in pairwise(ends)]
    optimizers = [optimizer(list(stage.parameters())) for stage in stages]
    history = [[copy.deepcopy(dict(stage.named_parameters()))] for stage in stages]
    losses, begin = [], 0
    for t, (x, y) in enumerate(batches):
        used = [history[k][max(begin, t - (len(stages) - 1 - k))] for k in range(len(stages))]
        h = x
        for stage, weights in zip(stages, used, strict=True):
            h = functional_call(stage, weights, (h,))
        loss = nn.functional.cross_entropy(h, y)
        for stage, weights, one, known in zip(stages, used, optimizers, history, strict=True):
            gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
            for parameter, gradient in zip(stage.parameters(), gradients, strict=True):
                parameter.grad = gradient
            one.step()
            known.append(copy.deepcopy(dict(stage.named_parameters())))
        losses.append(loss.item())
        begin = t + 1 if t in waits else begin
    return dict(model.state_dict()), losses


def train_waiting(decoupled: Decoupled, batches: Sequence[Batch], waits: Collection[int]) -> Result:
    with decoupled:
        steps = []
        for t, (x, y) in enumerate(batches):
            steps.append(decoupled.train_step(x, y))
            if t in waits:
                decoupled.synchronize()
        state = comparable(decoupled.state_dict())
        return Result([step.losses for step in steps], [step.output for step in steps], state)


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize(("n_stages", "waits"), [(2, ()), (4, ()), (4, (1, 6))])
def test_it_is_the_rule_of_the_paper(optimizer: Optimizer, n_stages: int, waits: Collection[int]) -> None:
    batches = make_batches("plain", [8, 8, 7, 2, 8, 8, 5, 8, 8, 1])
    decoupled = compiled("plain", n_stages, "bp", schedule="pipedream", executor="inline", optimizer=optimizer)
    weights, losses = by_hand([cut.module for cut in decoupled.plan.cuts], optimizer, batches, waits)
    found = train_waiting(decoupled, batches, waits)
    assert [step[-1] for step in found.losses] == pytest.approx(losses, rel=1e-12)
    for name, value in weights.items():
        torch.testing.assert_close(found.state["model"][name], value, rtol=1e-12, atol=1e-12)


def test_one_stage_is_backprop() -> None:
    batches = make_batches("plain", [8, 8, 3, 8])
    model, losses = make_model("plain"), []
    optimizer = adam(list(model.parameters()))
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.item(),))
    found = train(compiled("plain", 1, "bp", schedule="pipedream", optimizer=adam), batches)
    assert found.losses == losses
    assert_same(found.state["model"], dict(model.state_dict()))


def test_several_stages_are_not_backprop() -> None:
    """Else the tests here could not tell."""
    batches = make_batches("plain", [8] * 4)
    found = [train(compiled("plain", 3, "bp", schedule=name), batches) for name in ("pipedream", "sequential")]
    names = [f"{index}.0.weight" for index in (0, 2)]
    assert not any(torch.equal(*(each.state["model"][name] for each in found)) for name in names)


CASES: dict[str, dict[str, Any]] = {
    "a lane per stage": {"n_stages": 4},
    "two stages per lane": {"n_stages": 4, "lanes": 2},
    "one lane": {"n_stages": 3, "lanes": 1},
    "recompute": {"n_stages": 4, "recompute": True},
    "accumulate": {"n_stages": 4, "accumulate": 3},
    "clip, and a schedule of rates": {
        "n_stages": 5,
        "clip_grad_norm": 0.5,
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
    },
    "a shallow queue": {"n_stages": 5, "schedule": PipeDream(queue_depth=1)},
}


QUICK = ("a lane per stage", "recompute", "accumulate")


@pytest.mark.parametrize(
    "case", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in CASES]
)
def test_threads_equal_one_thread(case: str) -> None:
    """Dropout, BatchNorm, a smaller last batch, and the caller who waits in between."""
    options = {"schedule": "pipedream", "optimizer": adam, **CASES[case]}
    batches, waits = make_batches("dropout", [8] * 9 + [3]), (5,)
    inline = train_waiting(compiled("dropout", loss="bp", executor="inline", **options), batches, waits)
    with delays(3):
        streams = train_waiting(compiled("dropout", loss="bp", executor="streams", **options), batches, waits)
    assert_same(inline, streams)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    n_stages=st.integers(1, 6),
    lanes=st.integers(1, 6),
    depth=st.integers(1, 3),
    waits=st.sets(st.integers(0, 11), max_size=3),
    recompute=st.booleans(),
    accumulate=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_threads_equal_one_thread_always(
    n_stages: int, lanes: int, depth: int, waits: set[int], recompute: bool, accumulate: int, seed: int
) -> None:
    options = {"schedule": PipeDream(depth), "recompute": recompute, "accumulate": accumulate}
    options |= {"optimizer": adam, "lanes": min(lanes, n_stages)}
    batches = make_batches("dropout", [6] * 12)
    inline = train_waiting(compiled("dropout", n_stages, "bp", executor="inline", **options), batches, waits)
    with delays(seed):
        streams = train_waiting(compiled("dropout", n_stages, "bp", executor="streams", **options), batches, waits)
    assert_same(inline, streams)


def test_recomputing_changes_nothing() -> None:
    batches = make_batches("dropout", [8] * 7)
    found = [
        train(compiled("dropout", 4, "bp", schedule="pipedream", recompute=again), batches) for again in (False, True)
    ]
    assert_same(found[0], found[1])


@pytest.mark.parametrize("executor", ["inline", "streams"])
def test_never_more_versions_than_stages_to_the_end(executor: str) -> None:
    most: dict[int, int] = {}

    def count(job: Job, action: Action) -> None:
        stage = decoupled.stages[action.stage]
        if isinstance(stage, StashingStage):
            most[action.stage] = max(stage.versions, most.get(action.stage, 0))

    with compiled("plain", 4, "bp", schedule="pipedream", executor=executor) as decoupled, before_actions(count):
        for x, y in make_batches("plain", [8] * 12):
            decoupled.train_step(x, y)
        decoupled.synchronize()
        assert [getattr(stage, "versions", 0) for stage in decoupled.stages] == [0, 0, 0, 0]
    assert most == {0: 4, 1: 3, 2: 2}


@pytest.mark.parametrize("executor", ["inline", "streams"])
def test_reading_a_step_does_not_end_the_stream(executor: str) -> None:
    """The last stage knows losses and output at once; were all stages waited for, their weights would be others."""
    batches = make_batches("dropout", [8] * 8)
    unread = train(compiled("dropout", 4, "bp", schedule="pipedream", executor=executor), batches)
    with compiled("dropout", 4, "bp", schedule="pipedream", executor=executor) as decoupled:
        losses = []
        for x, y in batches:
            step = decoupled.train_step(x, y)
            assert torch.isfinite(step.output).all()
            losses.append(step.losses)
        assert_same(losses, unread.losses)
        assert_same(comparable(decoupled.state_dict()), unread.state)


def test_who_waits_ends_the_stream_even_if_a_batch_comes_meanwhile() -> None:
    """As after Ctrl-C in a wait: where the stream ends does not depend on how far the lanes have come."""
    batches = make_batches("plain", [8] * 8)
    expected = train_waiting(compiled("plain", 3, "bp", schedule="pipedream", executor="inline"), batches, (3,))
    go = threading.Event()
    options: dict[str, Any] = {"schedule": PipeDream(queue_depth=9), "executor": "streams"}
    with compiled("plain", 3, "bp", **options) as decoupled, before_actions(hold_until(go)):
        for x, y in batches[:4]:
            decoupled.train_step(x, y)
        board = decoupled._compiled.executor._board  # type: ignore[attr-defined]
        waiting = threading.Thread(target=decoupled.synchronize)
        waiting.start()
        while board._waited_for < 3:
            time.sleep(0.001)
        for x, y in batches[4:]:
            decoupled.train_step(x, y)
        go.set()
        waiting.join(60)
        assert_same(comparable(decoupled.state_dict()), expected.state)


def test_a_saved_state_goes_on_to_the_bit() -> None:
    """Saving waits for all batches, in the run that is saved as well."""
    batches = make_batches("dropout", [8] * 8)
    through = train_waiting(compiled("dropout", 4, "bp", schedule="pipedream"), batches, (3,))
    with compiled("dropout", 4, "bp", schedule="pipedream") as first:
        for x, y in batches[:4]:
            first.train_step(x, y)
        state = first.state_dict()
    with compiled("dropout", 4, "bp", schedule="pipedream", executor="inline") as second:
        second.load_state_dict(state)
        for x, y in batches[4:]:
            second.train_step(x, y)
        assert_same(comparable(second.state_dict()), through.state)


def test_weights_that_are_set_between_two_batches_count() -> None:
    with compiled("plain", 3, "bp", schedule="pipedream", executor="inline") as decoupled:
        (x, y), *_ = make_batches("plain", [8])
        decoupled.train_step(x, y)
        with torch.no_grad():
            for parameter in decoupled.model.parameters():
                parameter.zero_()
        assert decoupled.train_step(x, y).losses[-1] == pytest.approx(torch.tensor(4.0).log().item())


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return 2 * gradient @ weight.T, 2 * x.T @ gradient


class Product(nn.Module):
    """Runs whole where no graph can hold its function, and then reads its parameter of its own accord."""

    def __init__(self, runs_whole: bool) -> None:
        super().__init__()
        self.runs_whole = runs_whole
        self.weight = nn.Parameter(torch.eye(6, dtype=torch.float64) / 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Doubled.apply(x, self.weight) if self.runs_whole else 2 * x @ self.weight
        return y


def test_modules_that_run_whole_have_versions_too() -> None:
    """As where the same product is an operation of the graph."""
    x, y = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4
    found = []
    for runs_whole in (True, False):
        torch.manual_seed(0)
        linear = [nn.Linear(6, size).double() for size in (6, 6, 4)]
        model = nn.Sequential(linear[0], Product(runs_whole), nn.Tanh(), linear[1], nn.Tanh(), linear[2])
        options: dict[str, Any] = {"schedule": "pipedream", "devices": ["cpu"] * 3, "optimizer": sgd}
        with autodecouple.compile(model, 3, "bp", example_inputs=x, cut_at=["2", "4"], **options) as decoupled:
            for i in range(8):
                decoupled.train_step(x + i, y)
            first = decoupled.stages[0]
            assert isinstance(first, StashingStage) and len(first._whole.leaves) == runs_whole
            found.append(dict(decoupled.model.named_parameters()))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-12)
    assert not torch.equal(found[0]["1.weight"], Product(True).weight)


# --- where it ends -------------------------------------------------------------------------------------------------


def failing(stage: int, op: Op, batch: int) -> Callable[[Job, Action], None]:
    def fail(job: Job, action: Action) -> None:
        if (action.stage, action.op, job.index) == (stage, op, batch):
            raise RuntimeError(f"planted in {action}")

    return fail


@pytest.mark.parametrize(("stage", "op"), [(0, Op.FORWARD), (1, Op.BACKWARD), (3, Op.LOSS), (0, Op.UPDATE)])
@pytest.mark.parametrize("executor", ["inline", "streams"])
def test_an_error_leaves_older_batches_trained(stage: int, op: Op, executor: str) -> None:
    """On the stage that failed exactly the batches before are trained, and training goes on from there."""
    batches = make_batches("plain", [8] * 10)
    options: dict[str, Any] = {"schedule": "pipedream", "executor": executor, "optimizer": sgd}
    expected = train(compiled("plain", 4, "bp", **options), batches[:4])
    decoupled = compiled("plain", 4, "bp", **options)
    with before_actions(failing(stage, op, 4)), pytest.raises(RuntimeError, match="planted") as caught:
        for x, y in batches:
            decoupled.train_step(x, y)
        decoupled.synchronize()
    assert f"of stage {stage} of 4" in "".join(caught.value.__notes__)
    names = [name for name, home in _homes(decoupled).items() if home == stage]
    found = dict(decoupled.model.named_parameters())
    assert names
    for name in names:
        assert torch.equal(found[name], expected.state["model"][name])
    decoupled.train_step(*batches[0])
    decoupled.close()


def _homes(decoupled: Decoupled) -> dict[str, int]:
    named = {id(parameter): name for name, parameter in decoupled.model.named_parameters()}
    return {named[id(p)]: stage.index for stage in decoupled.stages for p in stage.parameters}


@pytest.mark.parametrize("executor", ["inline", "streams"])
def test_a_batch_that_is_skipped_leaves_nothing_behind(executor: str) -> None:
    """Neither in weights nor, though younger batches are under way, in the statistics of BatchNorm."""
    batches = make_batches("norm", [8] * 9)
    spoiled = [(x * torch.nan if t == 3 else x, y) for t, (x, y) in enumerate(batches)]
    options: dict[str, Any] = {"schedule": "pipedream", "on_nonfinite": "skip", "executor": executor}
    found = train(compiled("norm", 4, "bp", **options), spoiled)
    assert all(torch.isfinite(value).all() for value in found.state["model"].values())
    assert [stage["skipped"] for stage in found.state["stages"]] == [1, 1, 1, 1]
    assert [step[-1] is not None and step[-1] == step[-1] for step in found.losses] == [t != 3 for t in range(9)]


def test_a_batch_that_is_skipped_leaves_an_accumulation_alone() -> None:
    """Batches 0 and 2 make the one update that there is, at the weights of the beginning."""
    batches = make_batches("plain", [8] * 3)
    model = make_model("plain")
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for x, y in batches[::2]:
        gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
        expected = [value - 0.1 * gradient / 2 for value, gradient in zip(expected, gradients, strict=True)]
    spoiled = [(x * torch.nan if t == 1 else x, y) for t, (x, y) in enumerate(batches)]
    options: dict[str, Any] = {"on_nonfinite": "skip", "accumulate": 2, "executor": "inline"}
    options["optimizer"] = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    found = train(compiled("plain", 3, "bp", schedule="pipedream", **options), spoiled).state["model"]
    for (name, _), value in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("executor", ["inline", "streams"])
def test_a_loss_that_is_not_finite_is_raised(executor: str) -> None:
    batches = make_batches("norm", [8] * 6)
    with compiled("norm", 4, "bp", schedule="pipedream", executor=executor) as decoupled:
        with pytest.raises(NonFiniteLossError):
            for t, (x, y) in enumerate(batches):
                decoupled.train_step(x * torch.nan if t == 2 else x, y)
            decoupled.synchronize()
        assert all(torch.isfinite(value).all() for value in decoupled.model.state_dict().values())


@pytest.mark.parametrize("executor", ["inline", "streams"])
def test_leaving_by_an_error_of_the_loop_ends_at_once(executor: str) -> None:
    with pytest.raises(ZeroDivisionError), compiled("plain", 4, "bp", schedule="pipedream", executor=executor) as it:
        steps = [it.train_step(x, y) for x, y in make_batches("plain", [8] * 3)]
        assert steps[-1].losses[-1] is not None
        raise ZeroDivisionError


def test_what_cannot_hold_several_batches_is_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match='"processes" do not hold: take executor="streams"'):
        compiled("plain", 2, "bp", schedule="pipedream", executor="processes")
    with pytest.raises(InputError, match='take backend="eager"'):
        compiled("plain", 2, "bp", schedule="pipedream", backend="compile")
    with pytest.raises(ScheduleError, match='PipeDream is for coupled stages.*loss="bp"'):
        compiled("plain", 2, "supcon", schedule="pipedream")
    with pytest.raises(ScheduleError, match="queue_depth=0"):
        PipeDream(queue_depth=0)


def test_other_programs_lag_nowhere() -> None:
    plan = make_plan([0, 1, 2], detached=False)
    assert Program(plan, schedules.resolve("1f1b")).lags == {}
    lags = Program(plan, PipeDream()).lags
    assert {str(action): lag for action, lag in lags.items() if lag} == {"0B0": 2, "0U": 2, "1B0": 1, "1U": 1}
    assert dataclasses.replace(PipeDream(), queue_depth=3).num_micro_batches == 1


# --- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "n_stages"),
    [(3, 3), pytest.param(2, 4, marks=pytest.mark.slow), pytest.param(4, 4, marks=pytest.mark.slow)],
)
def test_ranks_equal_one_thread(ranks: int, n_stages: int) -> None:
    batches, waits = make_batches("dropout", [8] * 8 + [3]), (4,)
    options: dict[str, Any] = {"schedule": "pipedream", "optimizer": adam, "lanes": ranks}
    inline = train_waiting(compiled("dropout", n_stages, "bp", executor="inline", **options), batches, waits)

    def rank(number: int) -> Result:
        own = batches if number == 0 else [(None, None)] * len(batches)
        return train_waiting(compiled("dropout", n_stages, "bp", **options), own, waits)  # type: ignore[arg-type]

    outcomes = run_ranks(ranks, rank)
    assert [outcome.error for outcome in outcomes] == [None] * ranks, outcomes
    for outcome in outcomes:
        assert_same(outcome.value.state, inline.state)
    assert_same(outcomes[-1].value.losses, inline.losses)
    assert_same(outcomes[-1].value.outputs, inline.outputs)
