"""PredSim against its formulas in plain Python."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from head_tools import classes, cosines_by_hand, cross_entropy_by_hand, gradient_at, head_for, numbers, spec
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from autodecouple.errors import InputError
from autodecouple.objectives import PredSim
from autodecouple.objectives.layout import Layout
from autodecouple.objectives.predsim import deviations

torch.set_num_threads(1)


def similarity_by_hand(rows: list[list[float]], labels: list[int], num_classes: int) -> float:
    """Mean over all pairs of the squared difference between the similarities of rows and of one-hot labels."""
    kept = [(row, label) for row, label in zip(rows, labels, strict=True) if label >= 0]
    found = cosines_by_hand([row for row, _ in kept])
    wanted = cosines_by_hand([[float(label == k) for k in range(num_classes)] for _, label in kept])
    pairs = [(a - b) ** 2 for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(pairs) / max(1, len(pairs))


def stds_by_hand(maps: Tensor) -> list[list[float]]:
    return [[statistics.stdev(channel.flatten().tolist()) for channel in row] for row in maps]


def trained(head: nn.Module) -> nn.Module:
    """The classifier starts at zero: other weights, so that its formula shows."""
    with torch.no_grad():
        for parameter in head.predict.classifier.parameters():
            parameter.copy_(numbers(*parameter.shape, seed=3))
    return head


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.integers(1, 4), st.integers(2, 5), st.integers(2, 5), st.integers(0, 99))
def test_maps_follow_the_formula(rows: int, channels: int, height: int, width: int, seed: int) -> None:
    x, y = numbers(rows, channels, height, width, seed=seed), classes(rows, seed=seed)
    assume(not Layout.of(spec("h", x)).channels_last)
    head = trained(head_for(PredSim(beta=0.7), x, y))
    similar = 0.0
    if channels > 1:  # a centred row of one value is rounding noise around zero
        convolved = F.conv2d(x, head.similar.conv.weight, padding=1)
        similar = similarity_by_hand(stds_by_hand(convolved), y.tolist(), 5)
    else:
        head.beta = 0.0
    cells = min(height, width)
    pooled = F.adaptive_avg_pool2d(x, (cells, cells)).flatten(1)
    logits = pooled @ head.predict.classifier.weight.T + head.predict.classifier.bias
    expected = (1 - head.beta) * cross_entropy_by_hand(logits, y.tolist()) + head.beta * similar
    assert head(x, y)[0].item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_sequences_count_the_tokens_of_the_mask() -> None:
    x, y = numbers(4, 6, 3), classes(4)
    mask = torch.arange(6) < torch.tensor([6, 4, 3, 2]).unsqueeze(1)
    head = head_for(PredSim(beta=1.0), x, y)
    convolved = F.conv1d(x.masked_fill(~mask.unsqueeze(2), 0).movedim(2, 1), head.similar.conv.weight, padding=1)
    rows = [
        [statistics.stdev(channel[keep].tolist()) for channel in row] for row, keep in zip(convolved, mask, strict=True)
    ]
    assert head(x, y, mask)[0].item() == pytest.approx(similarity_by_hand(rows, y.tolist(), 5), rel=1e-10)


def test_vectors_have_a_linear_layer() -> None:
    x, y = numbers(6, 4), torch.tensor([0, 1, 0, 2, -100, 1])
    head = trained(head_for(PredSim(beta=0.5), x, y))
    similar = similarity_by_hand((x @ head.similar.conv.weight.T).tolist(), y.tolist(), 5)
    predict = cross_entropy_by_hand(head.predict.classifier(x), y.tolist())
    assert head(x, y)[0].item() == pytest.approx((similar + predict) / 2, rel=1e-10)


def test_tokens_with_labels_are_rows() -> None:
    x, y = numbers(3, 4, 5), classes(3, 4)
    y[0, 2] = -100
    head = trained(head_for(PredSim(beta=0.5), x, y))
    rows = F.conv1d(x.movedim(2, 1), head.similar.conv.weight).movedim(1, 2).reshape(12, 5)
    similar = similarity_by_hand(rows.tolist(), y.flatten().tolist(), 5)
    predict = cross_entropy_by_hand(head.predict.classifier(x.reshape(12, 5)), y.flatten().tolist())
    assert head(x, y)[0].item() == pytest.approx((similar + predict) / 2, rel=1e-10)


def test_the_classifier_starts_at_zero_and_maps_are_pooled_to_its_width() -> None:
    x, y = torch.empty(2, 64, 32, 32, device="meta"), classes(2)
    with torch.device("meta"):
        head = PredSim().head(spec("h", x), spec("target", y, 5))
        narrow = PredSim(width=300).head(spec("h", x), spec("target", y, 5))
    assert head.predict.classifier.in_features == 4096 and narrow.predict.classifier.in_features == 64 * 2 * 2
    real = head_for(PredSim(), numbers(2, 3, 4, 4), y)
    assert not real.predict.classifier.weight.any() and not real.predict.classifier.bias.any()


@pytest.mark.parametrize("beta, parts", [(0.0, {"predict"}), (1.0, {"similar"}), (0.99, {"predict", "similar"})])
def test_a_term_without_weight_has_no_parameters(beta: float, parts: set[str]) -> None:
    head = head_for(PredSim(beta=beta), numbers(4, 3, 2, 2), classes(4))
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == parts


def test_constant_channels_have_deviation_0_and_no_gradient() -> None:
    x = numbers(3, 2, 4, 4)
    x[0, 1] = 7.0
    grad = gradient_at(x, lambda leaf: deviations(leaf).sum())
    assert grad.isfinite().all() and not grad[0, 1].any() and grad[1].any()
    torch.testing.assert_close(deviations(x), x.flatten(2).std(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "build, said", [(lambda: PredSim(beta=1.1), "beta=1.1"), (lambda: PredSim(width=0), "width=0")]
)
def test_choices_are_checked(build: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build()
