"""Which label meets which part of the features: every rule of Rows against loops in plain Python."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from autodecouple.errors import InputError
from autodecouple.graph import dtype_name
from autodecouple.objectives.heads import IGNORED
from autodecouple.objectives.pool import Pool
from autodecouple.objectives.rows import Rows, most_frequent, nearest
from autodecouple.plans import TensorSpec

torch.set_num_threads(1)

SIZES = st.integers(1, 7)
SEEDS = st.integers(0, 2**31)


def spec(x: Tensor, batch_dim: int = 0) -> TensorSpec:
    return TensorSpec("h", tuple(x.shape), dtype_name(x.dtype), batch_dim)


def labels_spec(*shape: int) -> TensorSpec:
    return TensorSpec("target", shape, "int64", num_classes=5)


def draw(seed: int, features: tuple[int, ...], labels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Features in float64, labels from -2 (several below 0) to 4."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(features, generator=generator, dtype=torch.float64)
    return x, torch.randint(-2, 5, labels, generator=generator)


def by_hand(vectors: list[Tensor], labels: list[int]) -> tuple[Tensor, Tensor]:
    rows = [vector if label >= 0 else torch.zeros_like(vector) for vector, label in zip(vectors, labels, strict=True)]
    return torch.stack(rows), torch.tensor([label if label >= 0 else IGNORED for label in labels])


def check(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def centre(i: int, length: int, size: int) -> int:
    """The label, of `length`, in which the middle of the i-th of `size` equal parts lies."""
    return next(j for j in range(length) if (2 * i + 1) * length < 2 * (j + 1) * size)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.booleans(), SEEDS)
def test_every_token_meets_the_nearest_label(
    num_rows: int, tokens: int, num_labels: int, width: int, masked: bool, seed: int
) -> None:
    x, y = draw(seed, (num_rows, tokens, width), (num_rows, num_labels))
    mask = x[:, :, 0] > -0.5 if masked else None
    rows = Rows(TensorSpec("h", (4, 9, width), "float64"), labels_spec(4, 11 + width))  # the example was longer
    vectors = [x[n, t] for n, t in itertools.product(range(num_rows), range(tokens))]
    labels = [
        int(y[n, centre(t, num_labels, tokens)]) if mask is None or mask[n, t] else -1
        for n, t in itertools.product(range(num_rows), range(tokens))
    ]
    check(rows(x, y, mask), by_hand(vectors, labels))
    assert rows.width == width and rows.has_tokens


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 3).flatmap(lambda n: st.tuples(*[st.tuples(SIZES, st.integers(1, 9))] * n)), SEEDS)
def test_every_position_of_a_grid_meets_the_nearest_label(sizes: tuple[tuple[int, int], ...], seed: int) -> None:
    grid, fine = zip(*sizes, strict=True)
    x, y = draw(seed, (2, 3, *grid), (2, *fine))
    rows = Rows(TensorSpec("h", (2, 3, *[8] * len(grid)), "float64"), labels_spec(2, *[32] * len(grid)))
    places = list(itertools.product(range(2), *map(range, grid)))
    vectors = [x[n, :, *place] for n, *place in places]
    labels = [
        int(y[n, *(centre(i, length, size) for i, length, size in zip(place, fine, grid, strict=True))])
        for n, *place in places
    ]
    check(rows(x, y), by_hand(vectors, labels))
    assert not rows.has_tokens


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 6), SEEDS)
def test_nearest_is_torchs_nearest_where_sizes_divide(size: int, factor: int, seed: int) -> None:
    fine, coarse = (2, size * factor, size), (size, size * factor)
    y = draw(seed, (), fine)[1]
    expected = F.interpolate(y[:, None].double(), coarse, mode="nearest-exact")[:, 0].long()
    assert torch.equal(nearest(y, coarse), expected)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=5))
def test_the_most_frequent_label_is_the_counters(labels: list[list[int]]) -> None:
    expected = []
    for row in labels:
        counter = Counter(sorted(label for label in row if label >= 0))  # sorted: of equals the smallest comes first
        expected.append(counter.most_common(1)[0][0] if counter else -1)
    for shape in ((-1, 6), (-1, 2, 3), (-1, 1, 3, 2)):
        assert torch.equal(most_frequent(torch.tensor(labels).reshape(shape)).clamp(min=-1), torch.tensor(expected))


@pytest.mark.parametrize("labels", [(6, 7), (6, 8, 12), (6, 4, 4, 4)])
@pytest.mark.parametrize("shape, batch_dim", [((6, 5), 0), ((3, 6, 5), 1), ((6, 2, 3, 4, 5, 6), 0), ((6, 5, 1, 1), 0)])
def test_features_without_such_positions_meet_the_most_frequent_label(
    shape: tuple[int, ...], batch_dim: int, labels: tuple[int, ...]
) -> None:
    """States (layers, N, D) among them: layers are no tokens."""
    x, y = draw(1, shape, labels)
    rows, got = Rows(spec(x, batch_dim), labels_spec(*labels))(x, y)
    check((rows, got), by_hand(list(Pool(spec(x, batch_dim))(x)), most_frequent(y).tolist()))


def test_one_label_per_row_meets_pooled_features() -> None:
    x, y = draw(2, (6, 4, 5), (6,))
    mask = x[..., 0] > 0
    check(Rows(spec(x), labels_spec(6))(x, y, mask), by_hand(list(Pool(spec(x))(x, mask)), y.tolist()))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("grid, labels", [((4, 4), (16, 16)), ((4, 6), (64, 96)), ((3, 2, 3), (9, 6, 9))])
def test_tokens_that_are_a_grid_meet_the_labels_of_the_grid(
    prefix: int, grid: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    x, y = draw(3, (2, 7, *grid), (2, *labels))
    front = torch.randn(2, prefix, 7, dtype=torch.float64)
    tokens = torch.cat([front, x.flatten(2).movedim(1, 2)], 1)
    rows, got = (value.unflatten(0, (2, -1)) for value in Rows(spec(tokens), labels_spec(*y.shape))(tokens, y))
    assert got[:, :prefix].eq(IGNORED).all() and rows[:, :prefix].eq(0).all()
    check((rows[:, prefix:].flatten(0, 1), got[:, prefix:].flatten()), Rows(spec(x), labels_spec(*y.shape))(x, y))


def test_a_grid_of_tokens_may_grow_but_keeps_the_labels_shape() -> None:
    rows = Rows(TensorSpec("h", (2, 17, 3), "float32"), labels_spec(2, 16, 16))
    assert rows(torch.randn(2, 37, 3), torch.zeros(2, 24, 24, dtype=torch.int64))[0].shape == (74, 3)
    with pytest.raises(InputError, match=r"38 tokens are no grid for labels \(2, 24, 24\)"):
        rows(torch.randn(2, 38, 3), torch.zeros(2, 24, 24, dtype=torch.int64))


@pytest.mark.parametrize("labels", [(6, 8), (6, 8, 12), (6, 8, 12, 4)])
def test_channels_are_found_on_either_side(labels: tuple[int, ...]) -> None:
    sizes = labels[1:] if len(labels) == 2 else [size // 2 for size in labels[1:]]
    x, y = draw(4, (6, 7, *sizes), labels)
    first, last = (Rows(spec(h), labels_spec(*labels)) for h in (x, x.movedim(1, -1)))
    assert first.width == last.width == 7
    check(first(x, y), last(x.movedim(1, -1), y))


@pytest.mark.parametrize("shape, dim", [((6, 2, 8, 5), 2), ((6, 8, 2, 5), 1), ((6, 7, 8), 2), ((6, 2, 3, 2, 1, 8), 5)])
def test_tokens_are_found_wherever_as_many_as_labels_lie(shape: tuple[int, ...], dim: int) -> None:
    """Attention heads (N, heads, T, D): a cut right behind them would else see the commonest label of its row only."""
    x, y = draw(10, shape, (6, 8))
    tokens = x.movedim(dim, 1).flatten(2)
    rows = Rows(spec(x), labels_spec(6, 8))
    check(rows(x, y), Rows(spec(tokens), labels_spec(6, 8))(tokens, y))
    longer = torch.cat([x, x], dim)
    check(rows(longer, y), Rows(spec(tokens), labels_spec(6, 8))(torch.cat([tokens, tokens], 1), y))


@pytest.mark.parametrize("labels", [(4, 5), (4, 8, 8)])
def test_the_batch_may_be_another_dimension(labels: tuple[int, ...]) -> None:
    shape = (4, 5, 6) if len(labels) == 2 else (4, 3, 2, 2)
    x, y = draw(5, shape, labels)
    swapped = x.movedim(0, 1)
    check(Rows(spec(swapped, 1), labels_spec(*labels))(swapped, y), Rows(spec(x), labels_spec(*labels))(x, y))


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(1, 40), SEEDS)
def test_of_many_positions_some_are_taken_at_equal_distances(
    num_rows: int, tokens: int, max_rows: int, seed: int
) -> None:
    x, y = draw(seed, (num_rows, tokens, 3), (num_rows, tokens))
    rows, labels = Rows(spec(x), labels_spec(*y.shape), max_rows=max_rows)(x, y)
    everything, all_labels = Rows(spec(x), labels_spec(*y.shape))(x, y)
    counted = [i for i, label in enumerate(all_labels.tolist()) if label >= 0]
    number = min(len(counted), max_rows)
    chosen = [counted[centre(k, len(counted), number)] for k in range(number)]
    kept = labels >= 0
    assert len(labels) == min(max_rows, y.numel())
    assert torch.equal(rows[kept], everything[chosen]) and torch.equal(labels[kept], all_labels[chosen])
    assert rows[~kept].eq(0).all() and labels[~kept].eq(IGNORED).all()


def test_a_batch_of_one_label_per_row_is_taken_whole() -> None:
    x, y = draw(6, (30, 3), (30,))
    assert len(Rows(spec(x), labels_spec(30), max_rows=7)(x, y)[0]) == 30


def test_the_default_number_of_rows_reaches_every_position_of_usual_sizes() -> None:
    """At 1024 of 32 x 512 tokens the distance would be 16, and only every 16th token would ever be looked at."""
    for length in (64, 512, 768, 1024):
        y = torch.arange(length).repeat(32, 1) % 5
        x = torch.arange(length, dtype=torch.float32).repeat(32, 1).unsqueeze(-1)
        rows = Rows(spec(x), labels_spec(*y.shape), max_rows=1021)(x, y)[0]
        assert len(rows.unique()) >= min(length, 1021) * 0.6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("shape, labels", [((4, 6, 5), (4, 6)), ((4, 5, 3, 3), (4, 6, 6)), ((4, 5), (4,))])
def test_rows_are_real_and_at_least_single_precision(
    dtype: torch.dtype, shape: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    rows = Rows(spec(x), labels_spec(*labels))
    vectors, _ = rows(x, torch.zeros(labels, dtype=torch.int64))
    vectors.square().sum().backward()
    assert vectors.dtype == torch.float32 and vectors.shape[1] == rows.width == 5 * (2 if dtype.is_complex else 1)
    assert x.grad is not None and x.grad.ne(0).any() and x.grad.dtype == dtype


@pytest.mark.parametrize("labels", [(4, 6), (4,)])
def test_what_does_not_count_may_hold_anything(labels: tuple[int, ...]) -> None:
    x, y = draw(7, (4, 6, 5), labels)
    y[0] = -1
    dirty = x.clone()
    dirty[y < 0] = float("nan")
    dirty.requires_grad_()
    rows = Rows(spec(x), labels_spec(*labels))
    check(rows(dirty, y), rows(x, y))
    rows(dirty, y)[0].sum().backward()
    assert dirty.grad is not None and dirty.grad[y < 0].eq(0).all()


@pytest.mark.parametrize(
    "target, said",
    [
        (torch.zeros(4, 6, 6, dtype=torch.int64), r"shape \(4, 6, 6\).*with 2 dimensions, the first of 4 rows"),
        (torch.zeros(3, dtype=torch.int64), r"shape \(3,\)"),
        (torch.zeros(3, 6, dtype=torch.int64), r"shape \(3, 6\)"),
        (torch.zeros(4, 6), "float32.*int64 class indices"),
    ],
)
def test_targets_unlike_the_examples_are_refused(target: Tensor, said: str) -> None:
    x = torch.randn(4, 6, 5)
    with pytest.raises(InputError, match=said):
        Rows(spec(x), labels_spec(4, 6))(x, target)


def test_labels_per_position_need_a_head_that_was_built_for_them() -> None:
    with pytest.raises(InputError, match=r"shape \(4, 6\).*with 1 dimensions"):
        Rows(TensorSpec("h", (4, 6, 5), "float32"), labels_spec(4))(
            torch.randn(4, 6, 5), torch.zeros(4, 6, dtype=torch.int64)
        )


@pytest.mark.parametrize("shape, labels", [((6, 4, 5), (6, 8)), ((6, 3, 4, 4), (6, 8, 8)), ((6, 7), (6, 8))])
def test_one_label_per_row_is_that_of_every_position(shape: tuple[int, ...], labels: tuple[int, ...]) -> None:
    """A criterion of the user's own may compare logits (N, T, V) with one class per row."""
    x, y = draw(9, shape, labels[:1])
    rows = Rows(spec(x), labels_spec(*labels))
    mask = x[..., 0] > 0 if len(shape) == 3 else None
    check(rows(x, y, mask), rows(x, y.reshape(-1, *[1] * (len(labels) - 1)).expand(labels), mask))
