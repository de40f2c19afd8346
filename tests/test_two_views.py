"""Batches of two views per row."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autodecouple
from autodecouple.errors import InputError
from autodecouple.objectives import SupCon
from autodecouple.two_views import TwoViews, collate_views

torch.set_num_threads(1)


class Viewed(TensorDataset):
    """As torchvision's datasets: a transform of the image."""

    def __init__(self, transform: Any, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y)
        self.transform = transform

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return self.transform(image), label


def test_a_batch_is_the_first_views_then_the_second_with_the_labels_twice() -> None:
    x, y = torch.arange(6.0).reshape(6, 1), torch.arange(6)
    loader = DataLoader(Viewed(TwoViews(lambda v: v + 10, lambda v: -v), x, y), batch_size=4, collate_fn=collate_views)
    batches = list(loader)
    assert torch.equal(batches[0][0], torch.cat([x[:4] + 10, -x[:4]]))
    assert torch.equal(batches[0][1], torch.cat([y[:4], y[:4]])) and len(batches[1][1]) == 4


def test_views_may_be_nested() -> None:
    items = [(({"a": torch.tensor([i]), "b": 2 * i}, {"a": torch.tensor([-i]), "b": 3 * i}), i) for i in range(1, 3)]
    inputs, targets = collate_views(items)
    assert inputs["a"].tolist() == [[1], [2], [-1], [-2]] and inputs["b"].tolist() == [2, 4, 3, 6]
    assert targets.tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "items, said",
    [
        ([(torch.zeros(2, 3), 0)], "its input is Tensor: give the dataset transform=TwoViews"),
        ([((torch.zeros(2), torch.zeros(3)), 0)], r"one shape per row, but are \(1, 2\) and \(1, 3\)"),
    ],
)
def test_what_is_no_pair_is_refused(items: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        collate_views(items)


def test_two_views_give_every_row_a_positive() -> None:
    """Of labels that are all different SupCon learns nothing from one view, and something from two."""
    x, y = torch.randn(8, 6), torch.arange(8)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 8))
    views = TwoViews(lambda v: v, lambda v: v + 0.1 * torch.randn_like(v))
    loader = DataLoader(Viewed(views, x, y), batch_size=8, collate_fn=collate_views)
    with autodecouple.compile(model, 2, SupCon(hidden=8, out=4), example_inputs=(x,), devices=["cpu"]) as decoupled:
        assert decoupled.train_step(x, y).losses[0] == 0
        losses = [decoupled.train_step(*batch).losses[0] for batch in loader]
    assert losses[0] is not None and losses[0] > 0


@pytest.mark.slow
def test_scpls_views_are_images_of_the_size_asked_for() -> None:
    from zoo import ops  # makes torchvision load, whatever it was built for

    assert ops.torchvision is not None
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    first, second = TwoViews.scpl(32)(image)
    assert first.shape == second.shape == (3, 32, 32) and first.dtype == second.dtype == torch.float32
    assert first.min() >= 0 and second.max() <= 1
    normal, _ = TwoViews.scpl(32, (0.5,) * 3, (0.5,) * 3)(image)
    assert normal.min() < 0


@pytest.mark.slow
def test_timms_lars_is_an_optimizer_like_any_other() -> None:
    from zoo import ops

    optim = importlib.import_module(f"{ops.timm.__name__}.optim")

    def lars(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = optim.create_optimizer_v2(params, "lars", lr=0.1, momentum=0.9)
        return found

    x, y = torch.randn(8, 6), torch.arange(8) % 4
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 4))
    with autodecouple.compile(model, 2, example_inputs=(x,), devices=["cpu"], optimizer=lars) as decoupled:
        before = [parameter.detach().clone() for parameter in model.parameters()]
        decoupled.train_step(x, y)
        decoupled.synchronize()
        assert not any(torch.equal(a, b) for a, b in zip(before, decoupled.model.parameters(), strict=True))
