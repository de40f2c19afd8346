"""Features of one shape as features of another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from autodecouple.objectives.adapter import Adapter
from autodecouple.plans import TensorSpec

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)
dtypes = st.sampled_from(["float32", "float64", "complex64", "bfloat16"])


def spec(shape: tuple[int, ...], dtype: str = "float32", batch_dim: int = 0) -> TensorSpec:
    return TensorSpec("h", shape, dtype, batch_dim)


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    sizes = draw(shapes)
    batch_dim = draw(st.integers(0, len(sizes)))
    return spec((*sizes[:batch_dim], 3, *sizes[batch_dim:]), draw(dtypes), batch_dim)


@settings(max_examples=150, deadline=None)
@given(specs(), specs(), st.sampled_from([(), (2,), (3,), (2, 2)]), st.booleans())
def test_any_features_become_any_others_and_pass_the_gradient_on(
    source: TensorSpec, target: TensorSpec, labels: tuple[int, ...], project: bool
) -> None:
    x = torch.randn(source.shape, dtype=getattr(torch, source.dtype)).requires_grad_()
    y = Adapter(source, target, labels, project=project)(x)
    assert y.shape == target.shape and y.dtype == getattr(torch, target.dtype)
    y.abs().float().sum().backward()
    assert x.grad is not None


@settings(max_examples=50, deadline=None)
@given(specs())
def test_the_same_shape_is_left_alone(source: TensorSpec) -> None:
    adapter, x = Adapter(source, source), torch.zeros(source.shape)
    assert adapter.is_identity and adapter(x) is x and not list(adapter.parameters())


def test_grids_are_pooled_then_mapped_as_by_torch() -> None:
    adapter = Adapter(spec((2, 3, 8, 8)), spec((2, 5, 4, 2)))
    assert adapter.linear is not None
    x = torch.randn(2, 3, 8, 8)
    pooled = F.adaptive_avg_pool2d(x, (4, 2))
    expected = F.conv2d(pooled, adapter.linear.weight[:, :, None, None], adapter.linear.bias)
    torch.testing.assert_close(adapter(x), expected)


def test_finer_grids_repeat() -> None:
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(Adapter(spec((2, 3, 2, 2)), spec((2, 3, 4, 4)))(x), F.interpolate(x, size=(4, 4)))


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 2, 6, 4)])
def test_no_token_sees_another_one(shape: tuple[int, ...]) -> None:
    """A language model's head must not look ahead: also where the cut lies between attention heads (N, heads, T, D)."""
    adapter = Adapter(spec(shape), spec((2, 6, 5)), (6,))
    x = torch.randn(shape)
    changed = x.clone()
    changed[..., 3:, :] += 1
    assert torch.equal(adapter(x)[:, :3], adapter(changed)[:, :3])
    assert not torch.equal(adapter(x)[:, 3:], adapter(changed)[:, 3:])


def test_other_sizes_keep_the_ratio() -> None:
    adapter = Adapter(spec((2, 3, 8, 8)), spec((2, 5, 4, 4)))
    assert adapter(torch.randn(7, 3, 12, 6)).shape == (7, 5, 6, 3)
    tokens = Adapter(spec((2, 6, 4)), spec((2, 6, 5)), (6,))
    assert tokens(torch.randn(3, 9, 4)).shape == (3, 9, 5)


def test_patches_become_tokens_and_tokens_a_vector() -> None:
    assert Adapter(spec((2, 3, 4, 4)), spec((2, 17, 5)))(torch.randn(2, 3, 4, 4)).shape == (2, 17, 5)
    x = torch.randn(2, 6, 4)
    assert torch.equal(Adapter(spec((2, 6, 4)), spec((2, 4)))(x), x.mean(1))
