"""Coupled stages on ranks, in torch's runtime of pipelines: gradients of backprop, states, and ends with a reason."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rank_tools import Outcome, run_ranks
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from training_tools import assert_same, before_actions, comparable, compiled, make_batches, sgd, train

import autodecouple
from autodecouple.executors.job import Job
from autodecouple.graph import Graph
from autodecouple.schedules import Action, GPipe, Interleaved, OneFOneB, Op, Schedule, ZeroBubble

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

SCHEDULES: dict[str, tuple[int, int, Schedule]] = {
    "gpipe, two stages a rank": (2, 4, GPipe(num_micro_batches=3)),
    "1f1b, four ranks": (4, 4, OneFOneB(num_micro_batches=5)),
    "interleaved": (2, 4, Interleaved(num_micro_batches=4)),
    "interleaved, three ranks": (3, 6, Interleaved(num_micro_batches=4)),
    "zero bubble, two stages a rank": (2, 4, ZeroBubble(num_micro_batches=3)),
    "zero bubble, four ranks": (4, 4, ZeroBubble(num_micro_batches=5)),
}
"""Ranks, stages and schedule."""
QUICK = ("interleaved, three ranks", "zero bubble, four ranks")
SHORT = [case for case, (_, n_stages, _) in SCHEDULES.items() if n_stages <= 4]
"""What a network that has one parameter in most of its layers can be cut into."""


def cases(names: Iterable[str]) -> Any:
    return pytest.mark.parametrize(
        "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]
    )


class Mixed(nn.Module):
    """What may cross a cut: several tensors with a gradient, a mask, a number that the mask makes, and None."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))
        self.bias = nn.Parameter(torch.linspace(-1, 1, 6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor, shift: Tensor | None = None) -> dict[str, Tensor | None]:
        skip = h = self.layers[0](x).tanh()
        share = mask.sum(1, keepdim=True)
        for index, layer in enumerate(self.layers[1:]):
            h = layer(h * mask).tanh() + self.bias
            h = h + skip / share if index % 3 == 1 else h
            h = h if shift is None else h + shift
        return {"logits": self.head(h), "shift": shift}


def loss_of(output: dict[str, Any], target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output["logits"], target)


def mixed_batches(sizes: Sequence[int]) -> list[tuple[dict[str, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            {
                "x": torch.randn(rows, 6, generator=generator, dtype=torch.float64),
                "mask": (torch.rand(rows, 6, generator=generator) < 0.7).double() + 0.5,
            },
            torch.randint(4, (rows,), generator=generator),
        )
        for rows in sizes
    ]


def captured(model: nn.Module, batches: Sequence[tuple[Any, Any]], **options: Any) -> Graph:
    return autodecouple.capture(model, batches[0][0], **options)


def backprop(
    model: nn.Module, batches: Sequence[tuple[Any, Any]], criterion: Callable[[Any, Tensor], Tensor]
) -> tuple[list[float], dict[str, Tensor]]:
    """Plain autograd in one process, without anything of this library."""
    optimizer, losses = sgd(list(model.parameters())), []
    for inputs, target in batches:
        loss = criterion(model(**inputs) if isinstance(inputs, dict) else model(inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, dict(model.state_dict())


def train_on_ranks(size: int, compile_: Callable[[], Any], batches: Sequence[tuple[Any, Any]]) -> list[Outcome]:
    """Only the first rank is given the batches; torch's runtime takes every one of them."""

    def rank(number: int) -> Any:
        own = batches if number == 0 else [(None, None)] * len(batches)
        with mock.patch.object(
            _PipelineScheduleRuntime, "step", autospec=True, side_effect=_PipelineScheduleRuntime.step
        ) as step:
            found = train(compile_(), own)
            assert step.call_count == len(batches)
        return found

    outcomes = run_ranks(size, rank)
    assert [outcome.error for outcome in outcomes] == [None] * size, outcomes
    return outcomes


def assert_is_backprop(outcomes: Sequence[Outcome], losses: list[float], weights: dict[str, Tensor]) -> None:
    """Micro-batches add up gradients in parts, in float64: the last few bits may differ."""
    for outcome in outcomes:
        for name, value in weights.items():
            torch.testing.assert_close(outcome.value.state["model"][name], value, rtol=1e-9, atol=1e-11)
    last = next(o.value for o in outcomes if o.value.outputs[0] is not None)
    assert [step[-1] for step in last.losses] == pytest.approx(losses, rel=1e-9)


# --- law 4 ---------------------------------------------------------------------------------------------------------


@cases(SHORT)
def test_coupled_stages_on_ranks_equal_backprop(case: str) -> None:
    """Losses and weights after five steps, the fourth of few rows; nobody asks for an executor."""
    size, n_stages, schedule = SCHEDULES[case]
    batches = mixed_batches([8, 7, 8, 2, 8])
    model = Mixed().double()
    expected = backprop(copy.deepcopy(model), batches, loss_of)
    graph = captured(model, batches)
    outcomes = train_on_ranks(
        size,
        lambda: autodecouple.compile(graph, n_stages, "bp", schedule=schedule, criterion=loss_of, optimizer=sgd),
        batches,
    )
    assert_is_backprop(outcomes, *expected)


@cases(SCHEDULES)
def test_coupled_stages_on_ranks_equal_one_process(case: str) -> None:
    """To the last bit, with dropout, BatchNorm and smaller batches: losses, outputs and the whole state."""
    size, n_stages, schedule = SCHEDULES[case]
    batches = make_batches("dropout", [8, 8, 3, 8, 2])
    options: dict[str, Any] = {"schedule": schedule, "optimizer": sgd, "accumulate": 2, "clip_grad_norm": 0.5}
    expected = train(compiled("dropout", n_stages, "bp", lanes=size, executor="inline", **options), batches)
    outcomes = train_on_ranks(size, lambda: compiled("dropout", n_stages, "bp", devices=None, **options), batches)
    for outcome in outcomes:
        assert_same(outcome.value.state, expected.state)
    assert_same(outcomes[-1].value.losses, expected.losses)
    assert_same(outcomes[-1].value.outputs, expected.outputs)
    assert outcomes[0].value.outputs == [None] * len(batches)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)))
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens)).mean(1))  # type: ignore[no-any-return]


def test_untied_parameters_are_trained_apart() -> None:
    """As backprop trains the two that the plan says there are; the first stage's inputs are numbers of tokens."""
    batches = [(torch.arange(rows * 5).reshape(rows, 5) % 10, torch.arange(rows) % 10) for rows in (6, 4, 6)]
    model = Tied().double()
    graph = captured(model, batches, tied="untie")
    assert model.head.weight is not model.embedding.weight
    expected = backprop(copy.deepcopy(model), batches, nn.functional.cross_entropy)
    outcomes = train_on_ranks(
        2,
        lambda: autodecouple.compile(graph, 4, "bp", schedule=ZeroBubble(num_micro_batches=2), optimizer=sgd),
        batches,
    )
    assert_is_backprop(outcomes, *expected)


# --- what is read, kept and loaded ---------------------------------------------------------------------------------


def test_a_state_goes_over_between_ranks_and_one_process(tmp_path: Path) -> None:
    """Three batches on ranks, saved, three in one process; every rank reads the same model and evaluates it."""
    batches = make_batches("dropout", [8, 8, 5, 8, 3, 8])
    options: dict[str, Any] = {"optimizer": sgd, "schedule": Interleaved(num_micro_batches=2)}
    whole = train(compiled("dropout", 4, "bp", lanes=2, executor="inline", **options), batches)

    def rank(number: int) -> Any:
        with compiled("dropout", 4, "bp", devices=None, **options) as decoupled:
            for x, y in batches[:3]:
                decoupled.train_step(x, y)
            decoupled.save(tmp_path / "kept")
            output = decoupled(batches[0][0])
            accuracy = decoupled.evaluate(batches[:2])
            weights = {name: value.clone() for name, value in decoupled.model.state_dict().items()}
            decoupled.load(tmp_path / "kept")
            for x, y in batches[3:]:
                decoupled.train_step(x, y)
            return output, accuracy, weights, comparable(decoupled.state_dict())

    first, second = (outcome.value for outcome in run_ranks(2, rank))
    assert_same(first, second)
    assert_same(first[-1], whole.state)
    with compiled("dropout", 4, "bp", lanes=1, executor="inline", optimizer=sgd, schedule=OneFOneB(2)) as decoupled:
        decoupled.load(tmp_path / "kept")
        assert_same(dict(decoupled.model.state_dict()), first[2])
        assert_same(train(decoupled, batches[3:]).state, whole.state)


# --- failures ------------------------------------------------------------------------------------------------------


def run_into(stage: int, op: Op, act: Callable[[], None]) -> list[Outcome]:
    """Two ranks that train for long, on one of which something happens in the third batch."""
    schedule = ZeroBubble(num_micro_batches=2)
    compiled("norm", 4, "bp", lanes=2, executor="inline", schedule=schedule).close()
    batches = make_batches("norm", [8] * 100)

    def hook(job: Job, action: Action) -> None:
        if (action, job.index) == (Action(stage, op, 1), 2):
            act()

    def rank(number: int) -> Any:
        with before_actions(hook):
            train(compiled("norm", 4, "bp", devices=None, schedule=schedule), batches)

    return run_ranks(2, rank)


@pytest.mark.parametrize(
    ("stage", "op"),
    [(2, Op.FORWARD), pytest.param(1, Op.BACKWARD, marks=pytest.mark.slow), (3, Op.WEIGHT)],
    ids=str,
)
def test_an_error_ends_all_ranks_and_names_the_stage(stage: int, op: Op) -> None:
    def fail() -> None:
        raise ValueError("boom")

    outcomes = run_into(stage, op, fail)
    own = outcomes.pop(stage % 2)
    where = f"{op.name.lower()} of stage {stage} of 4"
    assert own.error == "ValueError" and "boom" in own.message and where in own.message
    assert outcomes[0].error == "PeerError" and outcomes[0].seconds < 30
    assert "ValueError: boom" in outcomes[0].message and where in outcomes[0].message


def test_a_killed_rank_is_named() -> None:
    killed, other = reversed(run_into(1, Op.FORWARD, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert killed.exit_code == -signal.SIGKILL
    assert other.error == "PeerError" and "rank 1 (stages 1, 3) is gone" in other.message and other.seconds < 30
