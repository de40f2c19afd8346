"""Law 3: streaming equals sequential, bitwise. Law 4: coupled stages equal backprop."""

from __future__ import annotations

import copy
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training_tools import (
    Batch,
    Encoding,
    assert_same,
    before_actions,
    compiled,
    delays,
    make_batches,
    make_model,
    sgd,
    train,
)

from autodecouple.decoupled import Decoupled
from autodecouple.executors.job import Job
from autodecouple.objectives import OBJECTIVES, EarlyExit, SupCon
from autodecouple.schedules import GPipe, MicroBatched, OneFOneB, Schedule, Sequential, Streaming
from autodecouple.schedules.actions import Action, Op

pytestmark = pytest.mark.filterwarnings("ignore:.*had no two rows of one class")  # batches of one row are meant

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


# ---------------------------------------------------------------- what plain torch does


def cut_by_hand(model: nn.Sequential, after: Sequence[str]) -> list[nn.Sequential]:
    """The model's children in pieces, each ending with a child of that name."""
    pieces: list[list[nn.Module]] = [[]]
    for name, child in model.named_children():
        pieces[-1].append(child)
        if name in after:
            pieces.append([])
    return [nn.Sequential(*piece) for piece in pieces]


def train_by_hand(
    model: nn.Sequential,
    after: Sequence[str],
    heads: Sequence[nn.Module | None],
    optimizer: Optimizer,
    batches: Sequence[Batch],
) -> list[list[float | None]]:
    """Stage after stage with nothing but torch; where a head is None, the gradient of the next stage comes back."""
    pieces = cut_by_hand(model, after)
    tails = [*heads, nn.CrossEntropyLoss()]
    parameters = [
        [*piece.parameters(), *(tail.parameters() if tail is not None else [])]
        for piece, tail in zip(pieces, tails, strict=True)
    ]
    optimizers = [optimizer(params) for params in parameters]
    model.train()
    history = []
    for x, y in batches:
        losses: list[float | None] = []
        for piece, tail in zip(pieces, tails, strict=True):
            x = piece(x)
            if tail is None:
                losses.append(None)
                continue
            loss = tail(x, y)[0] if isinstance(tail, nn.Module) and tail is not tails[-1] else tail(x, y)
            loss.backward()
            losses.append(loss.item())
            x = x.detach()
        for each in optimizers:
            each.step()
            each.zero_grad()
        history.append(losses)
    return history


def compare_with_hand(decoupled: Decoupled, kind: str, after: Sequence[str], optimizer: Optimizer, count: int) -> None:
    """Train both on the same batches; losses, the model's state and the heads' must be the same bits."""
    mine = make_model(kind)
    heads = [copy.deepcopy(stage.code.head) for stage in decoupled.stages[:-1]]
    batches = make_batches(kind, [8] * count + [3, 1])
    expected = train_by_hand(mine, after, heads, optimizer, batches)
    found = train(decoupled, batches)
    assert_same([list(losses) for losses in found.losses], expected)
    assert_same(found.state["model"], dict(mine.state_dict()))
    cuts = zip(decoupled.plan.cuts, heads, strict=True)
    hand_heads = {cut.after: dict(head.state_dict()) for cut, head in cuts if head is not None}
    found_heads = {key: dict(value) for key, value in found.state["heads"].items() if key in hand_heads}
    assert_same(found_heads, hand_heads)


@pytest.mark.parametrize("executor", ["inline", "streams"])
@pytest.mark.parametrize("loss", ["supcon", "deinforeg", ["early_exit", "supcon", "early_exit"]])
def test_streaming_equals_a_loop_by_hand(executor: str, loss: Any) -> None:
    """The whole promise: BatchNorm statistics, heads and weights are those of a plain loop, to the last bit."""
    after = ("0", "2", "4")
    decoupled = compiled("norm", 4, loss, cut_at=after, optimizer=adam, executor=executor)
    with delays(1):
        compare_with_hand(decoupled, "norm", after, adam, 3)


@pytest.mark.parametrize("executor", ["inline", "streams"])
@pytest.mark.parametrize("loss", [["supcon", "bp", "early_exit"], ["bp", "supcon", "bp"], ["bp", "bp", "supcon"]])
def test_groups_of_coupled_stages_equal_a_loop_by_hand(executor: str, loss: list[str]) -> None:
    """A coupled stage has no loss: its gradient is that of the next stage's, and stops at the next detached cut."""
    after = ("0", "2", "4")
    decoupled = compiled("norm", 4, loss, cut_at=after, optimizer=sgd, executor=executor)
    with delays(2):
        compare_with_hand(decoupled, "norm", after, sgd, 3)


# ---------------------------------------------------------------- law 3 for everything at once

HIDDEN = ("supcon", "early_exit", "deinforeg", "associated", "loco", "bp")


@st.composite
def detached_schedules(draw: st.DrawFn) -> Schedule:
    depth = draw(st.integers(1, 8))
    barrier = draw(st.booleans())
    count = draw(st.integers(1, 5))
    if count == 1:
        return Streaming(queue_depth=depth, barrier=barrier)
    return MicroBatched(num_micro_batches=count, queue_depth=depth, barrier=barrier)


@st.composite
def coupled_schedules(draw: st.DrawFn) -> Schedule:
    kind = draw(st.sampled_from([GPipe, OneFOneB]))
    return kind(num_micro_batches=draw(st.integers(1, 5)), queue_depth=draw(st.integers(1, 8)))


def check_equals_sequential(
    loss: list[Any], lanes: int, schedule: Schedule, executor: str, sizes: list[int], seed: int
) -> None:
    """Against the one order that needs no thought: stage after stage, batch after batch, in one thread."""
    batches = make_batches("dropout", sizes)
    stages = len(loss) + 1
    reference = Sequential(num_micro_batches=schedule.num_micro_batches)
    if isinstance(schedule, OneFOneB):  # its loss is taken per micro-batch
        reference = OneFOneB(num_micro_batches=schedule.num_micro_batches)
    options = {"optimizer": sgd, "seed": 5}
    inline = compiled("dropout", stages, loss, lanes=1, schedule=reference, executor="inline", **options)
    expected = train(inline, batches)
    with delays(seed):
        decoupled = compiled("dropout", stages, loss, lanes=lanes, schedule=schedule, executor=executor, **options)
        found = train(decoupled, batches)
    assert_same(found.losses, expected.losses)
    assert_same(found.outputs, expected.outputs)
    assert_same(found.state, expected.state)


sizes = st.tuples(st.just(6), st.integers(2, 7), st.just(6), st.integers(1, 3)).map(list)


@given(
    loss=st.lists(st.sampled_from(HIDDEN), max_size=5),
    lanes=st.integers(1, 4),
    schedule=detached_schedules(),
    executor=st.sampled_from(["streams", "streams", "streams", "inline"]),
    sizes=sizes,
    seed=st.integers(0, 2**16),
)
@settings(max_examples=12)
def test_every_order_equals_sequential(**case: Any) -> None:
    """Law 3: with dropout and BatchNorm on, whatever runs the stages and whoever is late."""
    check_equals_sequential(**case)


@given(
    num_hidden=st.integers(1, 5),
    lanes=st.integers(1, 4),
    schedule=coupled_schedules(),
    executor=st.sampled_from(["streams", "streams", "inline"]),
    sizes=sizes,
    seed=st.integers(0, 2**16),
)
@settings(max_examples=8)
def test_every_coupled_order_equals_sequential(num_hidden: int, **case: Any) -> None:
    """The same under the two classical schedules."""
    check_equals_sequential(loss=["bp"] * num_hidden, **case)


@pytest.mark.slow
@given(
    loss=st.lists(st.sampled_from(list(OBJECTIVES)), max_size=5),
    lanes=st.integers(1, 4),
    schedule=detached_schedules(),
    executor=st.just("streams"),
    sizes=sizes,
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150)
def test_every_order_equals_sequential_at_length(**case: Any) -> None:
    """Law 3 on more examples."""
    check_equals_sequential(**case)


@pytest.mark.parametrize(
    ("executor", "schedule"),
    [
        ("inline", Streaming()),
        ("streams", Streaming(queue_depth=1)),
        ("streams", Streaming(barrier=True)),
        ("streams", MicroBatched(num_micro_batches=3)),
    ],
)
def test_an_encoded_signal_travels_with_its_batch(executor: str, schedule: Schedule) -> None:
    """Where heads pass on a signal of their own, each loss waits for the one before; the arithmetic is the same."""
    options: dict[str, Any] = {"optimizer": sgd}
    batches = make_batches("norm", [6, 6, 6, 2])
    reference = Sequential(num_micro_batches=schedule.num_micro_batches)
    expected = train(compiled("norm", 4, Encoding(), executor="inline", schedule=reference, **options), batches)
    with delays(3):
        found = train(compiled("norm", 4, Encoding(), executor=executor, schedule=schedule, **options), batches)
    assert_same(found.losses, expected.losses)
    assert_same(found.state, expected.state)


def test_an_encoding_objective_gets_the_signal_of_the_one_before() -> None:
    """By hand: stage 1 compares with what stage 0's encoder made of the labels, and the criterion with the labels."""
    decoupled = compiled("norm", 3, Encoding(), cut_at=("1", "3"), optimizer=sgd)
    pieces = cut_by_hand(make_model("norm").train(), ("1", "3"))
    first, second = (copy.deepcopy(stage.code.head) for stage in decoupled.stages[:2])
    assert first is not None and second is not None
    ((x, y),) = make_batches("norm", [6])
    h = pieces[0](x)
    loss0, signal0 = first(h, y)
    h = pieces[1](h)
    loss1, signal1 = second(h, signal0)
    assert signal1.is_floating_point()
    loss2 = nn.functional.cross_entropy(pieces[2](h), y)
    with decoupled:
        assert decoupled.train_step(x, y).losses == (loss0.item(), loss1.item(), loss2.item())


# ---------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("rows", [8, 5, 3, 1])
@pytest.mark.parametrize("loss", [SupCon(), EarlyExit(), ["supcon", "bp", "early_exit"]])
def test_micro_batches_equal_the_whole_batch(loss: Any, rows: int) -> None:
    """Without BatchNorm a batch in slices is the same batch: the loss is taken over all of it. In float64, so that
    what is left is rounding; with fewer rows than micro-batches there are fewer of these."""
    batches = make_batches("plain", [8, rows, 8])
    whole = train(compiled("plain", 4, loss, optimizer=sgd), batches)
    sliced = train(compiled("plain", 4, loss, optimizer=sgd, schedule=MicroBatched(num_micro_batches=4)), batches)
    for a, b in zip(whole.losses, sliced.losses, strict=True):
        assert [x is None for x in a] == [x is None for x in b]
        assert a == pytest.approx(b, rel=1e-9) if None not in a else True
    for name, value in whole.state["model"].items():
        torch.testing.assert_close(sliced.state["model"][name], value, rtol=1e-9, atol=1e-11)
    for a, b in zip(whole.outputs, sliced.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- law 4

COUPLED: list[tuple[str, Schedule]] = [
    ("inline", Sequential()),
    ("inline", Sequential(num_micro_batches=3)),
    ("streams", Streaming()),
    ("streams", GPipe(num_micro_batches=1)),
    ("streams", GPipe(num_micro_batches=3)),
    ("streams", OneFOneB(num_micro_batches=1)),
    ("streams", OneFOneB(num_micro_batches=4)),
    ("inline", OneFOneB(num_micro_batches=2)),
]


def backprop(kind: str, optimizer: Optimizer, batches: Sequence[Batch]) -> tuple[dict[str, Tensor], list[float]]:
    model = make_model(kind).train()
    one, losses = optimizer(list(model.parameters())), []
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        one.step()
        one.zero_grad()
        losses.append(loss.item())
    return dict(model.state_dict()), losses


@pytest.mark.parametrize(("executor", "schedule"), COUPLED)
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_coupled_stages_equal_backprop(executor: str, schedule: Schedule, optimizer: Optimizer) -> None:
    """Law 4: several steps of the same stages under any schedule are those of one optimizer on the whole model."""
    batches = make_batches("plain", [8, 8, 7, 2, 8])
    weights, losses = backprop("plain", optimizer, batches)
    with delays(4):
        found = train(compiled("plain", 4, "bp", schedule=schedule, executor=executor, optimizer=optimizer), batches)
    assert [step[:3] for step in found.losses] == [(None, None, None)] * len(batches)
    if schedule.num_micro_batches == 1:
        assert [step[3] for step in found.losses] == losses
        assert_same(found.state["model"], weights)
        return
    assert [step[3] for step in found.losses] == pytest.approx(losses, rel=1e-9)
    for name, value in weights.items():
        # Adam divides by the root of squares: where a gradient is next to nothing, rounding is large beside it.
        torch.testing.assert_close(found.state["model"][name], value, rtol=1e-6, atol=1e-8)


def test_coupled_stages_with_batch_norm_equal_backprop() -> None:
    """With BatchNorm, too, as long as the batch stays whole."""
    batches = make_batches("norm", [8, 8, 3, 1])
    weights, _ = backprop("norm", adam, batches)
    found = train(compiled("norm", 5, "bp", schedule=GPipe(num_micro_batches=1), optimizer=adam), batches)
    assert_same(found.state["model"], weights)


# ---------------------------------------------------------------- what streaming is for


def test_train_step_returns_before_the_batch_is_trained() -> None:
    """The caller prepares the next batch while this one is under way; only reading waits."""
    go = threading.Event()

    def hold(job: Job, action: Action) -> None:
        if action == Action(1, Op.FORWARD, 0):
            assert go.wait(20)

    decoupled = compiled("norm", 2)
    with decoupled, before_actions(hold):
        step = decoupled.train_step(*make_batches("norm", [8])[0])  # would hang here if it waited
        assert repr(step) == "Step(batch=0, running)"
        go.set()
        assert len(step.losses) == 2
        assert repr(step) == "Step(batch=0, done)"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nobody_runs_further_ahead_than_the_queue_is_deep(depth: int) -> None:
    """Memory stays bounded: with stage 1 stuck, stage 0 starts `depth` batches, and the caller gives as many again."""
    go, started = threading.Event(), []

    def hold(job: Job, action: Action) -> None:
        if action.op is Op.FORWARD and action.stage == 0:
            started.append(job.index)
        if action.stage == 1:
            go.wait(20)

    batches = make_batches("norm", [4] * 8)
    given: list[int] = []

    def give() -> None:
        for index, batch in enumerate(batches):
            decoupled.train_step(*batch)
            given.append(index)

    decoupled = compiled("norm", 2, schedule=Streaming(queue_depth=depth))
    with decoupled, before_actions(hold):
        caller = threading.Thread(target=give)
        caller.start()
        caller.join(1.0)
        assert started == list(range(depth))
        assert len(given) == 2 * depth  # a batch is given once the one `depth` before it has left the first forward
        go.set()
        caller.join(20)
        assert len(given) == len(batches)


@pytest.mark.parametrize("barrier", [False, True])
def test_stages_overlap_without_a_barrier_only(barrier: bool) -> None:
    """Stage 0 works on batch 1 while stage 1 still holds batch 0: unless a barrier forbids it."""
    go, started = threading.Event(), threading.Event()

    def hold(job: Job, action: Action) -> None:
        if action == Action(1, Op.LOSS) and job.index == 0:
            go.wait(20)
        if action == Action(0, Op.FORWARD, 0) and job.index == 1:
            started.set()

    decoupled = compiled("norm", 2, schedule=Streaming(barrier=barrier))
    with decoupled, before_actions(hold):
        for batch in make_batches("norm", [4, 4]):
            decoupled.train_step(*batch)
        assert started.wait(0.5 if barrier else 20) is not barrier
        go.set()


def test_spans_keep_the_rule_of_streaming() -> None:
    """As measured: one action at a time on a lane, a stage's forward after its own update, and after the forward
    before it."""
    decoupled = compiled("norm", 4)
    with delays(5), decoupled:
        for batch in make_batches("norm", [4] * 6):
            decoupled.train_step(*batch)
        spans = decoupled.timeline.spans
    at = {(span.batch, str(span.action)): span for span in spans}
    lanes = defaultdict(list)
    for span in spans:
        lanes[span.lane].append(span)
    assert len(spans) == 6 * 4 * 4 and len(lanes) == 4
    for lane in lanes.values():
        assert all(a.stop <= b.start for a, b in itertools.pairwise(lane))
    for (batch, action), span in at.items():
        stage = span.action.stage
        if span.action.op is Op.FORWARD and batch:
            assert span.start >= at[batch - 1, f"{stage}U"].stop
        if span.action.op is Op.FORWARD and stage:
            assert span.start >= at[batch, f"{stage - 1}F0"].stop
        assert action
