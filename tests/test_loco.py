"""LoCo: each loss trains its own stage and the one before, at the price of one stage's wait."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plan_strategies import make_plan, plans
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training_tools import Batch, assert_same, before_actions, compiled, delays, make_batches, make_model, sgd, train

import autodecouple
from autodecouple import simulator
from autodecouple.cost import FlopCost
from autodecouple.errors import InputError, NonFiniteLossError, PlanError, ScheduleError
from autodecouple.executors.job import Job
from autodecouple.objectives import Auto, Downstream, EarlyExit, InfoPro, LoCo, SupCon
from autodecouple.plans import Plan
from autodecouple.schedules import (
    GPipe,
    MicroBatched,
    OneFOneB,
    Program,
    Schedule,
    Sequential,
    Streaming,
    check,
)
from autodecouple.schedules.actions import Action, Op
from autodecouple.stage import Stage
from autodecouple.waits import periods

pytestmark = pytest.mark.filterwarnings("ignore:.*had no two rows of one class")

AFTER = ("0", "2", "4")
CHAIN = make_plan([0, 1, 2, 3], overlaps=True, returning=0.5)
FIRST = LoCo(first=True)


def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


# ---------------------------------------------------------------- what plain autograd does


def pieces_of(kind: str) -> list[nn.Sequential]:
    """The model in four pieces, as `AFTER` cuts it."""
    blocks = list(make_model(kind).children())
    bounds = [0, 1, 3, 5, len(blocks)]
    return [nn.Sequential(*blocks[begin:end]) for begin, end in itertools.pairwise(bounds)]


def unit_losses(pieces: Sequence[nn.Module], tails: Sequence[Any], x: Tensor, y: Tensor) -> dict[int, Tensor]:
    """The loss at the top of every stage that has one, each with a forward of its own pair of stages: what came to the
    pair is a constant."""
    found = {}
    with torch.no_grad():
        entering = [x]
        for piece in pieces:
            entering.append(piece(entering[-1]))
    for top, tail in enumerate(tails):
        if tail is not None:
            bottom = max(0, top - 1)
            h = entering[bottom]
            for piece in pieces[bottom : top + 1]:
                h = piece(h)
            loss = tail(h, y)
            found[top] = loss[0] if isinstance(loss, tuple) else loss
    return found


def train_by_hand(
    pieces: Sequence[nn.Module], heads: Sequence[nn.Module | None], optimizer: Any, batches: Sequence[Batch]
) -> list[dict[int, float]]:
    """Pair after pair; gradients of the pairs that share a stage add up, and every stage has an optimizer."""
    tails = [*heads, nn.CrossEntropyLoss()]
    owned = [
        [*piece.parameters(), *(head.parameters() if head is not None else [])]
        for piece, head in zip(pieces, [*heads, None], strict=True)
    ]
    optimizers = [optimizer(parameters) for parameters in owned]
    history = []
    for x, y in batches:
        losses = unit_losses(pieces, tails, x, y)
        sum(losses.values()).backward()  # type: ignore[union-attr]
        for each in optimizers:
            each.step()
            each.zero_grad()
        history.append({top: loss.item() for top, loss in losses.items()})
    return history


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("loss", "optimizer"),
    [("loco", adam), (FIRST, sgd), slow("loco", sgd), slow(LoCo(SupCon(hidden=8, out=4)), adam), slow(FIRST, adam)],
)
def test_every_stage_is_trained_by_two_losses_as_by_hand(loss: Any, optimizer: Any) -> None:
    """In float64, to 1e-10 after ten batches, heads included."""
    batches = make_batches("plain", [8] * 8 + [3, 1])
    decoupled = compiled("plain", 4, loss, cut_at=AFTER, optimizer=optimizer, executor="inline")
    pieces, heads = pieces_of("plain"), [copy.deepcopy(stage.code.head) for stage in decoupled.stages[:-1]]
    assert [head is not None for head in heads] == [loss is FIRST, True, True]
    expected = train_by_hand(pieces, heads, optimizer, batches)
    found = train(decoupled, batches)
    for losses, by_hand in zip(found.losses, expected, strict=True):
        assert {k: loss for k, loss in enumerate(losses) if loss is not None} == pytest.approx(by_hand, rel=1e-10)
    weights = [value for piece in pieces for value in piece.state_dict().values()]
    for mine, value in zip(found.state["model"].values(), weights, strict=True):
        torch.testing.assert_close(mine, value, rtol=1e-10, atol=1e-10)
    for cut, head in zip(decoupled.plan.cuts, heads, strict=True):
        if head is not None:
            for name, value in head.state_dict().items():
                torch.testing.assert_close(found.state["heads"][cut.after][name], value, rtol=1e-10, atol=1e-10)


class Noted(torch.optim.SGD):
    """Keeps the gradients that it was given, and changes nothing."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=0.0)
        self.seen: list[Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        given = (parameter.grad for group in self.param_groups for parameter in group["params"])
        self.seen = [gradient.clone() for gradient in given if gradient is not None]


MIXED = [FIRST, "loco", "supcon", "loco", "bp"]


@pytest.mark.parametrize(
    ("loss", "executor"),
    [("loco", "streams"), (MIXED, "inline"), slow("loco", "inline"), slow(FIRST, "streams"), slow(MIXED, "streams")],
)
def test_a_loss_reaches_its_own_stage_and_the_one_before_and_no_other(loss: Any, executor: str) -> None:
    """Law 2, with the one exception that LoCo is: dL_j / dtheta_k is zero unless j is k or k+1."""
    ((x, y),) = make_batches("norm", [8])
    for top in range(6):
        decoupled = compiled("norm", 6, loss, optimizer=Noted, executor=executor)
        trains = {k for k in range(6) if top in decoupled.stages[k].loss_stages}
        for stage in decoupled.stages:
            if stage.run_head is not None and stage.index != top:
                stage.run_head = _silent(stage.run_head)
        with decoupled:
            decoupled.train_step(x, y)
            decoupled.synchronize()
            reached = {k for k in range(6) if any(g.abs().sum() > 0 for g in decoupled.stages[k].optimizer.seen)}
        assert reached == trains
        if not isinstance(loss, list):
            assert trains <= {top - 1, top} and (top == 0 or top in trains)


def _silent(head: Any) -> Any:
    """The head with a loss that says nothing."""

    def run(*args: Any, **kwargs: Any) -> Any:
        loss, signal = head(*args, **kwargs)
        return 0.0 * loss, signal

    return run


def test_two_stages_are_one_unit_and_that_is_backpropagation() -> None:
    batches = make_batches("norm", [8, 8, 3])
    expected = train(compiled("norm", 2, "bp", schedule="sequential"), batches)
    found = compiled("norm", 2, "loco", schedule="sequential")
    assert found.plan.stages[0].objective == "bp"
    assert_same(train(found, batches), expected)


# ---------------------------------------------------------------- law 3


@pytest.mark.parametrize(
    ("lanes", "schedule"),
    [
        (4, Streaming()),
        (3, MicroBatched(3)),
        slow(4, Streaming(queue_depth=1)),
        slow(3, Streaming(barrier=True)),
        slow(2, Streaming()),
    ],
)
def test_overlapping_stages_equal_one_after_the_other(lanes: int, schedule: Schedule) -> None:
    """With dropout and BatchNorm on, and every second action late."""
    batches = make_batches("dropout", [8, 8, 8, 3, 8, 2])
    reference = Sequential(num_micro_batches=schedule.num_micro_batches)
    options: dict[str, Any] = {"optimizer": adam, "accumulate": 2, "clip_grad_norm": 0.5}
    expected = train(compiled("dropout", 4, "loco", schedule=reference, executor="inline", **options), batches)
    with delays(4):
        found = train(compiled("dropout", 4, "loco", lanes=lanes, schedule=schedule, **options), batches)
    assert_same(found, expected)


def test_a_gradient_that_comes_before_the_own_backward_waits_for_the_weights() -> None:
    """A stage whose own backward is late finds the next one's gradient there, and must not take it for its own."""
    batches = make_batches("dropout", [8] * 4)
    expected = train(compiled("dropout", 4, "loco", schedule="sequential", optimizer=sgd), batches)

    def late(job: Job, action: Action) -> None:
        if action.op is Op.LOSS and action.stage == 1:
            later, until = Action(2, Op.BACKWARD, 0), time.monotonic() + 20
            while later not in job.done and time.monotonic() < until:
                time.sleep(0.001)

    with before_actions(late):
        found = train(compiled("dropout", 4, "loco", optimizer=sgd), batches)
    assert_same(found, expected)


@pytest.mark.parametrize("local", [Downstream(), "mixed", slow(Auto()), slow(InfoPro()), slow(SupCon())])
def test_any_local_objective_will_do(local: Any) -> None:
    loss = [FIRST, "associated", LoCo(SupCon())] if local == "mixed" else LoCo(local)
    batches = make_batches("norm", [8, 8, 3])
    expected = train(compiled("norm", 4, loss, schedule="sequential", optimizer=sgd), batches)
    assert_same(train(compiled("norm", 4, loss, optimizer=sgd), batches), expected)


def test_a_loss_that_is_not_finite_leaves_the_batch_out_of_both_its_stages() -> None:
    """Stage 2's loss is NaN: stages 1 and 2 stay as they were, and the others are trained."""
    ((x, y),) = make_batches("norm", [8])
    for schedule in ("sequential", "streaming"):
        decoupled = compiled("norm", 4, FIRST, on_nonfinite="skip", schedule=schedule, optimizer=sgd)
        _break(decoupled.stages[2])
        with decoupled:
            decoupled.train_step(x, y)
            decoupled.synchronize()
            assert [stage.skipped for stage in decoupled.stages] == [0, 1, 1, 0]
    decoupled = compiled("norm", 4, FIRST, schedule="sequential")
    _break(decoupled.stages[2])
    with decoupled, pytest.raises(NonFiniteLossError, match="loss of stage 2 is nan.*of stage 1 was updated"):
        decoupled.train_step(x, y)


def _break(stage: Stage) -> None:
    head = stage.run_head
    assert head is not None
    stage.run_head = lambda *args, **kwargs: (head(*args, **kwargs)[0] * torch.nan, args[-1])


# ---------------------------------------------------------------- the wait: in the dependencies


def test_the_order_written_out() -> None:
    lanes = [" ".join(map(str, lane)) for lane in Streaming()(CHAIN)]
    assert lanes == ["0F0 0L 0B0 0W0 0U", "1F0 1L 1B0 1W0 1U", "2F0 2L 2B0 2W0 2U", "3F0 3L 3B0 3W0 3U"]
    plan = make_plan([0, 1, 1], detached=[False, True], overlaps=[False, True])
    (order,) = Sequential()(plan)
    assert " ".join(map(str, order)) == "0F0 1F0 1L 1B0 0B0 0U 2F0 2L 2B0 1W0 1U 2W0 2U"


@given(plans(), st.integers(1, 3))
def test_an_update_waits_for_the_losses_that_train_its_stage_and_for_no_other(plan: Plan, micro: int) -> None:
    """What it waits for, and what that waits for, lanes aside: one hop, however many cuts overlap in a row."""
    program = Program(plan, MicroBatched(micro))
    last = len(plan.cuts)
    tops = {k: next(s for s in range(k, last + 1) if s == last or plan.cuts[s].detached) for k in range(last + 1)}
    for stage in range(last + 1):
        expected = {tops[stage]}
        if stage < last and plan.cuts[stage].overlaps:
            expected.add(tops[stage + 1])
        encoded = {k for k in range(last) if plan.cuts[k].encodes and k not in expected}
        reached, waiting = set[Action](), [Action(stage, Op.UPDATE)]
        while waiting:
            found = set(program.waits[waiting.pop()]) - reached
            reached |= found
            waiting += found
        assert {a.stage for a in reached if a.op is Op.LOSS} - encoded == expected


def test_weights_before_the_next_stages_gradient_are_a_deadlock_on_one_lane() -> None:
    plan = make_plan([0, 0], overlaps=True)
    order = tuple(map(Action.parse, ["0F0", "0L", "0B0", "0W0", "0U", "1F0", "1L", "1B0", "1W0", "1U"]))
    with pytest.raises(ScheduleError, match=r"0W0( waits|, which waits) for 1B0"):
        check((order,), plan)
    with pytest.raises(ScheduleError, match="0W0 is missing"):
        check((tuple(action for action in order if action.op is not Op.WEIGHT),), plan)


@pytest.mark.parametrize("schedule", [GPipe(), OneFOneB()])
def test_schedules_of_backpropagation_refuse_overlapping_cuts(schedule: Schedule) -> None:
    with pytest.raises(ScheduleError, match='detached; use schedule="micro_batched"'):
        compiled("plain", 4, "loco", schedule=schedule)


# ---------------------------------------------------------------- the wait: in time


@given(plans(one_stage_per_lane=True))
@settings(max_examples=40)
def test_streaming_tends_to_the_speedup_that_the_plan_says(plan: Plan) -> None:
    """By the simulator, which knows nothing of `periods`; but for waits for encoded signals, which LoCo has none of."""
    assume(any(cut.overlaps for cut in plan.cuts))
    plan = dataclasses.replace(plan, cuts=tuple(dataclasses.replace(cut, encodes=False) for cut in plan.cuts))
    cost = FlopCost(plan, flops_per_second=1.0)
    short, long = (simulator.run(plan, Streaming(), cost, count).makespan for count in (40, 60))
    assert (long - short) / 20 == pytest.approx(max(periods(plan)), rel=0.02)


def test_one_stage_waits_for_one_other_counted_by_hand() -> None:
    """F = L = B = W = 1: a batch is 4 seconds of work, and one more passes till the next stage has done its F L B. The
    last of 101 batches has four forwards, L, B and W before it."""
    plan = make_plan([0, 1, 2, 3], flops=[(1, 1, 2)] * 4, overlaps=True, returning=0.5)
    assert periods(plan) == (5, 5, 5, 4)
    assert plan.speedup == 16 / 5 and plan.balance == 1
    timeline = simulator.run(plan, Streaming(), FlopCost(plan, flops_per_second=1.0), 101)
    assert timeline.makespan == 100 * 5 + 7


def test_the_plan_says_what_the_wait_costs() -> None:
    decoupled = compiled("norm", 4, "loco")
    plan = decoupled.plan
    decoupled.close()
    text = " ".join(str(plan).split())
    assert "overlaps: the gradient of the next stage's own loss comes back" in text
    assert "overlapping stages: each but the last is updated when the next one's loss has sent its gradient" in text
    assert (
        f"predicted speedup {plan.speedup:.2f}x" in text
        and f"would be {sum(plan.costs) / max(plan.costs):.2f}x" in text
    )
    assert plan.speedup < sum(plan.costs) / max(plan.costs)
    assert Plan.from_json(plan.to_json()) == plan
    assert [cut.tie for cut in plan.cuts] == ["coupled", "overlapping", "overlapping"]
    found = autodecouple.simulate(plan, schedule="streaming", batches=64)
    alone = autodecouple.simulate(plan, schedule="sequential", batches=64)
    assert alone.makespan / found.makespan == pytest.approx(plan.speedup, rel=0.05)


# ---------------------------------------------------------------- what it costs


def test_flops_are_those_that_training_takes() -> None:
    """Of every action, as torch counts them while the stages run: the gradient that goes back is charged."""
    with compiled("norm", 4, FIRST, schedule="sequential", optimizer=sgd) as decoupled:
        counted: defaultdict[tuple[int, Op], int] = defaultdict(int)
        perform = Job.perform

        def counting(job: Job, action: Action, stage: Any, queue: Any) -> None:
            with FlopCounterMode(display=False) as counter:
                perform(job, action, stage, queue)
            counted[action.stage, action.op] += counter.get_total_flops()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Job, "perform", counting)
            decoupled.train_step(*make_batches("norm", [8])[0])
        for stage in decoupled.plan.stages:
            k = stage.index
            assert counted[k, Op.FORWARD] == stage.forward_flops
            assert counted[k, Op.BACKWARD] == pytest.approx(stage.returning * stage.backward_flops)
            assert counted[k, Op.WEIGHT] == pytest.approx((1 - stage.returning) * stage.backward_flops)
            assert (stage.returning > 0) == (k > 0)


# ---------------------------------------------------------------- errors


def test_what_cannot_be_is_refused_with_the_way_out() -> None:
    for local in ("supcon", SupCon, LoCo(), "bp"):
        with pytest.raises(InputError, match=r"local=.*like SupCon\(\)"):
            LoCo(local)  # type: ignore[arg-type]
    with pytest.raises(InputError, match='recompute=True.*a loss other than "loco"'):
        compiled("plain", 4, "loco", recompute=True)


def test_a_plan_with_another_loss_is_refused() -> None:
    decoupled = compiled("plain", 3, "loco")
    plan = decoupled.plan
    decoupled.close()
    with pytest.raises(PlanError, match="is overlapping, but its loss is 'supcon'"):
        compiled("plain", 3, ["bp", "supcon"], plan=plan)
    again = compiled("plain", 3, "loco", plan=plan)
    again.close()
    assert again.plan == plan


def test_a_detached_classifier_stays_detached() -> None:
    decoupled = compiled("plain", 3, LoCo(EarlyExit()), detach_classifier=True)
    decoupled.close()
    assert [cut.tie for cut in decoupled.plan.cuts] == ["coupled", "overlapping", "detached"]
    assert [stage.objective for stage in decoupled.plan.stages] == ["bp", "loco", "early_exit", "criterion"]
