"""Every objective against formulas written out in plain Python, and the laws of methods.md, section 4."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autodecouple.errors import InputError
from autodecouple.objectives import (
    DGL,
    OBJECTIVES,
    Backprop,
    DeInfoReg,
    EarlyExit,
    InfoPro,
    Objective,
    PredSim,
    SupCon,
    resolve,
)
from autodecouple.plans import TensorSpec

torch.set_num_threads(1)

NORMALISATIONS = ["code", "eq2", "alg1"]
CE_MODES = ["merge", "unmerge", "paper"]
SMALL: list[Any] = [
    *(SupCon(normalisation=how, hidden=8, out=6) for how in NORMALISATIONS),
    *(DeInfoReg(ce=ce, widths=(8, 6)) for ce in CE_MODES),
    DeInfoReg(alpha=0, widths=(8, 6), batch_norm=False),
    EarlyExit(hidden=8),
    EarlyExit(hidden=None),
    *(DGL(net, width=8) for net in ("mlp-sr", "cnn")),
    PredSim(beta=0.5),
    InfoPro(SupCon(hidden=8, out=6), reconstruction=(0, 0)),
]
SHAPES = [(6, 5), (6, 4, 5), (6, 3, 7, 5), (6, 3, 1, 1), (6, 3, 4, 4), (6, 2, 3, 4, 5), (6, 2, 3, 1, 2, 3, 2)]


def specs(x: Tensor, num_classes: int = 5, batch_dim: int = 0) -> tuple[TensorSpec, TensorSpec]:
    dtype = str(x.dtype).removeprefix("torch.")
    labels = TensorSpec("target", (x.shape[batch_dim],), "int64", num_classes=num_classes)
    return TensorSpec("h", tuple(x.shape), dtype, batch_dim), labels


def head_for(objective: Objective, x: Tensor, num_classes: int = 5, batch_dim: int = 0) -> nn.Module:
    torch.manual_seed(0)
    return objective.head(*specs(x, num_classes, batch_dim))


def loss_of(objective: Objective, x: Tensor, y: Tensor, num_classes: int = 5) -> Tensor:
    loss: Tensor = head_for(objective, x, num_classes)(x, y)[0]
    return loss


@st.composite
def batches(draw: st.DrawFn, min_rows: int = 1, min_width: int = 1) -> tuple[Tensor, Tensor, int]:
    """(N, D) float64 features, class indices, the number of classes."""
    rows, width = draw(st.integers(min_rows, 12)), draw(st.integers(min_width, 8))
    num_classes = draw(st.integers(1, 5))
    labels = draw(st.lists(st.integers(0, num_classes - 1), min_size=rows, max_size=rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    x = scale * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        x[0] = 0
    return x, torch.tensor(labels), num_classes


# The formulas, in plain Python


def unit(row: list[float]) -> list[float]:
    norm = math.sqrt(sum(v * v for v in row))
    return [v / norm for v in row] if norm > 1e-12 else row


def dot(a: list[float], b: list[float]) -> float:
    return sum(u * v for u, v in zip(a, b, strict=True))


def supcon_by_hand(x: Tensor, y: Tensor, temperature: float, normalisation: str) -> float:
    z, labels, n = [unit(row) for row in x.tolist()], y.tolist(), len(x)
    per_anchor, sizes = [], []
    for i in range(n):
        positives = [p for p in range(n) if p != i and labels[p] == labels[i]]
        denominator = sum(math.exp(dot(z[i], z[j]) / temperature) for j in range(n) if j != i)
        terms = [math.log(math.exp(dot(z[i], z[p]) / temperature) / denominator) for p in positives]
        per_anchor.append(-sum(terms))
        sizes.append(len(positives))
    if normalisation == "code":
        return sum(s / (size + 1) for s, size in zip(per_anchor, sizes, strict=True)) / n
    if normalisation == "eq2":
        return sum(s / size for s, size in zip(per_anchor, sizes, strict=True) if size)
    return sum(per_anchor) / n / sum(size + 1 for size in sizes)


def cosines_by_hand(rows: list[list[float]]) -> list[list[float]]:
    centred = [unit([v - sum(row) / len(row) for v in row]) for row in rows]
    return [[max(-1.0, min(1.0, dot(a, b))) for b in centred] for a in centred]


def deinforeg_by_hand(x: Tensor, y: Tensor, num_classes: int) -> tuple[float, float, float]:
    rows, (n, width) = [unit(row) for row in x.tolist()], x.shape
    means = [sum(row[d] for row in rows) / n for d in range(width)]
    c = [[row[d] - means[d] for d in range(width)] for row in rows]
    variances = [sum(row[d] ** 2 for row in c) / (n - 1) if n > 1 else 0.0 for d in range(width)]
    v = sum(max(0.0, 1 - math.sqrt(var + 1e-7)) for var in variances) / width / n
    onehot = [[float(label == k) for k in range(num_classes)] for label in y.tolist()]
    got, wished = cosines_by_hand(rows), cosines_by_hand(onehot)
    i = sum((wished[a][b] - got[a][b]) ** 2 for a in range(n) for b in range(n)) / n**2
    pairs = [(a, b) for a in range(width) for b in range(width) if a != b]
    cov = sum((sum(row[a] * row[b] for row in c) / n) ** 2 for a, b in pairs) / width
    return v, i, cov


def cross_entropy_by_hand(logits: Tensor, y: Tensor) -> float:
    rows = zip(logits.tolist(), y.tolist(), strict=True)
    return sum(math.log(sum(math.exp(v) for v in row)) - row[label] for row, label in rows) / len(y)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@settings(max_examples=80, deadline=None)
@given(batch=batches(), temperature=st.sampled_from([0.07, 0.1, 1.0]))
def test_supcon_is_the_formula(normalisation: str, batch: tuple[Tensor, Tensor, int], temperature: float) -> None:
    x, y, num_classes = batch
    loss = loss_of(SupCon(temperature, normalisation, projector="identity"), x, y, num_classes)
    expected = supcon_by_hand(x, y, temperature, normalisation)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@settings(max_examples=100, deadline=None)
@given(batch=batches(min_width=1))
def test_deinforeg_is_the_formulas(batch: tuple[Tensor, Tensor, int]) -> None:
    x, y, num_classes = batch
    only = dict.fromkeys(["variance", "invariance", "covariance", "alpha"], 0.0)
    for name, expected in zip(only, deinforeg_by_hand(x, y, num_classes), strict=False):
        if name == "invariance" and x.shape[1] == 1:
            continue  # a centred row of one value is rounding noise around zero
        loss = loss_of(DeInfoReg(projector="identity", **{**only, name: 2.0}), x, y, num_classes)
        assert loss.item() == pytest.approx(2 * expected, rel=1e-10, abs=1e-10), name


@pytest.mark.parametrize("ce", CE_MODES)
@settings(max_examples=15, deadline=None)
@given(batch=batches(min_width=3))
def test_deinforeg_adds_its_terms_and_the_cross_entropy(ce: str, batch: tuple[Tensor, Tensor, int]) -> None:
    x, y, num_classes = batch
    head = head_for(DeInfoReg(ce=ce, alpha=0.5, widths=(7, 6), batch_norm=False), x, num_classes)
    embeddings = head.projector(x)
    logits = head.classifier(x if ce == "unmerge" else embeddings)
    expected = sum(deinforeg_by_hand(embeddings, y, num_classes)) + 0.5 * cross_entropy_by_hand(logits, y)
    assert head(x, y)[0].item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("hidden", [None, 7])
@settings(max_examples=15, deadline=None)
@given(batch=batches())
def test_early_exit_is_cross_entropy(hidden: int | None, batch: tuple[Tensor, Tensor, int]) -> None:
    x, y, num_classes = batch
    head = head_for(EarlyExit(hidden=hidden), x, num_classes)
    assert head(x, y)[0].item() == pytest.approx(cross_entropy_by_hand(head.classifier(x), y), rel=1e-10, abs=1e-10)


# Conformance, methods.md section 4


@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_supcon_algorithm_1_is_the_code_over_n_for_balanced_labels(batch: tuple[Tensor, Tensor, int]) -> None:
    x, y, _ = batch
    x, y = torch.cat([x, x.flip(0) + 1]), torch.arange(len(x)).repeat(2)  # every class twice
    code, alg1, eq2 = (
        loss_of(SupCon(normalisation=how, projector="identity"), x, y, len(y)) for how in ("code", "alg1", "eq2")
    )
    torch.testing.assert_close(alg1, code / len(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(code, eq2 / len(x) * 1 / 2, rtol=1e-10, atol=1e-12)  # |P| / (|P| + 1), |P| = 1


@pytest.mark.parametrize("ce, reaches", [("merge", True), ("unmerge", False), ("paper", False)])
@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5), (6, 3, 4, 4)])
def test_cross_entropy_reaches_the_stage_in_merge_only(ce: str, reaches: bool, shape: tuple[int, ...]) -> None:
    x, y = torch.randn(shape, requires_grad=True), torch.arange(6) % 3
    objective = DeInfoReg(ce=ce, alpha=1.0, variance=0, invariance=0, covariance=0, widths=(8, 6))
    head = head_for(objective, x, 3)
    head(x, y)[0].backward()
    assert bool(x.grad is not None and x.grad.any()) == reaches
    assert all(p.grad is not None and p.grad.any() for p in head.classifier[-1].parameters())
    if len(head.projector):
        weight = head.projector[0].weight.grad
        assert bool(weight is not None and weight.any()) == (ce != "unmerge")


@settings(max_examples=40, deadline=None)
@given(batch=batches(min_rows=2))
def test_the_variance_term_is_nearly_constant(batch: tuple[Tensor, Tensor, int]) -> None:
    x, y, num_classes = batch
    n, width = x.shape
    loss = loss_of(DeInfoReg(projector="identity", alpha=0, invariance=0, covariance=0), x, y, num_classes).item()
    assert (1 - math.sqrt(n / ((n - 1) * width) + 1e-7)) / n - 1e-12 <= loss <= 1 / n


# Gradients and invariances


@pytest.mark.parametrize("objective", SMALL, ids=repr)
def test_gradients_are_right(objective: Objective) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 0, 2, 1])
    if isinstance(objective, DeInfoReg) and objective.ce != "merge":
        objective = dataclasses.replace(objective, alpha=0)  # a detached path is no derivative
    head = head_for(objective, x)
    assert torch.autograd.gradcheck(lambda h: head(h, y)[0], x)
    assert all(p.dtype == torch.float64 for p in head.parameters())


@settings(max_examples=25, deadline=None)
@given(batch=batches(min_width=3), which=st.sampled_from(SMALL), seed=st.integers(0, 999))
def test_the_order_of_rows_does_not_matter(batch: tuple[Tensor, Tensor, int], which: Objective, seed: int) -> None:
    x, y, num_classes = batch
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    head = head_for(which, x, num_classes)
    torch.testing.assert_close(head(x, y)[0], head(x[order], y[order])[0], rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(batch=batches(min_width=2), seed=st.integers(0, 999))
def test_the_scale_of_features_does_not_matter(batch: tuple[Tensor, Tensor, int], seed: int) -> None:
    x, y, num_classes = batch
    scales = torch.rand(len(x), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9 + 0.1
    for objective in (SupCon(projector="identity"), DeInfoReg(projector="identity", alpha=0)):
        one, other = (loss_of(objective, rows, y, num_classes) for rows in (x, x * scales))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# Small and hopeless batches


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("labels", [[0], [0, 1, 2, 3]])
def test_supcon_without_positives_is_exactly_zero(normalisation: str, labels: list[int]) -> None:
    x, y = torch.randn(len(labels), 6, requires_grad=True), torch.tensor(labels)
    head = head_for(SupCon(normalisation=normalisation), x)
    loss, _ = head(x, y)
    loss.backward()
    assert loss.item() == 0 and x.grad is not None and x.grad.eq(0).all()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in head.parameters())
    assert head.batches_without_positives == 1 and "batches_without_positives" not in head.state_dict()


def test_an_anchor_without_positives_adds_nothing() -> None:
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 0, 1])
    head = head_for(SupCon(projector="identity"), x)
    assert head(x, y)[0].item() == pytest.approx(supcon_by_hand(x, y, 0.1, "code"))
    assert head.batches_without_positives == 0


@pytest.mark.parametrize("temperature", [1e-4, 1e-3])
def test_supcon_is_stable_at_low_temperatures(temperature: float) -> None:
    x = (100 * torch.randn(8, 4)).requires_grad_()
    loss = loss_of(SupCon(temperature, projector="identity"), x, torch.arange(8) % 2)
    loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("objective", SMALL, ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [6, 2, 1])
def test_any_shape_and_batch_gives_a_finite_loss_and_gradient(
    objective: Objective, shape: tuple[int, ...], rows: int
) -> None:
    head = head_for(objective, torch.randn(shape))
    x, y = torch.randn(rows, *shape[1:], requires_grad=True), torch.arange(rows) % 2
    before = x.detach().clone()
    loss, signal = head(x, y)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite() and signal is y
    assert x.grad is not None and x.grad.isfinite().all() and torch.equal(x.detach(), before)


@pytest.mark.parametrize("objective", SMALL, ids=repr)
def test_all_rows_zero_gives_a_finite_loss_and_gradient(objective: Objective) -> None:
    x = torch.zeros(4, 5, requires_grad=True)
    loss = loss_of(objective, x, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("objective", SMALL, ids=repr)
def test_the_batch_may_be_another_dimension(objective: Objective) -> None:
    x, y, mask = torch.randn(4, 6, 5), torch.arange(6) % 2, torch.rand(6, 4) > 0.2
    loss = head_for(objective, x, batch_dim=1)(x, y, mask)[0]
    swapped = x.movedim(1, 0)
    assert torch.equal(loss, head_for(objective, swapped)(swapped, y, mask)[0])


@pytest.mark.parametrize("objective", SMALL, ids=repr)
def test_padded_tokens_do_not_influence_the_loss(objective: Objective) -> None:
    x, y = torch.randn(6, 4, 5), torch.arange(6) % 2
    mask = torch.arange(4) < torch.tensor([4, 3, 2, 1, 0, 4]).unsqueeze(1)
    head = head_for(objective, x).eval()
    other = torch.where(mask.unsqueeze(-1), x, torch.full_like(x, float("inf")))
    loss = head(x, y, mask)[0]
    assert loss.isfinite() and torch.equal(loss, head(other, y, mask)[0])
    assert not torch.equal(loss, head(x, y)[0])


# Precision, fake tensors, randomness


@pytest.mark.parametrize("objective", SMALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_a_float32_loss(objective: Objective, dtype: torch.dtype) -> None:
    x, y = (50 * torch.randn(6, 3, 4, 4)).to(dtype).requires_grad_(), torch.arange(6) % 2
    loss = loss_of(objective, x, y)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all()


@pytest.mark.parametrize("objective", SMALL, ids=repr)
def test_losses_under_autocast_are_taken_in_float32(objective: Objective) -> None:
    x, y = torch.randn(6, 3, 4, 4, requires_grad=True), torch.arange(6) % 2
    head = head_for(objective, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(x, y)[0]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    torch.testing.assert_close(loss, head(x, y)[0], rtol=0.1, atol=0.1)


def test_autocast_does_not_reach_the_loss() -> None:
    x, y = torch.randn(6, 5), torch.arange(6) % 2
    for objective in (SupCon(projector="identity"), DeInfoReg(projector="identity", alpha=0)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = loss_of(objective, x, y)
        assert torch.equal(inside, loss_of(objective, x, y))


@pytest.mark.parametrize("objective", SMALL, ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_run_on_fake_tensors(objective: Objective, shape: tuple[int, ...]) -> None:
    with FakeTensorMode():
        x, y = torch.randn(shape, requires_grad=True), torch.zeros(6, dtype=torch.int64)
        head_for(objective, x)(x, y)[0].backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("objective", SMALL, ids=repr)
def test_heads_built_on_meta_run_on_meta_and_fake_tensors(objective: Objective) -> None:
    with torch.device("meta"):
        x, y = torch.randn(6, 4, 5, requires_grad=True), torch.zeros(6, dtype=torch.int64)
        head, mask = head_for(objective, x), torch.ones(6, 4, dtype=torch.bool)
    assert all(tensor.is_meta for tensor in (*head.parameters(), *head.buffers()))
    head(x, y, mask)[0].backward()
    with FakeTensorMode() as mode:
        state = {name: mode.from_tensor(t) for name, t in (*head.named_parameters(), *head.named_buffers())}
        x, y, mask = (mode.from_tensor(t) for t in (x, y, mask))
        loss, _ = torch.func.functional_call(head, state, (x, y, mask))
        loss.backward()
    assert loss.shape == ()


@pytest.mark.parametrize("objective", SMALL, ids=repr)
def test_heads_draw_no_random_numbers_when_they_run(objective: Objective) -> None:
    x, y = torch.randn(6, 3, 4, 4, requires_grad=True), torch.arange(6) % 2
    head = head_for(objective, x)
    before = torch.get_rng_state()
    head(x, y)[0].backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("objective", SMALL, ids=repr)
def test_every_parameter_of_a_head_is_trained(objective: Objective) -> None:
    x, y = torch.randn(6, 3, 4, 4), torch.arange(6) % 2
    head = head_for(objective, x)
    head(x, y)[0].backward()
    assert all(p.grad is not None for p in head.parameters())


def test_the_papers_heads_have_the_papers_sizes() -> None:
    x = torch.empty(2, 64, 4, 4, device="meta")
    with torch.device("meta"):
        heads = [head_for(objective.paper(), x, 10) for objective in (SupCon, DeInfoReg, EarlyExit)]
    widths = [[m.out_features for m in head.modules() if isinstance(m, nn.Linear)] for head in heads]
    assert widths == [[512, 1024], [2048, 2048, 2048, 10], [500, 10]]
    first = [next(m for m in head.modules() if isinstance(m, nn.Linear)).in_features for head in heads]
    assert first == [1024] * 3


# Names and choices


@pytest.mark.parametrize("objective", SMALL, ids=repr)
def test_objectives_are_values(objective: Any) -> None:
    assert dataclasses.replace(objective) == objective and hash(dataclasses.replace(objective)) == hash(objective)
    assert objective.encodes is False and OBJECTIVES[objective.name]().name == objective.name


def test_resolve_repeats_one_and_takes_one_per_hidden_stage() -> None:
    assert resolve("supcon", 3) == (SupCon(),) * 3
    assert resolve(SupCon(temperature=0.5), 2) == (SupCon(temperature=0.5),) * 2
    assert resolve(["bp", EarlyExit(), "deinforeg"], 3) == (Backprop(), EarlyExit(), DeInfoReg())
    assert resolve("supcon", 0) == ()


@pytest.mark.parametrize(
    "loss, said",
    [
        ("supcom", "did you mean 'supcon'.*supcon, deinforeg, early_exit, .*bp"),
        ("zzz", "'zzz' is not known; There are: supcon"),
        ("SCPL", "did you mean 'supcon'"),
        ("backprop", "did you mean 'bp'"),
        ("supcon, dgl,bp", r"did you mean a list, \['supcon', 'dgl', 'bp'\]"),
        (["supcon"] * 2, "2 objectives, but 4 stages have 3 hidden"),
        (SupCon, r"SupCon is a class; pass an objective: SupCon\(\)"),
        (nn.CrossEntropyLoss(), "is no objective: it needs name, encodes and head"),
        (None, "None is no objective"),
    ],
)
def test_resolve_says_what_is_wrong(loss: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        resolve(loss, 3)


def test_features_that_are_not_finite_show_in_a_batch_without_positives() -> None:
    """Such a batch has loss 0, also where a row was NaN; its gradient was NaN all the same."""
    features = torch.randn(4, 5)
    features[2, 3] = math.nan
    head = SupCon(hidden=8, out=4).head(*specs(features))
    loss, _ = head(features, torch.arange(4))
    assert torch.isnan(loss)


def test_a_coupled_cut_has_no_head() -> None:
    with pytest.raises(InputError, match=r"'h'.*no head"):
        Backprop().head(*specs(torch.empty(4, 5)))


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda: SupCon(temperature=0), "temperature=0 "),
        (lambda: SupCon(normalisation="eq3"), "normalisation='eq3' .*'code', 'eq2', 'alg1'"),
        (lambda: SupCon(projector="conv"), "projector='conv'"),
        (lambda: SupCon(pool=0), "pool=0"),
        (lambda: DeInfoReg(ce="both"), "ce='both'"),
        (lambda: DeInfoReg(widths=()), r"widths=\(\)"),
        (lambda: DeInfoReg(widths=(4, -1)), r"widths\[1\]=-1"),
        (lambda: DeInfoReg(alpha=-1.0), "alpha=-1.0"),
        (lambda: DeInfoReg(covariance=math.nan), "covariance=nan"),
        (lambda: EarlyExit(activation="swish"), "activation='swish'"),
        (lambda: EarlyExit(hidden=0), "hidden=0"),
    ],
)
def test_choices_are_checked_when_they_are_made(build: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build()
