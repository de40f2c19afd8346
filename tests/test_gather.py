"""One head for several tensors: joined as written out with torch's own operations, and a gradient for each."""

from __future__ import annotations

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
from autodecouple.objectives import DGL, Backprop, DeInfoReg, EarlyExit, InfoPro, PredSim, SupCon
from autodecouple.objectives.gather import Gather, gathered_head
from autodecouple.objectives.layout import Layout
from autodecouple.plans import TensorSpec

torch.set_num_threads(1)

OBJECTIVES: list[Any] = [
    SupCon(hidden=8, out=6),
    DeInfoReg(widths=(8, 6)),
    EarlyExit(hidden=8),
    DGL(width=8),
    PredSim(),
    InfoPro(SupCon(hidden=8, out=6), reconstruction=(0, 0)),
]
SHAPE = tuple[int, ...]
CROSSINGS: dict[str, tuple[list[SHAPE], SHAPE]] = {
    "pyramid": ([(6, 3, 8, 8), (6, 5, 4, 4), (6, 7, 3, 5)], (6,)),
    "tokens and vector": ([(6, 4, 5), (6, 3)], (6,)),
    "dense pyramid": ([(6, 3, 4, 4), (6, 5, 8, 8), (6, 7, 2, 2), (6, 4, 3, 5)], (6, 8, 8)),
    "dense grid and vector": ([(6, 5), (6, 3, 4, 4)], (6, 8, 8)),
    "decoder and encoder": ([(6, 4, 5), (6, 7, 3)], (6, 4)),
    "two token streams": ([(6, 4, 5), (6, 4, 3)], (6, 4)),
    "volumes": ([(6, 3, 2, 4, 4), (6, 5, 1, 2, 2)], (6, 4, 8, 8)),
    "no positions": ([(6, 3), (6, 5)], (6, 4)),
}
EVERY = pytest.mark.parametrize("shapes, labels", CROSSINGS.values(), ids=CROSSINGS)


def spec(x: Tensor, batch_dim: int = 0) -> TensorSpec:
    return TensorSpec("h", tuple(x.shape), dtype_name(x.dtype), batch_dim)


def target(*shape: int) -> TensorSpec:
    return TensorSpec("target", shape, "int64", num_classes=3)


def build(objective: Any, xs: list[Tensor], y: Tensor, batch_dims: list[int] | None = None) -> nn.Module:
    torch.manual_seed(0)
    specs = [spec(x, dim) for x, dim in zip(xs, batch_dims or [0] * len(xs), strict=True)]
    return gathered_head(objective, specs, target(*y.shape))


def draw(shapes: list[SHAPE], labels: SHAPE, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return xs, torch.randint(0, 3, labels, generator=generator)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@EVERY
def test_the_loss_reaches_every_value_of_every_tensor(objective: Any, shapes: list[SHAPE], labels: SHAPE) -> None:
    xs, y = draw(shapes, labels, torch.float64)
    head = build(objective, xs, y)
    loss, signal = head(*xs, y)
    loss.backward()
    assert signal is y and loss.shape == () and loss.isfinite()
    assert all(x.grad is not None and x.grad.ne(0).any(0).float().mean() > 0.9 for x in xs)
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("shape, labels", [((6, 5), (6,)), ((6, 4, 5), (6, 4)), ((6, 3, 4, 4), (6, 8, 8))])
def test_one_tensor_has_the_objectives_own_head(objective: Any, shape: SHAPE, labels: SHAPE) -> None:
    (x,), y = draw([shape], labels)
    head = build(objective, [x], y)
    torch.manual_seed(0)
    assert torch.equal(head(x, y)[0], objective.head(spec(x), target(*labels))(x, y)[0])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@EVERY
def test_the_objectives_own_head_reads_what_is_joined(objective: Any, shapes: list[SHAPE], labels: SHAPE) -> None:
    xs, y = draw(shapes, labels)
    head = build(objective, xs, y)
    joined = head.gather(*xs)
    torch.manual_seed(0)
    own = objective.head(spec(joined), target(*labels))
    assert torch.equal(head(*xs, y)[0], own(joined, y)[0])
    assert head.gather.spec == spec(joined)


def test_one_label_per_row_meets_pooled_vectors() -> None:
    xs, _ = draw([(6, 3, 7, 5), (6, 4, 5), (6, 3)], (6,), torch.float64)
    joined = Gather([spec(x) for x in xs], ())(*xs)
    expected = torch.cat([F.adaptive_avg_pool2d(xs[0], 2).flatten(1), xs[1].mean(1), xs[2]], 1)
    torch.testing.assert_close(joined, expected)


def test_states_of_a_recurrent_network_join_its_output() -> None:
    (out, h, c), y = draw([(6, 9, 5), (2, 6, 5), (2, 6, 5)], (6,), torch.float64)
    specs = [spec(out), spec(h, 1), spec(c, 1)]
    torch.testing.assert_close(Gather(specs, ())(out, h, c), torch.cat([out.mean(1), h.mean(0), c.mean(0)], 1))
    per_token = Gather(specs, (9,))(out, h, c)
    assert torch.equal(per_token[..., :5], out) and per_token.shape == (6, 9, 15)
    torch.testing.assert_close(per_token[..., 5:10], h.mean(0)[:, None].expand(6, 9, 5))
    head = build(SupCon(), [out, h, c], y, [0, 1, 1])
    head(out, h, c, y)[0].backward()
    assert all(x.grad is not None and x.grad.ne(0).any() for x in (out, h, c))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=3))
def test_grids_meet_on_the_first_whatever_their_sizes(sizes: list[tuple[int, int]]) -> None:
    xs = draw([(2, 3 + i, *size) for i, size in enumerate(sizes)], (2,), torch.float64)[0]
    gather = Gather([TensorSpec("h", (2, 3 + i, 8, 8), "float64") for i in range(len(xs))], (16, 16))
    expected = torch.cat([xs[0], *(F.adaptive_avg_pool2d(x, sizes[0]) for x in xs[1:])], 1)
    torch.testing.assert_close(gather(*xs), expected, rtol=1e-12, atol=1e-12)


def test_a_sequence_of_another_length_gives_its_mean_to_every_token() -> None:
    (decoder, encoder), _ = draw([(6, 4, 5), (6, 7, 3)], (6, 4), torch.float64)
    joined = Gather([spec(decoder), spec(encoder)], (4,))(decoder, encoder)
    torch.testing.assert_close(joined, torch.cat([decoder, encoder.mean(1, keepdim=True).expand(-1, 4, -1)], 2))


def test_a_vector_joins_every_position_of_the_first_grid() -> None:
    (vector, grid), _ = draw([(6, 5), (6, 3, 4, 4)], (6, 8, 8), torch.float64)
    joined = Gather([spec(vector), spec(grid)], (8, 8))(vector, grid)
    assert torch.equal(joined, torch.cat([vector[..., None, None].expand(-1, -1, 4, 4), grid], 1))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([(2, 4, 6), (2, 8, 3), (2, 8, 8), (2, 3, 4, 4), (2, 3, 4, 6), (2, 4, 4, 3), (2, 16, 5)]),
    st.integers(1, 30),
    st.sampled_from([(8,), (16,), (8, 8), (4, 6), (12, 3)]),
)
def test_heads_never_take_channels_for_positions(shape: SHAPE, width: int, labels: SHAPE) -> None:
    """Joined tokens (N, 8, 16) and labels (N, 16) would look like a sequence of 16 with 8 channels."""
    first, second = TensorSpec("h", shape, "float32"), TensorSpec("s", (2, width), "float32")
    alone, gather = Layout.of(first, labels), Gather([first, second], labels)
    if alone.dense:
        joined = Layout.of(gather.spec, labels)
        assert (joined.positions, joined.prefix, joined.dense) == (alone.positions, alone.prefix, True)
        out = gather(torch.randn(shape), torch.randn(2, width))
        assert tuple(out.shape) == gather.spec.shape and joined.width in (alone.width + width, alone.width + width + 1)


@pytest.mark.parametrize("labels", [(6,), (6, 4)])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_the_mask_belongs_to_the_first(objective: Any, labels: SHAPE) -> None:
    (x, other), y = draw([(6, 4, 5), (6, 7, 3)], labels)
    mask = torch.arange(4) < torch.tensor([4, 3, 2, 1, 2, 4]).unsqueeze(1)
    head = build(objective, [x, other], y).eval()
    dirty = x.detach().masked_fill(~mask.unsqueeze(-1), float("nan"))
    loss = head(x, other, y, mask=mask)[0]
    assert loss.isfinite() and torch.equal(loss, head(dirty, other, y, mask=mask)[0])
    assert not torch.equal(loss, head(x, other, y)[0])


def test_the_mask_stays_with_the_first_where_another_has_the_positions() -> None:
    (tokens, grid), y = draw([(6, 7, 5), (6, 3, 4, 4)], (6, 8, 8))
    mask = torch.arange(7) < torch.tensor([4, 3, 2, 1, 2, 4]).unsqueeze(1)
    head = build(EarlyExit(hidden=None), [tokens, grid], y)
    dirty = tokens.detach().masked_fill(~mask.unsqueeze(-1), float("nan"))
    assert head(dirty, grid, y, mask=mask)[0].isfinite()


class Recorder(nn.Module):
    """Keeps the mask that it was given."""

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.mask = mask
        return features.square().mean(), signal


class Recording:
    """An objective of the user's own."""

    name, encodes = "recording", False

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        self.features = features
        return Recorder()


@pytest.mark.parametrize(
    "labels, kept", [((6,), False), ((6, 4), True), ((6, 8, 8), False)], ids=["pooled", "tokens", "grid"]
)
def test_the_mask_goes_on_with_the_tokens_only(labels: SHAPE, kept: bool) -> None:
    xs, y = draw([(6, 7, 3), (6, 3, 4, 4)], labels)
    head, mask = build(Recording(), xs, y), torch.ones(6, 7, dtype=torch.bool)
    head(*xs, y, mask=mask)
    assert head.head.mask is (mask if kept else None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.float64, torch.complex128])
@EVERY
def test_number_formats_may_be_mixed(dtype: torch.dtype, shapes: list[SHAPE], labels: SHAPE) -> None:
    xs, y = draw(shapes, labels)
    xs[-1] = xs[-1].detach().to(dtype).requires_grad_()
    loss = build(SupCon(hidden=8, out=6), xs, y)(*xs, y)[0]
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32)
    assert all(x.grad is not None and x.grad.ne(0).any() and x.grad.dtype == x.dtype for x in xs)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@EVERY
def test_gathered_heads_run_on_fake_tensors_and_under_autocast(
    objective: Any, shapes: list[SHAPE], labels: SHAPE
) -> None:
    with FakeTensorMode():
        xs, y = [torch.randn(shape, requires_grad=True) for shape in shapes], torch.zeros(labels, dtype=torch.int64)
        build(objective, xs, y)(*xs, y)[0].backward()
    assert all(x.grad is not None for x in xs)
    xs, y = draw(shapes, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = build(objective, xs, y)(*xs, y)[0]
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_other_sizes_and_batches_may_come_later() -> None:
    for early, labels, late, late_labels in [
        ([(6, 4, 5), (6, 7, 3)], (6, 4), [(3, 9, 5), (3, 2, 3)], (3, 9)),
        ([(6, 4, 5), (6, 4, 3)], (6, 4), [(3, 9, 5), (3, 2, 3)], (3, 9)),
        ([(6, 3, 4, 4), (6, 5, 8, 8)], (6, 8, 8), [(1, 3, 5, 7), (1, 5, 3, 2)], (1, 10, 14)),
    ]:
        head = build(EarlyExit(), *draw(early, labels))
        xs, y = draw(late, late_labels)
        head(*xs, y)[0].backward()
        assert all(x.grad is not None and x.grad.ne(0).any() for x in xs)


@pytest.mark.parametrize(
    "features, said",
    [
        ([], "no features cross"),
        ([TensorSpec("h", (4, 6), "float32"), TensorSpec("s", (9, 6), "float32")], "their rows differ"),
        ([TensorSpec("h", (4, 6), "float32"), TensorSpec("s", (6,), "float32")], r"s \(N\) float32"),
        ([TensorSpec("h", (4, 6), "float32"), TensorSpec("s", (4, 6), "int64")], "floating-point.*s"),
    ],
)
def test_features_that_do_not_go_together_are_refused(features: list[TensorSpec], said: str) -> None:
    with pytest.raises(InputError, match=said):
        gathered_head(SupCon(), features, target(4))


def test_a_coupled_cut_has_no_head() -> None:
    with pytest.raises(InputError, match="no head"):
        gathered_head(Backprop(), [TensorSpec("h", (4, 6), "float32")] * 2, target(4))


def test_targets_that_are_no_labels_are_left_to_the_objective() -> None:
    """An objective of the user's own may compare with float targets; these have no positions."""
    objective = Recording()
    specs = [TensorSpec("h", (6, 4, 5), "float32"), TensorSpec("s", (6, 3), "float32")]
    head = gathered_head(objective, specs, TensorSpec("target", (6, 4), "float32"))
    assert head(torch.randn(6, 4, 5), torch.randn(6, 3), torch.randn(6, 4))[0].isfinite()
    assert objective.features.shape == (6, 8)
