"""Buffers that a forward assigns: written early, so that cuts may lie behind, and with the values of the original."""

from __future__ import annotations

import copy

import pytest
import torch
from stage_builder import SMALL, build
from torch import Tensor, nn

import autodecouple


class Assigning(nn.Module):
    """A counter and a moving mean, assigned in the first block and read nowhere else."""

    steps: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            if index == 1:
                self.steps = self.steps + 1
                self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
                x = x - self.mean
            x = layer(x).tanh()
        return x


class Counting(Assigning):
    """Adds in place, by an assignment: the copy that export puts at the end copies the buffer to itself."""

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            if index == 1:
                self.steps += 1
            x = layer(x).tanh()
        return x


class Late(Assigning):
    """The old value is read again at the end: there is no cut in between, and the write stays behind it."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.mean
        x = super().forward(x)
        return x + before


class Viewed(Assigning):
    """A view of the old value is read at the end."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.mean.view(2, 2)
        x = super().forward(x)
        return x + before.view(4)


@pytest.mark.parametrize(("kind", "stages"), [(Assigning, 4), (Counting, 4), (Late, 2), (Viewed, 1)])
def test_stages_leave_the_buffers_of_the_original(kind: type[Assigning], stages: int) -> None:
    torch.manual_seed(0)
    model = kind()
    original = copy.deepcopy(model)
    built = build(model, torch.randn(4, 4), 4)
    assert len(built.plan.stages) == stages
    for _ in range(3):
        x = torch.randn(4, 4)
        assert torch.equal(built.output(built.run(x)[-1]), original(x))
    for name, buffer in original.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


def test_the_users_buffers_stay_the_same_objects() -> None:
    """Evaluation runs the user's own forward, which assigns another tensor: the stages went on writing into the old."""
    model = Assigning()
    with autodecouple.compile(model, 3, SMALL, example_inputs=(torch.randn(4, 4),), devices=["cpu"]) as decoupled:
        before = dict(model.named_buffers())
        decoupled.train_step(torch.randn(4, 4), torch.arange(4) % 2)
        decoupled(torch.randn(4, 4))
        assert all(model.get_buffer(name) is buffer for name, buffer in before.items())
        assert decoupled.model.get_buffer("steps") == 2, "one step, one call"
