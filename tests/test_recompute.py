"""recompute=True keeps no activations: a stage's forward runs once more for its backward, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from training_tools import assert_same, compiled, make_batches, sgd, train

import autodecouple
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
        stage.backward = lambda *given: (counts.append(len(saved)), backward(*given))[1]  # type: ignore[method-assign]
        x, y = make_batches("norm", [8])[0]
        decoupled.train_step(x, y)
    assert counts == [0] and saved, "first nothing, then all of it"
