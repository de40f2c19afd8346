"""InfoNCE of positions against plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from head_tools import classes, gradient_at, head_for, numbers, spec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import autodecouple
from autodecouple.errors import InputError
from autodecouple.objectives import InfoNCE

torch.set_num_threads(1)


def infonce_by_hand(rows: list[Any], weights: list[Tensor], distances: list[int]) -> float:
    """rows: of every batch row, columns of vectors in the order in which they predict; None where none counts."""
    losses = []
    for weight, distance in zip(weights, distances, strict=True):
        pairs = [
            (column[t], column[t + distance])
            for columns in rows
            for column in columns
            for t in range(len(column) - distance)
            if column[t] is not None and column[t + distance] is not None
        ]
        predicted = [weight @ future for _, future in pairs]
        total = 0.0
        for i, (context, _) in enumerate(pairs):
            scores = [float((context @ other).detach()) for other in predicted]
            total += math.log(sum(math.exp(score - scores[i]) for score in scores))
        losses.append(total / max(1, len(pairs)))
    return sum(losses) / len(losses)


def columns_of(maps: Tensor) -> list[Any]:
    """(N, C, H, W) as columns of vectors, from the top down."""
    return [[[row[:, i, j] for i in range(row.shape[1])] for j in range(row.shape[2])] for row in maps]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(4, 6), st.integers(0, 99))
def test_rows_of_maps_predict_the_rows_below(rows: int, channels: int, side: int, seed: int) -> None:
    x, y = numbers(rows, channels, side, side, seed=seed), classes(rows)
    head = head_for(InfoNCE(steps=3), x, y)
    distances = [d for d in (2, 3, 4) if d < side]
    expected = infonce_by_hand(columns_of(x), [layer.weight for layer in head.predict], distances)
    assert head(x, y)[0].item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_large_maps_are_averaged_over_a_grid() -> None:
    x, y = numbers(2, 3, 10, 6), classes(2)
    head = head_for(InfoNCE(steps=2, grid=4), x, y)
    cells = F.adaptive_avg_pool2d(x, (4, 4))
    expected = infonce_by_hand(columns_of(cells), [layer.weight for layer in head.predict], [2, 3])
    assert head(x, y)[0].item() == pytest.approx(expected, rel=1e-10)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 99))
def test_positions_of_sequences_predict_those_that_follow(lengths: list[int], seed: int) -> None:
    x, y = numbers(len(lengths), 6, 3, seed=seed), classes(len(lengths))
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    head = head_for(InfoNCE(steps=3), x, y)
    rows = [[[v if keep else None for v, keep in zip(*row, strict=True)]] for row in zip(x, mask, strict=True)]
    expected = infonce_by_hand(rows, [layer.weight for layer in head.predict], [1, 2, 3])
    filled = x.masked_fill(~mask.unsqueeze(2), math.inf)  # what padding holds does not matter
    assert head(filled, y, mask)[0].item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_of_many_positions_so_many_are_compared() -> None:
    """At equal distances: of 30 pairs at distance 1 those at the middles of 5 equal parts."""
    x, y = numbers(1, 31, 3), classes(1)
    head = head_for(InfoNCE(steps=1, max_rows=5), x, y)
    at = [3, 9, 15, 21, 27]
    context, future = x[0, at], x[0, [i + 1 for i in at]] @ head.predict[0].weight.T
    expected = -(context @ future.T).log_softmax(1).diagonal().mean()
    torch.testing.assert_close(head(x, y)[0], expected, rtol=1e-12, atol=1e-12)


def test_the_target_is_not_looked_at() -> None:
    x, y = numbers(4, 3, 5, 5), classes(4)
    head = head_for(InfoNCE(), x, y)
    assert torch.equal(head(x, y)[0], head(x, torch.randn(4))[0])


@pytest.mark.parametrize(
    "length, distances", [(2, (1,)), (3, (2,)), (4, (2, 3)), (7, (2, 3, 4, 5, 6)), (50, (2, 3, 4, 5, 6))]
)
def test_maps_of_few_rows_have_as_many_distances_as_fit(length: int, distances: tuple[int, ...]) -> None:
    head = head_for(InfoNCE(), numbers(2, 3, length, length), classes(2))
    assert head.distances == distances == tuple(range(distances[0], distances[0] + len(head.predict)))


def test_a_batch_of_short_sequences_gives_0() -> None:
    y = classes(3)
    head = head_for(InfoNCE(steps=3), numbers(3, 6, 4), y)
    x = numbers(3, 1, 4)
    assert head(x, y)[0].item() == 0 and not gradient_at(x, lambda leaf: head(leaf, y)[0]).any()
    assert head(numbers(3, 2, 4), y)[0].item() > 0


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 1, 1), (4, 1, 5)])
def test_what_has_no_positions_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="'infonce' predicts positions from others, but h .*cut elsewhere"):
        head_for(InfoNCE(), numbers(*shape), classes(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_a_float32_loss(dtype: torch.dtype) -> None:
    x = (50 * numbers(4, 3, 4, 4)).to(dtype)
    head = head_for(InfoNCE(), x, classes(4))
    grad = gradient_at(x, lambda leaf: head(leaf, classes(4))[0])
    assert head(x, classes(4))[0].dtype == torch.float32 and grad.isfinite().all() and grad.any()


def model() -> torch.nn.Sequential:
    convs = [torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.ReLU()) for _ in range(4)]
    return torch.nn.Sequential(
        *convs, torch.nn.Flatten(), torch.nn.Linear(75, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)
    )


def test_cuts_that_carry_vectors_are_not_chosen_and_refused_where_they_are_asked_for() -> None:
    x = torch.randn(4, 3, 5, 5)
    plan = autodecouple.plan(model(), x, n_stages=4, loss="infonce", devices=["cpu"])
    assert all(len(cut.spec(cut.features[0]).shape) == 4 for cut in plan.cuts)
    with pytest.raises(InputError, match="'infonce' predicts positions from others"):
        autodecouple.plan(model(), x, n_stages=2, loss="infonce", devices=["cpu"], cut_at=["5"])


def test_where_every_cut_is_refused_the_objective_says_why() -> None:
    layers = [torch.nn.Linear(5, 5) for _ in range(3)]
    with pytest.raises(InputError, match="'infonce' predicts positions from others"):
        autodecouple.plan(torch.nn.Sequential(*layers), torch.randn(4, 5), n_stages=2, loss="infonce", devices=["cpu"])


def test_targets_may_be_anything_where_no_head_looks_at_them() -> None:
    x, y = torch.randn(4, 3, 5, 5), torch.randn(4, 1)
    options: dict[str, Any] = {"criterion": torch.nn.functional.mse_loss, "devices": ["cpu"], "example_target": y}
    with autodecouple.compile(model(), 3, "infonce", example_inputs=(x,), **options) as decoupled:
        assert all(loss is not None and math.isfinite(loss) for loss in decoupled.train_step(x, y).losses)
    with pytest.raises(InputError, match="int64"), autodecouple.compile(model(), 3, example_inputs=(x,), **options):
        pass


@pytest.mark.parametrize("build, said", [(lambda: InfoNCE(steps=0), "steps=0"), (lambda: InfoNCE(skip=-1), "skip=-1")])
def test_choices_are_checked(build: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build()


def test_the_signal_may_be_of_any_kind() -> None:
    x = numbers(4, 3, 5, 5)
    assert InfoNCE().head(spec("h", x), spec("target", torch.randn(4, 7))) is not None
