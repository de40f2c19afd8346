"""recompute=True keeps no activations: a stage's forward runs once more for its backward, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from training_tools import assert_same, compiled, make_batches, sgd, train

import autodecouple
from autodecouple import Plan
from autodecouple.errors import PartitionError
from autodecouple.passes.measuring.flops import flop_counter
from autodecouple.schedules import GPipe, MicroBatched


@pytest.mark.parametrize("kind", ["plain", "norm", "dropout"])
@pytest.mark.parametrize(
    "loss, schedule",
    [("supcon", "streaming"), ("supcon", "sequential"), ("supcon", MicroBatched(num_micro_batches=2)),
     ("bp", GPipe(num_micro_batches=2))],
    ids=str,
)  # fmt: skip
def test_it_computes_the_same(kind: str, loss: Any, schedule: Any) -> None:
    """To the last bit: dropout draws the same masks again, and BatchNorm counts each batch once."""
    options: dict[str, Any] = {"schedule": schedule, "optimizer": sgd}
    batches = make_batches(kind, [8, 8, 6])
    kept = train(compiled(kind, 3, loss, **options), batches)
    assert_same(train(compiled(kind, 3, loss, recompute=True, **options), batches), kept)


class Writer(nn.Module):
    """Writes into its input and, behind any cut, into what it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        for layer in self.layers:
            x = layer(x.relu_()) + x
        y: Tensor = self.last(x)
        return y


def test_what_the_forward_overwrites_is_there_again() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 6, generator=generator), torch.arange(8) % 3) for _ in range(3)]
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        options: dict[str, Any] = {"schedule": "sequential", "optimizer": sgd, "recompute": recompute}
        decoupled = autodecouple.compile(Writer(), 3, example_inputs=(batches[0][0].clone(),), **options)
        found.append(train(decoupled, [(x.clone(), y) for x, y in batches]))
    assert_same(*found)


def test_activations_are_not_kept() -> None:
    """Between forward and backward nothing is saved for autograd but by the heads."""
    decoupled = compiled("norm", 2, recompute=True, schedule="sequential")
    stage = decoupled.stages[0]
    saved: list[Tensor] = []
    with decoupled:
        forward = stage.code.body.forward

        def watched(*values: Any) -> Any:
            with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
                return forward(*values)

        stage.code.body.forward = watched  # type: ignore[method-assign]
        counts = []
        backward = stage.backward

        def counting(*given: Any, **options: Any) -> Any:
            counts.append(len(saved))
            return backward(*given, **options)

        stage.backward = counting  # type: ignore[method-assign]
        x, y = make_batches("norm", [8])[0]
        decoupled.train_step(x, y)
    assert counts == [0] and saved, "first nothing, then all of it"


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(4)]
    return nn.Sequential(*blocks, nn.Linear(16, 3))


@pytest.mark.parametrize("loss", ["supcon", "bp"])
def test_the_plan_counts_the_second_forward(loss: str) -> None:
    """It is a part of the backward: FLOPs by torch's own counter over the actions of a step."""
    x, y = torch.randn(32, 16), torch.arange(32) % 3
    options: dict[str, Any] = {"schedule": "sequential", "optimizer": sgd, "devices": ["cpu"]}
    with autodecouple.compile(perceptron(), 2, loss, example_inputs=x, recompute=True, **options) as decoupled:
        counted = [0, 0]
        for stage in decoupled.stages:
            stage.backward = count(stage.backward, counted, stage.index)  # type: ignore[method-assign]
        decoupled.train_step(x, y)
        assert [stage.backward_flops for stage in decoupled.plan.stages] == counted
    once = autodecouple.plan(perceptron(), x, 2, loss, cut_at=[cut.after for cut in decoupled.plan.cuts])
    for stage, kept in zip(decoupled.plan.stages, once.stages, strict=True):
        assert stage.forward_flops == kept.forward_flops
        assert stage.flops == kept.flops + kept.forward_flops
        assert stage.activation_bytes < kept.activation_bytes


def count(run: Any, counted: list[int], index: int) -> Any:
    def counting(*given: Any, **options: Any) -> Any:
        with flop_counter() as counter:
            result = run(*given, **options)
        counted[index] += counter.get_total_flops()
        return result

    return counting


def test_the_plan_keeps_it() -> None:
    """In its JSON, in what it prints, and when it is built: the plan is the whole decision."""
    x = torch.randn(8, 16)
    plan = autodecouple.plan(perceptron(), x, 2, recompute=True)
    assert plan.recompute and Plan.from_json(plan.to_json()) == plan
    assert "runs its forward again" in str(plan)
    assert not autodecouple.plan(perceptron(), x, 2).recompute
    with autodecouple.compile(perceptron(), 2, example_inputs=x, plan=plan, schedule="sequential") as decoupled:
        assert decoupled.plan.recompute and all(stage.training.recompute for stage in decoupled.stages)
        assert decoupled.plan.stages[0].flops == plan.stages[0].flops


def test_the_limit_counts_what_the_plan_prints() -> None:
    x = torch.randn(64, 16)
    plan = autodecouple.plan(perceptron(), x, 2, recompute=True)
    most = max(stage.memory_bytes for stage in plan.stages)
    cuts = [cut.after for cut in plan.cuts]
    assert autodecouple.plan(perceptron(), x, 2, recompute=True, cut_at=cuts, memory_limit=most) == plan
    with pytest.raises(PartitionError, match="memory_limit"):
        autodecouple.plan(perceptron(), x, 2, recompute=True, cut_at=cuts, memory_limit=most - 1)


def test_what_the_first_forward_gave_is_not_kept_beside_the_second() -> None:
    """A stage held its results until its backward was done, although the second forward makes them again."""
    decoupled = compiled("norm", 2, "bp", recompute=True, schedule=GPipe(num_micro_batches=2))
    seen: list[int] = []
    with decoupled:
        stage = decoupled.stages[0]
        backward = stage.backward

        def watched(work: Any, micro_batch: int, gradients: Any, **options: Any) -> Any:
            passage = work.passages[micro_batch]
            result = backward(work, micro_batch, gradients, **options)
            seen.append(len(passage.values))
            return result

        stage.backward = watched  # type: ignore[method-assign]
        decoupled.train_step(*make_batches("norm", [8])[0])
    assert seen == [0, 0]
