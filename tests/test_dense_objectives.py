"""Objectives where labels are per token or position, may not count, or come in unknown number."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from autodecouple.errors import InputError
from autodecouple.graph import dtype_name
from autodecouple.objectives import DGL, DeInfoReg, EarlyExit, InfoPro, Objective, PredSim, SupCon
from autodecouple.plans import TensorSpec

torch.set_num_threads(1)

SMALL: list[Any] = [
    *(SupCon(normalisation=how, hidden=8, out=6) for how in ("code", "eq2", "alg1")),
    *(DeInfoReg(ce=ce, alpha=0.1, projector="mlp", widths=(8, 6)) for ce in ("merge", "unmerge", "paper")),
    DeInfoReg(alpha=0, widths=(8, 6), batch_norm=False),
    EarlyExit(hidden=8),
    EarlyExit(hidden=None),
]
ALL: list[Any] = [
    *SMALL,
    DGL(width=8),
    PredSim(beta=0.5),
    InfoPro(SupCon(hidden=8, out=6), reconstruction=(0, 0)),
]
"""With those whose convolutions normalise before it is known which positions count."""
CASES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((6, 4, 5), (6, 4)),
    ((6, 4, 5), (6, 8)),
    ((6, 3, 4, 4), (6, 8, 8)),
    ((6, 4, 4, 3), (6, 8, 8)),
    ((6, 17, 3), (6, 8, 8)),
    ((6, 2, 2, 3, 4), (6, 2, 6, 4)),
    ((6, 5), (6, 4)),
    ((6, 5), (6, 3, 3)),
]


def head_for(objective: Objective, x: Tensor, y: Tensor, batch_dim: int = 0) -> nn.Module:
    torch.manual_seed(0)
    features = TensorSpec("h", tuple(x.shape), dtype_name(x.dtype), batch_dim)
    return objective.head(features, TensorSpec("target", tuple(y.shape), "int64", num_classes=5))


def draw(seed: int, features: tuple[int, ...], labels: tuple[int, ...], low: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(features, generator=generator, dtype=torch.float64)
    return x, torch.randint(low, 5, labels, generator=generator)


def train(head: nn.Module, x: Tensor, y: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient at the features."""
    x = x.detach().requires_grad_()
    loss = head(x, y, mask)[0]
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def same_state(a: nn.Module, b: nn.Module) -> None:
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=name)
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)


# Laws


@pytest.mark.parametrize("objective", SMALL, ids=repr)
@settings(max_examples=15, deadline=None)
@given(
    labels=st.lists(st.integers(-3, 3), min_size=2, max_size=9).filter(lambda y: max(y) >= 0), seed=st.integers(0, 99)
)
def test_a_label_below_zero_is_a_row_less(objective: Objective, labels: list[int], seed: int) -> None:
    """Loss, gradients and the statistics of normalisation are those of the batch without these rows."""
    x, y = draw(seed, (len(labels), 5), ())[0], torch.tensor(labels)
    whole = head_for(objective, x, y)
    less, counts = copy.deepcopy(whole), y >= 0
    loss, gradient = train(whole, x, y)
    expected, expected_gradient = train(less, x[counts], y[counts])
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradient[counts], expected_gradient, rtol=1e-8, atol=1e-10)
    assert gradient[~counts].eq(0).all()
    same_state(whole, less)


@pytest.mark.parametrize("objective", SMALL, ids=repr)
def test_tokens_with_labels_are_rows(objective: Objective) -> None:
    """The loss is that of a batch of vectors, one per token that counts."""
    x, y = draw(1, (6, 4, 5), (6, 4), low=-2)
    mask = torch.arange(4) < torch.tensor([4, 3, 2, 1, 0, 4]).unsqueeze(1)
    counts = mask & (y >= 0)
    tokens = head_for(
        dataclasses.replace(objective, projector="mlp") if hasattr(objective, "projector") else objective, x, y
    )
    vectors = copy.deepcopy(tokens)
    vectors.rows = head_for(objective, x[counts], y[counts]).rows
    loss, gradient = train(tokens, x, y, mask)
    expected, expected_gradient = train(vectors, x[counts], y[counts])
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient[counts], expected_gradient, rtol=1e-8, atol=1e-10)
    same_state(tokens, vectors)


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_a_batch_in_which_no_label_counts_trains_nothing(objective: Objective) -> None:
    for x, y in (draw(2, (6, 5), (6,)), draw(2, (6, 4, 5), (6, 4)), draw(2, (1, 5), (1,))):
        head = head_for(objective, x, y)
        loss, gradient = train(head, x, torch.full_like(y, -100))
        assert loss == 0 and gradient.eq(0).all()
        assert all(p.grad is None or p.grad.eq(0).all() for p in head.parameters())


@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize(
    "shape, labels", [((6, 4, 5), (6, 4)), ((6, 3, 4, 4), (6, 4, 4)), ((2, 3, 2, 3, 4), (2, 2, 3, 4))]
)
def test_early_exit_is_torchs_cross_entropy_of_a_classifier_per_position(
    hidden: int | None, shape: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    x, y = draw(3, shape, labels, low=-1)
    y = y.masked_fill(y < 0, -100)
    head = head_for(EarlyExit(hidden=hidden), x, y)
    scores = head.classifier(x if len(shape) == 3 else x.movedim(1, -1))
    torch.testing.assert_close(head(x, y)[0], F.cross_entropy(scores.movedim(-1, 1), y), rtol=1e-12, atol=1e-12)


def test_supcon_leaves_out_what_does_not_count() -> None:
    """Written out: anchors, positives and negatives among the rows that count."""
    x, y = draw(4, (3, 4, 5), (3, 4), low=-2)
    z = F.normalize(x.reshape(-1, 5), dim=1)
    labels, terms = y.flatten().tolist(), []
    counted = [i for i, label in enumerate(labels) if label >= 0]
    for i in counted:
        others = [j for j in counted if j != i]
        bottom = sum(math.exp(float(z[i] @ z[j]) / 0.1) for j in others)
        positives = [j for j in others if labels[j] == labels[i]]
        terms.append(
            -sum(math.log(math.exp(float(z[i] @ z[j]) / 0.1) / bottom) for j in positives) / (len(positives) + 1)
        )
    loss = head_for(SupCon(projector="identity"), x, y)(x, y)[0]
    assert loss.item() == pytest.approx(sum(terms) / len(counted), rel=1e-10)


@pytest.mark.parametrize("objective", [SupCon(max_rows=9), DeInfoReg(max_rows=9), EarlyExit(max_rows=9)], ids=repr)
def test_the_number_of_positions_is_limited(objective: Objective) -> None:
    x, y = draw(5, (6, 4, 5), (6, 4))
    gradient = train(head_for(objective, x, y), x, y)[1]
    assert gradient.ne(0).any(2).sum() == 9
    vectors, classes = draw(5, (30, 5), (30,))
    gradient = train(head_for(objective, vectors, classes), vectors, classes)[1]
    assert gradient.ne(0).any(1).all()


# Every case of features and labels


@pytest.mark.parametrize("objective", ALL, ids=repr)
@pytest.mark.parametrize("shape, labels", CASES, ids=str)
def test_any_labels_give_a_finite_loss_and_gradient(
    objective: Objective, shape: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    x, y = (value.float() if value.is_floating_point() else value for value in draw(6, shape, labels, low=-1))
    head = head_for(objective, x, y)
    for rows in (6, 2, 1):
        small, few = x[:rows].requires_grad_(), y[:rows].clamp(min=0)
        loss, signal = head(small, few)
        (gradient,) = torch.autograd.grad(loss, small)
        assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite() and signal is few
        assert gradient.isfinite().all()
    loss, gradient = train(head, x, y)
    assert loss.isfinite() and gradient.isfinite().all() and gradient.ne(0).any()


@pytest.mark.parametrize("objective", ALL, ids=repr)
@pytest.mark.parametrize("shape, labels", CASES, ids=str)
def test_heads_run_on_fake_and_meta_tensors(
    objective: Objective, shape: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    with FakeTensorMode():
        x, y = torch.randn(shape, requires_grad=True), torch.zeros(labels, dtype=torch.int64)
        head_for(objective, x, y)(x, y)[0].backward()
    assert x.grad is not None and x.grad.shape == x.shape
    with torch.device("meta"):
        x, y = torch.randn(shape, requires_grad=True), torch.zeros(labels, dtype=torch.int64)
        mask = torch.ones(shape[:2], dtype=torch.bool) if len(shape) == 3 else None
        head_for(dataclasses.replace(objective, max_rows=5), x, y)(x, y, mask)[0].backward()
    assert x.grad is not None and x.grad.is_meta


@pytest.mark.parametrize("objective", ALL, ids=repr)
@pytest.mark.parametrize("shape, labels", CASES, ids=str)
def test_losses_under_autocast_are_taken_in_float32(
    objective: Objective, shape: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    x, y = draw(7, shape, labels, low=-1)
    x = x.float().requires_grad_()
    head = head_for(objective, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(x, y)[0]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    torch.testing.assert_close(loss, head(x, y)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("objective", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("shape, labels", [((6, 5), (6,)), ((6, 4, 5), (6, 4)), ((6, 3, 4, 4), (6, 4, 4))], ids=str)
def test_any_number_format_gives_a_float32_loss(
    objective: Objective, dtype: torch.dtype, shape: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    x, y = draw(8, shape, labels)
    x = (x + 1j * x.flip(1) if dtype.is_complex else 50 * x).to(dtype)
    loss, gradient = train(head_for(objective, x, y), x, y)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.ne(0).any()


@pytest.mark.parametrize("objective", ALL, ids=repr)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_double_precision_stays(objective: Objective, dtype: str) -> None:
    x, y = draw(9, (6, 4, 5), (6, 4))
    x = x.to(getattr(torch, dtype))
    head = head_for(objective, x, y)
    assert train(head, x, y)[0].dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in head.parameters())


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_gradients_are_right_with_rows_left_out(objective: Any) -> None:
    if isinstance(objective, DeInfoReg) and objective.ce != "merge":
        objective = dataclasses.replace(objective, alpha=0)  # a detached path is no derivative
    x, y = draw(10, (3, 3, 4), (3, 3), low=-1)
    head = head_for(objective, x, y)
    assert torch.autograd.gradcheck(lambda h: head(h, y)[0], x.requires_grad_())


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_sizes_may_differ_from_the_examples(objective: Objective) -> None:
    for shape, labels, later, later_labels in [
        ((6, 4, 5), (6, 4), (3, 9, 5), (3, 9)),
        ((6, 4, 5), (6, 8), (3, 5, 5), (3, 9)),
        ((6, 3, 4, 4), (6, 8, 8), (3, 3, 5, 7), (3, 9, 13)),
        ((6, 17, 3), (6, 8, 8), (3, 7, 3), (3, 12, 8)),
    ]:
        x, y = draw(11, shape, labels)
        head = head_for(objective, x, y)
        assert train(head, *draw(12, later, later_labels))[1].ne(0).any()


# What is refused


@pytest.mark.parametrize("kind", [EarlyExit, DeInfoReg])
def test_classifiers_need_the_number_of_classes_and_supcon_does_not(kind: Any) -> None:
    features, signal = TensorSpec("h", (4, 6, 5), "float32"), TensorSpec("target", (4, 6), "int64")
    with pytest.raises(InputError, match=rf"'{kind.name}' needs to know the number of classes.*supcon"):
        kind().head(features, signal)
    x, y = draw(13, (4, 6, 5), (4, 6))
    assert SupCon().head(features, signal)(x.float(), 1000 * y)[0] > 0


@pytest.mark.parametrize("kind", [EarlyExit, DeInfoReg, SupCon])
def test_regression_targets_are_refused(kind: Any) -> None:
    with pytest.raises(InputError, match=rf"'{kind.name}' needs targets that are int64 class indices.*float32.*bp"):
        kind().head(TensorSpec("h", (4, 6), "float32"), TensorSpec("target", (4, 2), "float32"))
