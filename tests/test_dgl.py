"""DGL's auxiliary networks against the same networks of torch's functions."""

from __future__ import annotations

import math

import pytest
import torch
from head_tools import classes, cross_entropy_by_hand, gradient_at, head_for, normalised, numbers, spec
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from autodecouple.errors import InputError
from autodecouple.objectives import DGL
from autodecouple.objectives.layout import Layout
from autodecouple.objectives.maps import MapNorm

torch.set_num_threads(1)


def perceptron_by_hand(head: nn.Module, rows: Tensor) -> Tensor:
    *hidden, last = [layer for layer in head.classifier if isinstance(layer, nn.Linear)]
    for layer in hidden:
        rows = normalised(rows @ layer.weight.T + layer.bias).clamp(min=0)
    return rows @ last.weight.T + last.bias


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(1, 17), st.integers(1, 17), st.integers(0, 99))
def test_mlp_sr_is_the_published_network(rows: int, channels: int, height: int, width: int, seed: int) -> None:
    x, y = numbers(rows, channels, height, width, seed=seed), classes(rows, seed=seed)
    assume(not Layout.of(spec("h", x)).channels_last)
    head = head_for(DGL(), x, y)
    maps = F.adaptive_avg_pool2d(x, (math.ceil(height / 4), math.ceil(width / 4)))
    for block in head.neck.blocks:
        maps = normalised(F.conv2d(maps, block.conv.weight)).clamp(min=0)
    cells = min(2, *maps.shape[2:])
    rows_ = F.adaptive_avg_pool2d(maps, (cells, cells)).flatten(1)
    layers = [layer.out_features for layer in head.classifier if isinstance(layer, nn.Linear)]
    assert len(head.neck.blocks) == 3 and layers == [rows_.shape[1]] * 3 + [5]
    expected = cross_entropy_by_hand(perceptron_by_hand(head, rows_), y.tolist())
    assert head(x, y)[0].item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_mlp_is_the_perceptron_alone() -> None:
    x, y = numbers(6, 3, 6, 4), classes(6)
    head = head_for(DGL("mlp", width=7), x, y)
    expected = perceptron_by_hand(head, F.adaptive_avg_pool2d(x, (2, 2)).flatten(1))
    assert [layer.out_features for layer in head.classifier if isinstance(layer, nn.Linear)] == [7, 7, 7, 5]
    assert head(x, y)[0].item() == pytest.approx(cross_entropy_by_hand(expected, y.tolist()), rel=1e-10)


def test_cnn_has_two_convolutions_and_a_linear_classifier() -> None:
    x, y = numbers(6, 3, 6, 4), classes(6)
    head = head_for(DGL("cnn"), x, y)
    maps = x
    for block in head.neck.blocks:
        maps = normalised(F.conv2d(maps, block.conv.weight, padding=1)).clamp(min=0)
    logits = perceptron_by_hand(head, F.adaptive_avg_pool2d(maps, (2, 2)).flatten(1))
    assert len(head.neck.blocks) == 2 and len(head.classifier) == 1
    assert head(x, y)[0].item() == pytest.approx(cross_entropy_by_hand(logits, y.tolist()), rel=1e-10)


@pytest.mark.parametrize("net", ["mlp-sr", "cnn"])
def test_padding_changes_nothing_of_a_sequence(net: str) -> None:
    """A batch of one length, and the same with padding behind: statistics, convolutions and means leave it out."""
    x, y = numbers(5, 4, 3), classes(5)
    padded = torch.cat([x, torch.full((5, 3, 3), math.inf)], 1)
    mask = torch.arange(7).expand(5, 7) < 4
    head = head_for(DGL(net, width=6), x, y)
    torch.testing.assert_close(head(x, y)[0], head(padded, y, mask)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("net", ["mlp-sr", "mlp", "cnn"])
def test_tokens_with_labels_see_no_other_token(net: str) -> None:
    """A language model's token at the next place is the label: whoever looks there need not learn."""
    x, y = numbers(2, 5, 8), torch.full((2, 5), -100)
    y[0, 2] = 1
    head = head_for(DGL(net, width=16), x, y).eval()
    grad = gradient_at(x, lambda leaf: head(leaf, y)[0])
    assert grad[0, 2].any()
    grad[0, 2] = 0
    assert not grad.any()


def test_positions_with_labels_are_classified_where_the_windows_are() -> None:
    x, y = numbers(2, 3, 8, 8), classes(2, 8, 8)
    head = head_for(DGL(width=6), x, y)
    maps = F.avg_pool2d(x, 4)
    for block in head.neck.blocks:
        maps = normalised(F.conv2d(maps, block.conv.weight)).clamp(min=0)
    logits = perceptron_by_hand(head, maps.movedim(1, -1).reshape(8, 3))
    labels = y[:, 2::4, 2::4].flatten().tolist()
    assert head(x, y)[0].item() == pytest.approx(cross_entropy_by_hand(logits, labels), rel=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_map_norm_is_batch_norm(rows: int, channels: int, length: int, seed: int) -> None:
    """With and without a mask that counts every token, and in evaluation; torch refuses one value per channel."""
    x = numbers(rows, channels, length, seed=seed)
    ours, masked, torchs = (kind(channels, dtype=torch.float64) for kind in (MapNorm, MapNorm, nn.BatchNorm1d))
    if rows * length > 1:
        expected = torchs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(masked(x, torch.ones(rows, length, dtype=torch.bool)), expected)
        torch.testing.assert_close(ours.running_var, torchs.running_var)
        torch.testing.assert_close(masked.running_var, torchs.running_var)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))
    assert ours.train()(x[:1, :, :1]).isfinite().all()


def test_choices_are_checked() -> None:
    with pytest.raises(InputError, match="net='resnet'.*'mlp-sr', 'mlp', 'cnn'"):
        DGL("resnet")
