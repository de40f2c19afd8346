"""Stages as graphs, on fake ones: every replay is a batch trained, to the last bit; what cannot be says why."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from fake_graphs import FakeRecorder, fake_graphs
from torch import Tensor, nn
from training_tools import Encoding, assert_same, compiled, make_batches, sgd, train

from autodecouple.backends.graphed import RECORDINGS, WARM_UP
from autodecouple.errors import NonFiniteLossError

pytestmark = pytest.mark.timeout(60)


def graphed(kind: str, n_stages: int = 3, loss: Any = "supcon", **options: Any) -> Any:
    return compiled(kind, n_stages, loss, backend="cuda_graphs", **{"optimizer": sgd, **options})


def trained(batches: Any, kind: str, n_stages: int = 3, **options: Any) -> tuple[Any, Any, FakeRecorder]:
    """Eager and graphed results, with warnings as errors."""
    expected = train(compiled(kind, n_stages, **{"optimizer": sgd, **options}), batches)
    with fake_graphs() as recorder, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = train(graphed(kind, n_stages, **options), batches)
    return expected, found, recorder


def replays(recorder: FakeRecorder) -> list[int]:
    return [graph.replays for graph in recorder.graphs]


@pytest.mark.parametrize("schedule", ["streaming", "sequential"])
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip", "ignore"])
def test_replays_equal_eager_training(schedule: str, on_nonfinite: str) -> None:
    """Dropout, BatchNorm and momentum: losses, outputs, parameters, buffers, optimizer states."""
    options = {"schedule": schedule, "on_nonfinite": on_nonfinite}
    expected, found, recorder = trained(make_batches("dropout", [8] * 8), "dropout", **options)
    assert_same(found, expected)
    graphs = 1 if on_nonfinite == "ignore" else 2  # the update apart, where the loss is looked at before
    assert replays(recorder) == [8 - WARM_UP] * graphs * 3


@pytest.mark.parametrize("kind, loss", [("plain", "early_exit"), ("norm", "deinforeg"), ("plain", "supcon")])
@pytest.mark.parametrize("n_stages", [1, 4])
def test_objectives_equal_eager_training(kind: str, loss: str, n_stages: int) -> None:
    expected, found, recorder = trained(make_batches(kind, [8] * 6), kind, n_stages, loss=loss, lanes=1)
    assert_same(found, expected)
    assert len(recorder.graphs) == 2 * n_stages


def test_gradients_are_clipped_within_the_graph() -> None:
    expected, found, recorder = trained(make_batches("norm", [8] * 7), "norm", clip_grad_norm=0.05)
    assert_same(found, expected)
    assert replays(recorder) == [7 - WARM_UP] * 6


def test_a_smaller_batch_runs_eagerly_between_replays() -> None:
    batches = make_batches("dropout", [8, 8, 8, 8, 8, 3, 8, 8, 8, 1 + 1])
    expected = train(compiled("dropout", 3, optimizer=sgd), batches)
    with fake_graphs() as recorder, pytest.warns(UserWarning, match="other shapes than those recorded") as said:
        found = train(graphed("dropout"), batches)
    assert_same(found, expected)
    assert replays(recorder) == [5] * 6
    assert len([each for each in said if "backend=" in str(each.message)]) == 1, "one for all stages and batches"


def test_a_batch_that_is_left_out_leaves_no_trace() -> None:
    """Its buffers come back, and the next replay begins from there."""
    batches = make_batches("norm", [8] * 8)
    batches[5][0].fill_(torch.nan)
    expected, found, recorder = trained(batches, "norm", on_nonfinite="skip")
    assert_same(found, expected)
    assert replays(recorder)[:2] == [8 - WARM_UP, 7 - WARM_UP]


def test_a_loss_that_is_not_finite_is_raised() -> None:
    batches = make_batches("norm", [8] * 6)
    with fake_graphs(), graphed("norm", schedule="sequential") as decoupled:
        for x, y in batches:
            decoupled.train_step(x, y)
        before = {name: value.clone() for name, value in decoupled.model.state_dict().items()}
        with pytest.raises(NonFiniteLossError, match="the loss of stage 0 is nan"):
            decoupled.train_step(batches[0][0] * torch.nan, batches[0][1])
        assert_same(dict(decoupled.model.state_dict()), before)
        decoupled.train_step(*batches[0])


def test_what_the_caller_holds_is_not_overwritten() -> None:
    """Losses and outputs of an earlier batch, read after later ones were trained on."""
    batches = make_batches("norm", [8] * 8)
    with compiled("norm", 2, optimizer=sgd, schedule="sequential") as decoupled:
        expected = [(step.losses, step.output.clone()) for step in (decoupled.train_step(x, y) for x, y in batches)]
    with fake_graphs(), graphed("norm", 2, schedule="sequential") as decoupled:
        steps = [decoupled.train_step(x, y) for x, y in batches]
        for x, _ in batches:
            x.zero_()
        assert_same([(step.losses, step.output) for step in steps], expected)


def fused(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, fused=True)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def test_schedulers_reach_the_graph() -> None:
    """A graph has the learning rate of its recording, unless that lies in memory: here in single precision."""
    batches = make_batches("plain", [8] * 9)
    expected, found, recorder = trained(batches, "plain", optimizer=fused, scheduler=halving)
    assert replays(recorder) == [9 - WARM_UP] * 6
    for name, value in expected.state["model"].items():
        torch.testing.assert_close(found.state["model"][name], value, rtol=1e-6, atol=1e-9)
    assert found.state["stages"] == expected.state["stages"], "rates are numbers for everybody else"


def test_options_that_the_user_changes_reach_the_graph() -> None:
    """Weight decay, recorded once more, and a learning rate without a scheduler."""
    batches = make_batches("plain", [8] * 12)

    def run(made: Any) -> dict[str, Tensor]:
        with made as decoupled:
            for number, (x, y) in enumerate(batches):
                if number in (5, 8):
                    decoupled.synchronize()
                    for optimizer in decoupled.optimizers:
                        name, value = {5: ("weight_decay", 0.1), 8: ("lr", 0.01)}[number]
                        optimizer.param_groups[0][name] = value
                decoupled.train_step(x, y)
            return dict(decoupled.model.state_dict())

    expected = run(compiled("plain", 2, optimizer=fused))
    expected = {name: value.clone() for name, value in expected.items()}
    with fake_graphs() as recorder:
        found = run(graphed("plain", 2, optimizer=fused))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9)
    assert len(recorder.graphs) == 2 * 2 * 2, "of both stages; rates lie in memory from the first change on"


def test_options_that_never_rest_are_trained_on_eagerly() -> None:
    batches = make_batches("plain", [8] * 20)
    with (
        fake_graphs() as recorder,
        pytest.warns(UserWarning, match="options of its optimizer") as said,
        graphed("plain", 1, schedule="sequential") as decoupled,
    ):
        for number, (x, y) in enumerate(batches):
            decoupled.optimizers[0].param_groups[0]["weight_decay"] = number / 100
            decoupled.train_step(x, y)
    assert len(recorder.graphs) == 2 * RECORDINGS and len(said) == 1


def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


def capturable_adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01, capturable=True)


def test_counts_of_steps_lie_on_the_device() -> None:
    """Adam is made capturable for its steps only: the option that others see is the user's."""
    devices = ["cpu", "cuda"]
    module = importlib.import_module("torch.optim.adam")
    with mock.patch.object(module, "_get_capturable_supported_devices", lambda *_, **__: devices):
        batches = make_batches("norm", [8] * 7)
        expected = train(compiled("norm", 2, optimizer=capturable_adam), batches)
        with fake_graphs() as recorder:
            found = train(graphed("norm", 2, optimizer=adam), batches)
    assert replays(recorder) == [7 - WARM_UP] * 4
    assert_same(found.state["model"], expected.state["model"])
    assert_same(found.state["optim"], expected.state["optim"])
    assert all(not group["capturable"] for stage in found.state["stages"] for group in stage["groups"])


def test_a_loaded_state_is_trained_on() -> None:
    """Loading gives the optimizer other tensors: graphs would go on with the old ones."""
    batches = make_batches("dropout", [8] * 12)
    expected = train(compiled("dropout", 2, optimizer=sgd), batches)
    with fake_graphs() as recorder, graphed("dropout", 2) as decoupled:
        for x, y in batches[:6]:
            decoupled.train_step(x, y)
        state = decoupled.state_dict()
        for x, y in batches[:5]:
            decoupled.train_step(x, y)
        decoupled.load_state_dict(state)
        for x, y in batches[6:]:
            decoupled.train_step(x, y)
        found = decoupled.state_dict()
    assert_same(found["model"], expected.state["model"])
    assert len(recorder.graphs) == 2 * 2 * 2


def adagrad(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(params, lr=0.01)


class Asking(nn.Module):
    """A criterion that asks for a value."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(output, target)
        return loss * 2 if loss.item() > 1e9 else loss


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "adagrad": ("Adagrad counts its steps on the host", {"optimizer": adagrad}),
    "accumulate": ("accumulate are for eager stages", {"accumulate": 2}),
    "recompute": ("recompute and accumulate", {"recompute": True}),
    "coupled": ("coupled to its neighbour", {"loss": "bp", "schedule": "sequential"}),
    "encoding": ("an encoding of the target", {"loss": Encoding()}),
    "micro-batches": ("several micro-batches", {"schedule": "micro_batched"}),
    "asking": ("recording it failed: operation not permitted", {"criterion": Asking()}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_trained_on_eagerly(name: str) -> None:
    reason, options = REFUSED[name]
    batches = make_batches("norm", [8] * 6)
    expected = train(compiled("norm", 3, **{"optimizer": sgd, **options}), batches)
    with fake_graphs(), pytest.warns(UserWarning, match=reason):
        found = train(graphed("norm", **options), batches)
    assert_same(found, expected)


def test_processors_have_no_graphs() -> None:
    batches = make_batches("norm", [8] * 3)
    with pytest.warns(UserWarning, match="its device is cpu, and only a GPU has them") as said:
        train(graphed("norm"), batches)
    assert len(said) == 1


def test_saved_tensors_hooks_are_called_for_every_batch() -> None:
    batches = make_batches("norm", [8] * 6)
    counts: list[int] = []

    def count(x: Tensor) -> Tensor:
        counts[-1] += 1
        return x

    warned = pytest.warns(UserWarning, match="saved_tensors_hooks are in force")
    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda x: x)
    with fake_graphs(), graphed("norm", schedule="sequential") as decoupled, hooks, warned:
        for x, y in batches:
            counts.append(0)
            decoupled.train_step(x, y)
    assert counts[0] > 0 and set(counts) == {counts[0]}


def test_the_fake_records_without_running() -> None:
    """What the laws above lean on."""
    x, y = torch.ones(3), torch.zeros(3)

    def work() -> Tensor:
        y.add_(x)
        return y * 2

    recorder = FakeRecorder()
    graph, out = recorder.record(work)
    assert torch.equal(y, torch.zeros(3))
    for times in (1, 2):
        graph.replay()
        assert torch.equal(y, torch.full((3,), float(times))) and torch.equal(out, y * 2)
    asks: Callable[[], Any] = lambda: x.sum().item()  # noqa: E731
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(asks)
