"""Pool, layers and the checks: every shape a cut may have comes out as finite rows of a known width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from autodecouple.errors import InputError
from autodecouple.objectives.heads import (
    IGNORED,
    Projector,
    RowNorm,
    check_classes,
    check_specs,
    cross_entropy,
    unit_rows,
)
from autodecouple.objectives.pool import Pool, mean_cells
from autodecouple.plans import TensorSpec

torch.set_num_threads(1)

LABELS = TensorSpec("target", (4,), "int64", num_classes=3)


def spec(*shape: int, batch_dim: int | None = 0, dtype: str = "float32") -> TensorSpec:
    return TensorSpec("h", shape, dtype, batch_dim)


@pytest.mark.parametrize(
    "shape, width",
    [((4, 6), 6), ((4, 5, 6), 6), ((4, 3, 8, 8), 12), ((4, 3, 7, 5), 12), ((4, 3, 1, 1), 3), ((4, 3, 1, 9), 3),
     ((4, 3, 4, 6, 2), 24), ((4, 3, 1, 6, 2), 3), ((4, 3, 4, 6, 2, 5), 24), ((4, 3, 4, 6, 1, 1, 1), 3),
     ((4, 8, 8, 3), 12), ((4, 5, 5, 5, 3), 24)],
)  # fmt: skip
def test_pool_gives_rows_of_its_width(shape: tuple[int, ...], width: int) -> None:
    pool = Pool(spec(*shape))
    assert pool.width == width
    assert pool(torch.randn(shape)).shape == (4, width)


def test_channels_behind_a_square_grid_are_read_as_channels() -> None:
    x = torch.randn(4, 8, 8, 3)
    assert torch.equal(Pool(spec(4, 8, 8, 3))(x), Pool(spec(4, 3, 8, 8))(x.movedim(-1, 1)))
    assert torch.equal(Pool(spec(4, 8, 8, 3), None)(x), x.flatten(1))


@pytest.mark.parametrize("shape, real", [((4, 6), (4, 12)), ((4, 5, 6), (4, 5, 12)), ((4, 3, 7, 5), (4, 6, 7, 5))])
@pytest.mark.parametrize("size", [2, None])
def test_complex_features_are_twice_as_many_real_ones(
    shape: tuple[int, ...], real: tuple[int, ...], size: int | None
) -> None:
    x = torch.randn(shape, dtype=torch.complex64)
    pool = Pool(spec(*shape, dtype="complex64"), size)
    dim = 1 if len(shape) == 4 else -1
    assert torch.equal(pool(x), Pool(spec(*real), size)(torch.cat([x.real, x.imag], dim)))
    assert pool.width == pool(x).shape[1] and pool(x).dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_grids_are_pooled_as_by_adaptive_pooling(height: int, width: int, size: int, seed: int) -> None:
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pool = Pool(spec(2, 3, 32, 32), size)  # the example was larger than what comes
    torch.testing.assert_close(pool(x), F.adaptive_avg_pool2d(x, size).flatten(1), rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_cells_are_those_of_adaptive_pooling_also_where_they_are_finer(length: int, cells: int) -> None:
    x = torch.randn(2, 3, length, dtype=torch.float64)
    torch.testing.assert_close(mean_cells(x, 2, cells), F.adaptive_avg_pool1d(x, cells), rtol=1e-12, atol=1e-12)


def test_volumes_are_pooled_as_by_adaptive_pooling() -> None:
    x = torch.randn(2, 3, 5, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(Pool(spec(2, 3, 5, 4, 7))(x), F.adaptive_avg_pool3d(x, 2).flatten(1))


def test_pooling_is_deterministic_by_torchs_own_list() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        Pool(spec(2, 3, 7, 5))(torch.randn(2, 3, 7, 5, requires_grad=True)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_padded_tokens_do_not_count_whatever_they_hold() -> None:
    tokens = torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    rows = Pool(spec(3, 4, 5))(tokens, mask)
    expected = torch.stack([tokens[0, :2].mean(0), tokens[1].mean(0), torch.zeros(5)])
    torch.testing.assert_close(rows, expected)
    dirty = tokens.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    again = Pool(spec(3, 4, 5))(dirty, mask)
    assert torch.equal(again, rows)
    again.sum().backward()
    assert dirty.grad is not None and dirty.grad[~mask].eq(0).all()


def test_a_mask_is_ignored_where_there_are_no_tokens() -> None:
    x, mask = torch.randn(2, 3, 4, 4), torch.zeros(2, 9, dtype=torch.bool)
    assert torch.equal(Pool(spec(2, 3, 4, 4))(x, mask), Pool(spec(2, 3, 4, 4))(x))


@pytest.mark.parametrize("size", [2, None])
def test_the_batch_may_be_another_dimension(size: int | None) -> None:
    x, mask = torch.randn(5, 4, 6), torch.rand(4, 5) > 0.3
    rows = Pool(spec(5, 4, 6, batch_dim=1), size)(x, mask)
    assert torch.equal(rows, Pool(spec(4, 5, 6), size)(x.movedim(1, 0), mask))


def test_flattening_keeps_every_value_and_the_examples_size() -> None:
    pool = Pool(spec(4, 3, 2, 5), None)
    x = torch.randn(7, 3, 2, 5)
    assert torch.equal(pool(x), x.flatten(1)) and pool.width == 30
    with pytest.raises(InputError, match=r"30 values per row.*\(7, 3, 4, 5\).*pool=2"):
        pool(torch.randn(7, 3, 4, 5))


def test_flattened_padding_counts_as_zeros() -> None:
    tokens, mask = torch.randn(2, 3, 4), torch.tensor([[True, False, False], [True, True, True]])
    rows = Pool(spec(2, 3, 4), None)(tokens, mask)
    assert rows[0, 4:].eq(0).all() and torch.equal(rows[1], tokens[1].flatten())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6), (4, 3, 7, 5), (4, 3, 8, 8)])
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 60000.0).to(dtype)  # a sum of two would overflow float16
    rows = Pool(spec(*shape))(x)
    assert rows.dtype == torch.float32 and rows.isfinite().all()


@pytest.mark.parametrize(
    "kind, batch_norm, layers",
    [("identity", False, []), ("linear", False, ["Linear"]), ("mlp", False, ["Linear", "ReLU", "Linear"]),
     ("mlp", True, ["Linear", "RowNorm", "ReLU", "Linear"])],
)  # fmt: skip
def test_projectors_are_the_papers(kind: str, batch_norm: bool, layers: list[str]) -> None:
    projector = Projector(6, (8, 5), kind, batch_norm)
    assert [type(layer).__name__ for layer in projector] == layers
    assert projector(torch.randn(4, 6)).shape == (4, projector.width)
    assert projector.width == (5 if layers else 6)


def test_row_norm_is_batch_norm_but_for_one_row() -> None:
    ours, theirs, x = RowNorm(5), nn.BatchNorm1d(5), torch.randn(4, 5)
    assert torch.equal(ours(x), theirs(x))
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.train()(x[:1]), theirs(x[:1]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(0, 2**31))
def test_rows_that_do_not_count_are_as_if_they_were_not_there(counted: list[bool], seed: int) -> None:
    counts = torch.tensor(counted)
    x = torch.randn(len(counts), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x.requires_grad_()
    ours, theirs = RowNorm(5, dtype=torch.float64), nn.BatchNorm1d(5, dtype=torch.float64)
    for norm in (ours, theirs):
        nn.init.constant_(norm.running_mean, 0.3)
        nn.init.constant_(norm.weight, 0.7)
    got = ours(x, counts)[counts]
    expected = theirs.train(sum(counted) > 1)(x[counts])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for name, value in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), value, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_cross_entropy_is_torchs_but_for_a_batch_without_labels() -> None:
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, IGNORED, 2, 2, IGNORED])
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits, labels))
    nothing = cross_entropy(logits.requires_grad_(), torch.full((5,), IGNORED))
    nothing.backward()
    assert nothing.item() == 0 and logits.grad is not None and logits.grad.eq(0).all()


def test_unit_rows_normalise_and_leave_zeros_alone() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    units = unit_rows(x)
    torch.testing.assert_close(units, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    units.sum().backward()
    assert x.grad is not None and x.grad[1].abs().max() <= 1  # F.normalize gives 1e12 here


@pytest.mark.parametrize(
    "features, signal, said",
    [
        (spec(4, 6), TensorSpec("target", (4,), "float32", num_classes=3), r"int64 class indices.*float32.*long\(\)"),
        (spec(4, 6), TensorSpec("target", (4, 9), "float32"), "int64 class indices"),
        (spec(4, 6), TensorSpec("target", (4,), "int32", num_classes=3), "int32"),
        (spec(4, 6), TensorSpec("target", (), "int64", None, num_classes=3), r"\(N,\), \(N, T\)"),
        (spec(4, 6), TensorSpec("target", (4, 1, 1, 1, 1), "int64", num_classes=3), r"\(N, D, H, W\)"),
        (spec(4, 6, dtype="int64"), LABELS, "floating-point"),
        (spec(4, 6, dtype="bool"), LABELS, "floating-point"),
        (spec(4), LABELS, r"\(N, C, H, W\)"),
        (spec(4, 6, batch_dim=None), LABELS, r"\(N, C, H, W\)"),
        (spec(36, 6), LABELS, "36 rows for 4 targets"),
    ],
)
def test_specs_that_do_not_fit_are_refused_with_a_way_out(features: TensorSpec, signal: TensorSpec, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        check_specs("supcon", features, signal)
    assert "'supcon'" in str(caught.value) and 'loss="bp"' in str(caught.value)


@pytest.mark.parametrize("shape", [(9, 4), (9, 4, 6), (9, 4, 3, 3), (9, 4, 3, 3, 3, 3, 3)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("labels", [(4,), (4, 7), (4, 7, 5), (4, 7, 5, 3)])
def test_any_features_with_rows_fit_any_class_indices(
    shape: tuple[int, ...], dtype: str, labels: tuple[int, ...]
) -> None:
    check_specs("supcon", spec(*shape, batch_dim=1, dtype=dtype), TensorSpec("target", labels, "int64"))


def test_the_number_of_classes_must_be_known_to_those_who_ask() -> None:
    assert check_classes("early_exit", LABELS) == 3
    with pytest.raises(InputError, match="'early_exit'.*num_classes=None.*supcon.*bp"):
        check_classes("early_exit", TensorSpec("target", (4,), "int64"))


def test_building_draws_from_the_ambient_generator_only() -> None:
    def weights() -> list[Tensor]:
        torch.manual_seed(7)
        return [p.detach() for p in Projector(6, (8, 5)).parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))
