"""Law 5: the original comes back; and what `Decoupled` promises around it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import pickle
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from training_tools import (
    CLASSES,
    assert_same,
    before_actions,
    compiled,
    hold_until,
    make_batches,
    make_model,
    sgd,
    train,
)

import autodecouple
from autodecouple import checkpoints
from autodecouple.decoupled import Decoupled
from autodecouple.errors import CheckpointError, ClosedError, InputError, PlanError, ScheduleError
from autodecouple.executors.job import Job
from autodecouple.objectives import EarlyExit
from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Op
from autodecouple.stage import Stage

pytestmark = pytest.mark.filterwarnings("ignore:.*had no two rows of one class")


def small(outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, outputs))


def batch(rows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator), torch.randint(3, (rows,), generator=generator)


def two_stages(model: nn.Module, **options: Any) -> Decoupled:
    return autodecouple.compile(model, 2, devices=["cpu"] * 2, **options)


# ---------------------------------------------------------------- law 5


def test_the_original_comes_back_trained() -> None:
    """The very object, with its own keys and its own parameters, all of them changed; heads are elsewhere."""
    model = small()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    before = copy.deepcopy(model.state_dict())
    with two_stages(model) as decoupled:
        assert repr(decoupled) == "Decoupled(Sequential, captured at the first batch)"
        decoupled.train_step(*batch())
        assert decoupled.model is model
        assert list(model.state_dict()) == keys
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert all(a is b for a, b in zip(parameters, decoupled.parameters(), strict=True))
        assert not any(torch.equal(before[key], value) for key, value in model.state_dict().items())
        heads = [p for stage in decoupled.stages[:-1] for p in stage.code.head.parameters()]  # type: ignore[union-attr]
        assert heads and not {id(p) for p in heads} & {id(p) for p in model.parameters()}
        assert repr(decoupled) == "Decoupled(Sequential, 2 stages on 2 lanes)"


def test_inference_is_the_model_in_evaluation_mode() -> None:
    """Bit for bit, without gradients, whatever mode the modules are in, which they keep."""
    decoupled = compiled("dropout", 3)
    x, y = make_batches("dropout", [6])[0]
    with decoupled:
        for _ in range(3):
            decoupled.train_step(x, y)
        found = decoupled(x)
        assert all(module.training for module in decoupled.model.modules())
        mine = make_model("dropout").eval()
        mine.load_state_dict(decoupled.model.state_dict())
        assert not found.requires_grad
        assert_same(found, mine(x).detach())
        assert not decoupled.eval().model.training
        assert decoupled.train() is decoupled and decoupled.model.training


def test_reading_waits_for_the_batches_under_way() -> None:
    """A model read, called or saved half way through a batch would be neither the old one nor the new one."""
    batches = make_batches("norm", [6] * 3)
    expected = train(compiled("norm", 3, executor="inline"), batches).state["model"]

    def late(job: Job, action: Action) -> None:
        if action.op is Op.UPDATE:
            threading.Event().wait(0.02)

    for read in (lambda d: d.model.state_dict(), lambda d: d.state_dict()["model"]):
        decoupled = compiled("norm", 3)
        with decoupled, before_actions(late):
            for pair in batches:
                decoupled.train_step(*pair)
            assert_same(read(decoupled), expected)


class Record:
    """An output type of the user's own, like transformers' ModelOutput."""

    def __init__(self, logits: Tensor, hidden: Tensor) -> None:
        self.logits = logits
        self.hidden = hidden


pytree.register_pytree_node(
    Record,
    lambda record: ([record.logits, record.hidden], None),
    lambda leaves, _: Record(*leaves),
    serialized_type_name="tests.Record",
)


class Shaped(nn.Module):
    def __init__(self, shape: str) -> None:
        super().__init__()
        self.net = small()
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        h = self.net(x)
        return {
            "record": lambda: Record(h, h.exp()),
            "dict": lambda: {"logits": h, "none": None, "number": 3},
            "tuple": lambda: (h, (x, None)),
        }[self.shape]()


@pytest.mark.parametrize("schedule", ["streaming", "micro_batched"])
@pytest.mark.parametrize("shape", ["record", "dict", "tuple"])
def test_outputs_keep_their_type(shape: str, schedule: str) -> None:
    """What the model returns, in training too, and what the criterion is given; a dict with an entry that is None
    could not be put together again."""
    seen: list[Any] = []

    def criterion(output: Any, target: Tensor) -> Tensor:
        seen.append(output)
        logits = output[0] if isinstance(output, tuple) else output["logits"] if shape == "dict" else output.logits
        return nn.functional.cross_entropy(logits, target)

    model = Shaped(shape)
    x, y = batch()
    expected = copy.deepcopy(model)(x)
    with two_stages(model, criterion=criterion, schedule=schedule) as decoupled:
        output = decoupled.train_step(x, y).output
        assert type(output) is type(expected) is type(seen[0]) is type(decoupled(x))
        leaves, spec = pytree.tree_flatten(output)
        others, other = pytree.tree_flatten(expected)
        assert spec == other
        for a, b in zip(leaves, others, strict=True):
            if isinstance(b, Tensor):
                torch.testing.assert_close(a, b.detach())
            else:
                assert a == b
        assert set(decoupled.evaluate([(x, y)])) == {"loss", "accuracy"}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, tokens: Tensor, scale: Tensor, shift: float = 0.0) -> Tensor:
        return self.net(tokens * scale + shift)


def test_inputs_by_name_and_by_position() -> None:
    """In any order of the names; numbers are part of the capture, and another one is refused."""
    x, y = batch()
    scale = torch.full((6, 1), 2.0)
    losses = []
    for inputs in ({"scale": scale, "tokens": x}, (x, scale), [x, scale]):
        torch.manual_seed(0)
        with two_stages(Named()) as decoupled:
            losses.append(decoupled.train_step(inputs, y).losses)
            assert decoupled.train_step({"tokens": x, "scale": scale} if isinstance(inputs, dict) else inputs, y).losses
    assert losses[0] == losses[1] == losses[2]
    with two_stages(Named(), example_inputs={"tokens": x, "scale": scale, "shift": 1.0}) as decoupled:
        decoupled.train_step({"shift": 1.0, "tokens": x, "scale": scale}, y)
        with pytest.raises(InputError, match="compile again for another value"):
            decoupled.train_step({"tokens": x, "scale": scale, "shift": 2.0}, y)


class Centred(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(1))


@pytest.mark.parametrize("schedule", ["streaming", "micro_batched"])
def test_an_input_that_the_model_writes_into_stays_the_caller_s(schedule: str) -> None:
    """It would change at some time after train_step has returned; and of micro-batches, which share its memory, the
    second was taken for overwritten."""
    model = Centred().double()
    x, y = batch()
    x = x.double()
    before = x.clone()
    expected = nn.functional.cross_entropy(copy.deepcopy(model)(x.clone()), y).item()
    with two_stages(model, example_inputs=(x.clone(),), schedule=schedule, loss="bp") as decoupled:
        first = decoupled.train_step(x, y)
        assert decoupled.train_step(x, y).losses != first.losses
        assert first.losses[1] == pytest.approx(expected, rel=1e-12)
        assert torch.equal(x, before)


def test_a_loss_without_rows_is_refused_in_micro_batches() -> None:
    """A scalar output that carries a gradient has no part per micro-batch: it ended in a bare AssertionError."""

    class WithPenalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.net(x)
            return h, h.square().mean()

    def criterion(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output[0], target) + output[1]

    with two_stages(WithPenalty(), criterion=criterion, example_inputs=(batch()[0],)) as decoupled:
        assert decoupled.train_step(*batch()).losses
    decoupled = two_stages(WithPenalty(), criterion=criterion, schedule="micro_batched", example_inputs=(batch()[0],))
    with pytest.raises(InputError, match='has no rows.*schedule="streaming"'):
        decoupled.train_step(*batch())
        decoupled.synchronize()
    decoupled.close()


def test_regression_with_coupled_stages() -> None:
    """Without a local loss any target will do that the criterion takes."""
    x, _ = batch()
    target = {"y": torch.randn(6, 3), "w": torch.rand(6)}

    def criterion(output: Tensor, target: dict[str, Tensor]) -> Tensor:
        return ((output - target["y"]).square().mean(1) * target["w"]).mean()

    model = small().double()
    x, target = x.double(), {name: value.double() for name, value in target.items()}
    expected = criterion(copy.deepcopy(model)(x), target).item()
    for schedule in ("streaming", "gpipe", "1f1b"):  # the last weighs each micro-batch's mean by its rows
        mine = copy.deepcopy(model)
        with two_stages(mine, loss="bp", criterion=criterion, schedule=schedule, example_inputs=(x,)) as decoupled:
            assert decoupled.train_step(x, target).losses == (None, pytest.approx(expected, rel=1e-12))
    decoupled = two_stages(model, loss="bp", criterion=criterion, example_inputs=(x,))
    with decoupled, pytest.raises(InputError, match="5 rows, but the batch has 6"):
        decoupled.train_step(x, torch.zeros(5))


def test_a_criterion_must_give_a_scalar() -> None:
    decoupled = two_stages(small(), criterion=nn.CrossEntropyLoss(reduction="none"), example_inputs=(batch()[0],))
    with pytest.raises(InputError, match=r"scalar tensor, but returned shape \(6,\)"):
        decoupled.train_step(*batch())
        decoupled.synchronize()
    decoupled.close()


# ---------------------------------------------------------------- how stages are trained


def test_optimizers_and_schedulers_are_made_and_stepped_per_stage() -> None:
    made: list[list[nn.Parameter]] = []

    def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(params)
        return torch.optim.SGD(params, lr=1.0)

    decoupled = compiled(
        "norm", 3, optimizer=optimizer, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5), accumulate=2
    )
    with decoupled:
        assert len(made) == len(decoupled.optimizers) == len(decoupled.schedulers) == 3
        assert {id(p) for p in decoupled.model.parameters()} <= {id(p) for params in made for p in params}
        for pair in make_batches("norm", [6] * 5):
            decoupled.train_step(*pair)
        decoupled.synchronize()
        assert [o.param_groups[0]["lr"] for o in decoupled.optimizers] == [0.25] * 3  # two updates of two batches
        assert [stage.pending for stage in decoupled.stages] == [1, 1, 1]


def test_clipping_is_local() -> None:
    """One norm per stage, head included: with one over the model the stages would wait for each other. SGD with rate
    1 shows the gradient itself."""
    limit = 0.01
    decoupled = compiled("norm", 3, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), clip_grad_norm=limit)
    with decoupled:
        before = [[p.detach().clone() for p in stage.parameters] for stage in decoupled.stages]
        decoupled.train_step(*make_batches("norm", [8])[0])
        decoupled.synchronize()
        for stage, old in zip(decoupled.stages, before, strict=True):
            moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(stage.parameters, old, strict=True)])
            assert float(moved.norm()) == pytest.approx(limit, rel=1e-2)


@pytest.mark.parametrize("schedule", ["streaming", "micro_batched"])
def test_accumulating_equals_one_large_batch(schedule: str) -> None:
    """Of a loss that is a mean over rows: k batches of n rows and one update are one batch of k n rows."""
    batches = make_batches("plain", [4] * 6)
    large = [
        (torch.cat([x for x, _ in three]), torch.cat([y for _, y in three])) for three in (batches[:3], batches[3:])
    ]
    options = {"optimizer": sgd, "loss": EarlyExit()}
    whole = train(compiled("plain", 3, **options), large).state
    parts = train(compiled("plain", 3, accumulate=3, schedule=schedule, **options), batches).state
    for name, value in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], value, rtol=1e-10, atol=1e-12)
    assert [stage["pending"] for stage in parts["stages"]] == [0, 0, 0]


# ---------------------------------------------------------------- the caller's own state


@pytest.mark.parametrize("executor", ["inline", "streams"])
@pytest.mark.parametrize("around", ["step", "loop"])
def test_autocast_of_the_caller_reaches_the_stages(executor: str, around: str) -> None:
    """As by hand: forward and loss under autocast, backward and update outside it. Around the whole loop the weights
    that were cast for the first batch were used for every later one; and under autocast the backward of SupCon's
    float32 products was computed in bfloat16."""
    batches = make_batches("norm", [6] * 4)
    decoupled = compiled("norm", 2, "supcon", cut_at=("2",), optimizer=sgd, executor=executor)
    model = make_model("norm").train()
    pieces = [model[:3], model[3:]]
    head = copy.deepcopy(decoupled.stages[0].code.head)
    assert head is not None
    one, two = sgd([*pieces[0].parameters(), *head.parameters()]), sgd(list(pieces[1].parameters()))
    expected = []
    for x, y in batches:
        with torch.autocast("cpu", torch.bfloat16):
            h = pieces[0](x)
            first, _ = head(h, y)
            second = nn.functional.cross_entropy(pieces[1](h.detach()), y)
        first.backward()
        second.backward()
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()
        expected.append((first.item(), second.item()))
    found, steps = [], []
    with decoupled:
        if around == "loop":
            with torch.autocast("cpu", torch.bfloat16):
                steps = [decoupled.train_step(*pair) for pair in batches]
        else:
            for pair in batches:
                with torch.autocast("cpu", torch.bfloat16):
                    steps.append(decoupled.train_step(*pair))
        found = [step.losses for step in steps]
        assert steps[0].output.dtype is torch.bfloat16
        assert found == expected
        assert_same(decoupled.model.state_dict(), model.state_dict())


@pytest.mark.parametrize("executor", ["inline", "streams"])
def test_hooks_and_default_device_of_the_caller_reach_the_stages(executor: str) -> None:
    """A new thread starts without them: memory saving hooks would silently save nothing."""
    packed: list[str] = []
    devices: list[torch.device] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(threading.current_thread().name)
        return tensor

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        devices.append(torch.get_default_device())
        return nn.functional.cross_entropy(output, target)

    pair = make_batches("norm", [6])[0]
    decoupled = compiled("norm", 2, executor=executor, criterion=criterion)
    with decoupled:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.device("meta"):
            decoupled.train_step(*pair)
        decoupled.train_step(*pair)
        decoupled.synchronize()
    own = {"MainThread"} if executor == "inline" else {"autodecouple-lane-0", "autodecouple-lane-1"}
    assert set(packed) == own
    assert [device.type for device in devices] == ["meta", "cpu"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_is_refused(context: Any) -> None:
    decoupled = compiled("norm", 2)
    with decoupled:
        before = decoupled.state_dict()
        with context(), pytest.raises(InputError, match="leave it to train"):
            decoupled.train_step(*make_batches("norm", [6])[0])
        assert_same(decoupled.state_dict(), before)


def test_compiling_and_training_leave_the_global_generator_alone() -> None:
    """Neither heads nor masks draw from it: shuffling does not depend on how a model is cut."""
    before = torch.get_rng_state()
    train(compiled("dropout", 3), make_batches("dropout", [4] * 2))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- fit and evaluate


def pairs(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [batch(seed=seed) for seed in range(count)]


def test_fit_is_the_loop() -> None:
    """History: the mean of each stage's losses over the rows, and the accuracy of the steps' own outputs."""
    batches = [*make_batches("norm", [6] * 11), *make_batches("norm", [2], seed=9)]
    by_hand = train(compiled("norm", 3, executor="inline"), batches)
    decoupled = compiled("norm", 3)
    with decoupled:
        history = decoupled.fit(batches, epochs=1, progress=False)
        assert_same(decoupled.state_dict()["model"], by_hand.state["model"])
    rows = [len(y) for _, y in batches]
    for stage in range(3):
        mean = sum(losses[stage] * n for losses, n in zip(by_hand.losses, rows, strict=True)) / sum(rows)
        assert history[0].losses[stage] == pytest.approx(mean)
    hits = sum(int((o.argmax(1) == y).sum()) for o, (_, y) in zip(by_hand.outputs, batches, strict=True))
    assert history[0].accuracy == hits / sum(rows)
    assert math.isnan(history[0].validation) and history[0].seconds > 0 and "epoch   1" in str(history[0])


def test_evaluate_equals_a_loop_by_hand() -> None:
    """Over batches of several sizes, in evaluation mode, also before any training."""
    batches = make_batches("dropout", [6, 3, 1])
    model = make_model("dropout").eval()
    with compiled("dropout", 2) as decoupled, torch.no_grad():
        found = decoupled.evaluate(batches)
        total = sum(nn.functional.cross_entropy(model(x), y, reduction="sum").item() for x, y in batches)
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
        assert found == {"loss": pytest.approx(total / 10), "accuracy": hits / 10}
    with two_stages(small()) as lazy:
        assert lazy.evaluate(pairs())["loss"] > 0
    with pytest.raises(InputError, match="gave no batch"):
        decoupled.evaluate([])


def test_fit_validates_and_saves_after_every_epoch(tmp_path: Path) -> None:
    seen: list[int] = []

    class Held:
        def __iter__(self) -> Iterator[Any]:
            seen.append((tmp_path / "state").exists())
            return iter(pairs(2))

    with two_stages(small()) as decoupled:
        history = decoupled.fit(pairs(), 2, validation=Held(), checkpoint=tmp_path / "state", progress=False)
        assert [epoch.epoch for epoch in history] == [1, 2] and seen == [False, True]
        assert history[-1].validation == decoupled.evaluate(pairs(2))["accuracy"]
        found = checkpoints.load(tmp_path / "state")
        assert found["step"] == 8
        assert_same(found["model"], decoupled.model.state_dict())
        with pytest.raises(CheckpointError, match="is not there: make it"):
            decoupled.fit(pairs(), checkpoint=tmp_path / "nowhere" / "state", progress=False)
        assert decoupled.state_dict()["step"] == 8  # said before the epoch, not after it


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(a + b)


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_fit_takes_several_inputs(form: str) -> None:
    batches: Sequence[Any] = [(x, x, y) for x, y in pairs()]
    if form == "dict":
        batches = [{"a": x, "b": x, "labels": y} for x, y in pairs()]
    with two_stages(Two()) as decoupled:
        (epoch,) = decoupled.fit(batches, validation=batches, progress=False)
        assert 0 <= epoch.accuracy <= 1 and 0 <= epoch.validation <= 1


def test_fit_refuses_what_it_cannot_read() -> None:
    with two_stages(small(), example_inputs=(batch()[0],)) as decoupled:
        for epochs in (0, -1, 1.5, True):
            with pytest.raises(InputError, match="epochs must be a positive integer"):
                decoupled.fit(pairs(), epochs=epochs, progress=False)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="'labels'; it has x, y"):
            decoupled.fit([{"x": 1, "y": 2}], progress=False)
        with pytest.raises(InputError, match=r"must be \(inputs, target\), but is Tensor"):
            decoupled.fit([batch()[0]], progress=False)
        with pytest.raises(InputError, match="a generator can be read only once"):
            decoupled.fit(iter(pairs()), epochs=2, progress=False)
        assert decoupled.state_dict()["step"] == 4


# ---------------------------------------------------------------- what nn.Module has and this has not


def test_moving_between_devices_keeps_training() -> None:
    """To the CPU it is on: weights and moments stay, new workers go on where the old ones stopped."""
    batches = make_batches("norm", [6] * 4)
    expected = train(compiled("norm", 3), batches).state
    decoupled = compiled("norm", 3)
    with decoupled:
        for pair in batches[:2]:
            decoupled.train_step(*pair)
        assert decoupled.to("cpu") is decoupled
        assert decoupled.to(torch.device("cpu")) is decoupled
        for pair in batches[2:]:
            decoupled.train_step(*pair)
        assert_same(decoupled.state_dict()["model"], expected["model"])
        for wrong in (torch.float64, "cpu:x", 3.5):
            with pytest.raises(InputError):
                decoupled.to(wrong)


def test_copies_and_pickles_are_refused_with_the_way_out() -> None:
    decoupled = two_stages(small())
    with pytest.raises(InputError, match=r"copy.deepcopy\(decoupled.model\)"):
        copy.deepcopy(decoupled)
    for attempt in (pickle.dumps, copy.copy):
        with pytest.raises(InputError, match="save decoupled.state_dict"):
            attempt(decoupled)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("named_parameters", "use decoupled.model.named_parameters"),
        ("modules", "use decoupled.model.modules"),
        ("cuda", 'use decoupled.to("cuda")'),
        ("half", "convert the model before compile"),
        ("forward", "call it, decoupled(x)"),
    ],
)
def test_missing_attributes_name_the_way_out(name: str, instead: str) -> None:
    """decoupled.model.cuda() would have moved the parameters away under the stages' feet."""
    with pytest.raises(AttributeError, match="a compiled pipeline has no") as caught:
        getattr(two_stages(small()), name)
    assert instead in str(caught.value)
    with pytest.raises(AttributeError, match="'Decoupled' has no attribute 'nonsense'"):
        _ = two_stages(small()).nonsense


def test_a_pipeline_not_yet_captured_says_so() -> None:
    decoupled = two_stages(small())
    decoupled.synchronize()
    assert decoupled(batch()[0]).shape == (6, 3)
    for name in ("plan", "graph", "stages", "code", "timeline"):
        with pytest.raises(InputError, match="captured at its first batch: pass example_inputs"):
            getattr(decoupled, name)
    with decoupled:
        decoupled.train_step(*batch())
        assert len(decoupled.code) == 2 and "def stage0" in decoupled.code[0]
        assert "text/html" in decoupled._repr_mimebundle_()
        with pytest.raises(InputError, match="has been captured already"):
            decoupled.capture((batch()[0],))


# ---------------------------------------------------------------- plans


def test_a_detached_classifier_trains_alone() -> None:
    """The papers' form: K local losses and the classifier on features that let no gradient back."""
    decoupled = compiled("norm", 3, detach_classifier=True, optimizer=sgd, devices=["cpu"] * 3)
    x, y = make_batches("norm", [6])[0]
    with decoupled:
        plan = decoupled.plan
        assert len(plan.stages) == 4 and [stage.lane for stage in plan.stages[-2:]] == [2, 2]
        assert all(cut.detached for cut in plan.cuts)
        losses = decoupled.train_step(x, y).losses
        assert len(losses) == 4 and None not in losses
        own = {id(p) for p in decoupled.stages[-1].parameters}
        model = decoupled.model
        assert own == {id(p) for p in model[-1].parameters()}  # type: ignore[index]
    # another criterion changes the classifier and nothing else
    other = compiled("norm", 3, detach_classifier=True, optimizer=sgd, criterion=nn.MultiMarginLoss())
    with other:
        other.train_step(x, y)
        found = {name: value.clone() for name, value in other.model.state_dict().items()}
    same = train(compiled("norm", 3, detach_classifier=True, optimizer=sgd), [(x, y)]).state["model"]
    changed = {name for name, value in same.items() if not torch.equal(value, found[name])}
    assert changed == {"7.weight", "7.bias"}


def test_a_plan_given_back_is_the_plan_that_runs() -> None:
    """Through JSON and edited by hand: cuts and lanes count."""
    first = compiled("norm", 3, cut_at=("0", "3"))
    batches = make_batches("norm", [6] * 2)
    text = first.plan.to_json()
    expected = train(first, batches).state
    edited = json.loads(text)
    for stage, lane in zip(edited["stages"], (0, 0, 1), strict=True):
        stage["lane"] = lane
    plan = Plan.from_json(json.dumps(edited))
    decoupled = compiled("norm", 3, plan=plan)
    assert decoupled.plan.lanes == ((0, 1), (2,)) and [c.after for c in decoupled.plan.cuts] == [
        c.after for c in first.plan.cuts
    ]
    assert_same(train(decoupled, batches).state, expected)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    with compiled("norm", 3) as decoupled:
        plan = decoupled.plan
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"plan": plan, "n_stages": 2}, PlanError, "the plan has 3 stages, but n_stages=2"),
        ({"plan": plan, "loss": "bp", "n_stages": 3}, PlanError, "is detached, but its loss is 'bp'"),
        ({"plan": plan.to_json(), "n_stages": 3}, PlanError, "Plan.from_json"),
        (
            {"plan": dataclasses.replace(plan, stages=(*plan.stages[:2], dataclasses.replace(plan.stages[2], lane=0)))},
            PlanError,
            "lanes must hold contiguous stages",
        ),
        ({"plan": plan, "schedule": "1f1b"}, ScheduleError, "is detached"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind) as caught:
            compiled("norm", options.pop("n_stages", 3), **options)
        assert message in str(caught.value)
    with pytest.raises(PlanError, match="does not fit Sequential: it names a node"):
        autodecouple.compile(small(), plan=plan, example_inputs=(batch()[0],))


# ---------------------------------------------------------------- the end


def workers() -> int:
    return sum(thread.name.startswith("autodecouple-") for thread in threading.enumerate())


def test_closing_ends_the_workers_every_time() -> None:
    """Fifty times: neither threads nor pipelines pile up."""
    gone = []
    for _ in range(50):
        with compiled("norm", 2) as decoupled:
            decoupled.train_step(*make_batches("norm", [2])[0])
            assert workers() == 2
        assert workers() == 0
        gone.append(weakref.ref(decoupled._pipeline.executor))  # type: ignore[union-attr]
    del decoupled
    gc.collect()
    assert not any(ref() for ref in gone)


def test_a_pipeline_that_is_dropped_ends_its_workers() -> None:
    """No close(), no cycle for the collector to find; whoever still holds a step is told."""
    go = threading.Event()
    with before_actions(hold_until(go)):
        decoupled = compiled("norm", 2)
        step = decoupled.train_step(*make_batches("norm", [4])[0])
        assert workers() == 2
        del decoupled
        go.set()
        for _ in range(400):
            if not workers():
                break
            threading.Event().wait(0.01)
    assert workers() == 0
    with pytest.raises(ClosedError, match="batch 0 was dropped"):
        _ = step.losses


def test_a_collector_that_runs_in_a_worker_stops_nobody() -> None:
    """The pipeline is part of a cycle, and the collector finds it in a worker that holds the lock its sisters wait
    for: joining them there was a deadlock."""
    decoupled = compiled("norm", 2)
    holder: dict[str, Any] = {"pipeline": decoupled}
    holder["self"] = holder
    gone = weakref.ref(decoupled)
    step = decoupled.train_step(*make_batches("norm", [4])[0])
    step.losses  # noqa: B018
    board = decoupled._pipeline.executor._board  # type: ignore[union-attr]
    del decoupled, holder
    done = threading.Event()

    def collect() -> None:
        with board._lock:
            gc.collect()
        done.set()

    threading.Thread(target=collect, daemon=True).start()
    assert done.wait(20) and gone() is None


def test_a_step_does_not_hold_on_to_its_batch() -> None:
    """A loop that keeps its steps for their losses must not keep activations and inputs with them."""
    decoupled = compiled("norm", 2)
    x, y = make_batches("norm", [4])[0]
    seen = weakref.ref(x)
    features: list[weakref.ref[Tensor]] = []
    forward = Stage.forward

    def remember(self: Stage, *args: Any) -> Any:
        sent = forward(self, *args)
        features.extend(weakref.ref(value) for value in sent.values())
        return sent

    with pytest.MonkeyPatch.context() as patch, decoupled:
        patch.setattr(Stage, "forward", remember)
        step = decoupled.train_step(x, y)
        decoupled.synchronize()
        del x, y
        gc.collect()
        assert seen() is None and features and not any(ref() is not None for ref in features)
        assert len(step.losses) == 2 and step.output.shape == (4, CLASSES)
