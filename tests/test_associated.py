"""Associated Learning: the formula, which terms reach what, the way back to the classes, and training with it."""

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
from training_tools import assert_same, compiled, delays, make_batches, make_model, sgd, train

import autodecouple
from autodecouple.errors import InputError
from autodecouple.objectives import Associated
from autodecouple.objectives.associated import AssociatedHead
from autodecouple.plans import TensorSpec
from autodecouple.schedules import MicroBatched, Schedule, Sequential, Streaming

torch.set_num_threads(1)

SMALL = Associated(width=3, hidden=None)
KINDS = [
    SMALL,
    Associated(width=4, hidden=5, activation="sigmoid", reconstruction="mse"),
    Associated(width=2, hidden=3, activation="relu"),
]


def chain(objectives: list[Associated], x: Tensor, num_classes: int) -> list[AssociatedHead]:
    """Heads one after the other, each for the same features and what the one before passes on."""
    torch.manual_seed(0)
    features = TensorSpec("h", tuple(x.shape), "float64")
    signal: Any = TensorSpec("target", (x.shape[0],), "int64", num_classes=num_classes)
    heads = []
    for objective in objectives:
        heads.append(objective.head(features, signal))
        signal = objective.encoding(signal)
    return heads  # type: ignore[return-value]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    rows, width, num_classes = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(-1, num_classes, (rows,), generator=generator), num_classes


# ---------------------------------------------------------------- the formula, in plain Python

ACTIVATION = {"tanh": math.tanh, "sigmoid": lambda v: 1 / (1 + math.exp(-v)), "relu": lambda v: max(v, 0.0)}
Row = list[float]


def linear(layer: nn.Linear, row: Row) -> Row:
    weights, biases = layer.weight.tolist(), layer.bias.tolist()
    return [sum(w * v for w, v in zip(ws, row, strict=True)) + b for ws, b in zip(weights, biases, strict=True)]


def layers(module: nn.Module, row: Row, activation: str, activate_last: bool = True) -> Row:
    found = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    for layer in found:
        row = linear(layer, row)
        if layer is not found[-1] or activate_last:
            row = [ACTIVATION[activation](v) for v in row]
    return row


def mean_square(a: Row, b: Row) -> float:
    return sum((u - v) ** 2 for u, v in zip(a, b, strict=True)) / len(a)


def by_hand(
    heads: list[AssociatedHead], objectives: list[Associated], x: Tensor, y: Tensor, num_classes: int
) -> list[float]:
    """L_k of every level: t_k of each row from its one-hot label on, then the mean over the rows that count."""
    rows = [(s, label) for s, label in zip(x.tolist(), y.tolist(), strict=True) if label >= 0]
    losses = [0.0] * len(heads)
    for s, label in rows:
        t = [float(label == c) for c in range(num_classes)]
        for k, (head, objective) in enumerate(zip(heads, objectives, strict=True)):
            kind = objective.activation
            before, t = t, [ACTIVATION[kind](v) for v in linear(head.encoder, t)]
            to_classes = k == 0 and objective.reconstruction == "ce"
            decoded = layers(head.decoder, t, kind, activate_last=not to_classes)
            if to_classes:
                autoencoder = math.log(sum(math.exp(v) for v in decoded)) - decoded[label]
            else:
                autoencoder = mean_square(decoded, before)
            losses[k] += (mean_square(layers(head.bridge, s, kind), t) + autoencoder) / len(rows)
    return losses


@pytest.mark.parametrize("first", KINDS, ids=repr)
@settings(max_examples=25, deadline=None)
@given(batch=batches(), others=st.lists(st.sampled_from(KINDS), max_size=2))
def test_it_is_the_formula(first: Associated, others: list[Associated], batch: tuple[Tensor, Tensor, int]) -> None:
    """At every level, in float64; rows with a label below 0 are as if they were not there."""
    x, y, num_classes = batch
    objectives = [first, *others]
    heads, signal, losses = chain(objectives, x, num_classes), y, []
    for head in heads:
        loss, signal = head(x, signal)
        losses.append(loss.item())
    assert losses == pytest.approx(by_hand(heads, objectives, x, y, num_classes), rel=1e-10, abs=1e-10)


# ---------------------------------------------------------------- conformance 3, and isolation


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def test_the_bridge_trains_the_stage_and_the_autoencoder_the_encoder() -> None:
    """g_k has no gradient from the bridge's term, the features have none from the autoencoder's, and nothing reaches
    the level before. Each part by itself is the gradient of a loss without the other term."""
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 2, 1, 1, -1])
    first, second = chain([SMALL, SMALL], x, 3)
    _, signal = first(x, y)
    assert not signal[1].requires_grad
    codes = signal[1].clone().requires_grad_()
    loss, _ = second(x, (y, codes))
    target, counts = second.encode(codes)[y.clamp(min=0)], (y >= 0).double() / 4
    bridge = counts @ (second.bridge(x) - target.detach()).square().mean(1)
    autoencoder = counts @ (second.decoder(target) - codes.detach()[y.clamp(min=0)]).square().mean(1)
    inner = [*second.encoder.parameters(), *second.decoder.parameters()]
    outer = [x, *second.bridge.parameters()]
    torch.testing.assert_close(gradients(loss, outer), gradients(bridge, outer), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(loss, inner), gradients(autoencoder, inner), rtol=1e-10, atol=1e-12)
    assert not gradients(loss, [codes, *first.parameters()])[0].any()
    assert all(not gradient.any() for gradient in gradients(loss, list(first.parameters())))
    assert gradients(loss, [x])[0][:4].any(1).all() and not gradients(loss, [x])[0][4].any()


def test_no_loss_reaches_another_stage() -> None:
    """Law 2 on the whole graph, where nothing but the detached values keeps the stages apart."""
    decoupled = compiled("plain", 4, SMALL, executor="inline", lanes=1)
    pipeline = decoupled._compiled
    ((x, y),) = make_batches("plain", [6])
    with decoupled:
        losses, _ = pipeline.module(x, y, None)
        assert len(losses) == 4
        for loss, stage in zip(losses, pipeline.stages, strict=True):
            own = {id(p) for p in stage.parameters}
            for other in pipeline.stages:
                for parameter, gradient in zip(other.parameters, gradients(loss, other.parameters), strict=True):
                    assert id(parameter) in own or not gradient.any()
            assert any(gradient.any() for gradient in gradients(loss, stage.parameters))


# ---------------------------------------------------------------- the way back to the classes


def by_own_hand(decoupled: Any, x: Tensor, stage: int, cut_at: tuple[str, ...]) -> Tensor:
    """h_1(... h_k(b_k(f_k(... f_1(x))))) with the user's own children and the heads' own layers."""
    heads: list[Any] = [copy.deepcopy(each.code.head).eval() for each in decoupled.stages]
    h, model = x, copy.deepcopy(decoupled.model).eval()
    for name, child in model.named_children():
        h = child(h)
        if name == cut_at[stage]:
            break
    found = heads[stage].bridge(heads[stage].rows.pool(h))
    for head in heads[stage::-1]:
        found = head.decoder(found)
    return found


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_exit_is_the_bridge_and_then_every_decoder(stage: int) -> None:
    """Conformance 3: the last of these stages is the paper's inference, those before it are its shortcuts."""
    cut_at = ("1", "3", "4")
    with compiled("norm", 4, SMALL, cut_at=cut_at, optimizer=sgd) as decoupled:
        ((x, y),) = make_batches("norm", [6])
        decoupled.train_step(x, y)
        found = decoupled.exits.predict(x, stage)
        with torch.no_grad():
            expected = by_own_hand(decoupled, x, stage, cut_at)
        assert found.shape == (6, 4) and torch.equal(found, expected)


def test_a_detached_classifier_leaves_every_stage_a_head_as_in_the_paper() -> None:
    """K stages, K levels; the model's own inference is what it always was."""
    model = make_model("norm")
    ((x, y),) = make_batches("norm", [6])
    options: dict[str, Any] = {"example_inputs": (x,), "devices": ["cpu"], "detach_classifier": True}
    with autodecouple.compile(model, 2, SMALL, **options) as decoupled:
        decoupled.train_step(x, y)
        assert [stage.objective for stage in decoupled.plan.stages] == ["associated", "associated", "criterion"]
        assert decoupled.exits.stages == (0, 1, 2)
        assert torch.equal(decoupled.exits.predict(x, 2), decoupled(x))
        assert not any("heads" in name for name in decoupled.model.state_dict())


# ---------------------------------------------------------------- law 3


@pytest.mark.timeout(60)
@pytest.mark.parametrize("loss", ["associated", ["associated", "supcon", "associated"], ["associated", "bp", SMALL]])
@pytest.mark.parametrize(
    ("executor", "schedule"),
    [
        ("inline", Streaming()),
        ("streams", Streaming(queue_depth=1)),
        ("streams", Streaming(queue_depth=8)),
        ("streams", Streaming(barrier=True)),
        ("streams", MicroBatched(num_micro_batches=3)),
    ],
    ids=repr,
)
def test_streaming_equals_sequential(executor: str, schedule: Schedule, loss: Any) -> None:
    """To the last bit, with dropout, BatchNorm and late stages; `test_processes` and `test_distributed` have the
    other executors."""
    batches = make_batches("dropout", [6, 6, 6, 2])
    reference = Sequential(num_micro_batches=schedule.num_micro_batches)
    expected = train(compiled("dropout", 4, loss, executor="inline", schedule=reference, optimizer=sgd), batches)
    with delays(5):
        found = train(compiled("dropout", 4, loss, executor=executor, schedule=schedule, optimizer=sgd), batches)
    assert_same(found, expected)


def test_other_heads_between_compare_with_the_labels() -> None:
    """By hand: stage 1 has a contrastive loss of the labels, and stage 2 the codes of stage 0."""
    with compiled("norm", 4, [SMALL, "early_exit", SMALL], cut_at=("1", "2", "3"), optimizer=sgd) as decoupled:
        heads: list[Any] = [copy.deepcopy(stage.code.head) for stage in decoupled.stages[:3]]
        ((x, y),) = make_batches("norm", [6])
        h, losses, signal = x, [], y
        for name, child in make_model("norm").train().named_children():
            h = child(h)
            if name in ("1", "3"):
                loss, signal = heads[len(losses)](h, signal)
                losses.append(loss.item())
            if name == "2":
                losses.append(heads[1](h, y)[0].item())
        losses.append(nn.functional.cross_entropy(h, y).item())
        assert decoupled.train_step(x, y).losses == tuple(losses)


def test_every_level_is_charged_for_what_it_has() -> None:
    """The first level has matrices of the classes' size, later ones of the code's."""
    with compiled("norm", 4, Associated(width=7, hidden=9), cut_at=("1", "3", "4"), lanes=1) as decoupled:
        heads: list[Any] = [stage.code.head for stage in decoupled.stages[:3]]
        actual = [sum(p.numel() * p.element_size() for p in head.parameters()) for head in heads]
        assert [stage.head_parameter_bytes for stage in decoupled.plan.stages[:3]] == actual
        assert actual[0] != actual[1] == actual[2]
        flops = [stage.head_flops for stage in decoupled.plan.stages[:3]]
        assert flops[0] != flops[1] == flops[2]


@pytest.mark.filterwarnings("ignore:the state was saved with other cuts")
def test_a_head_that_becomes_the_first_begins_anew() -> None:
    """Of a plan with fewer stages it would have another shape: it is not taken over, and the model is."""
    ((x, y),) = make_batches("norm", [6])
    with compiled("norm", 4, SMALL, cut_at=("0", "2", "4"), lanes=1) as decoupled:
        decoupled.train_step(x, y)
        state = decoupled.state_dict()
    with compiled("norm", 3, SMALL, cut_at=("2", "4"), lanes=1) as decoupled:
        fresh = copy.deepcopy(decoupled.state_dict()["heads"])
        decoupled.load_state_dict(state)
        heads = decoupled.state_dict()["heads"]
        first, second = (cut.after for cut in decoupled.plan.cuts)
        assert_same(heads[first], fresh[first])
        assert_same(heads[second], state["heads"][second])
        assert_same(decoupled.state_dict()["model"], state["model"])


# ---------------------------------------------------------------- what it trains


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(nn.LSTM(8, 8, batch_first=True) for _ in range(3))
        self.classify = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h, _ = layer(h)
        y: Tensor = self.classify(h.mean(1))
        return y


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.classify = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0)
        y: Tensor = self.classify(h.mean(1))
        return y


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    more = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)]
    return nn.Sequential(*layers, *more)


def marked_images(rows: int) -> tuple[Tensor, Tensor]:
    """The class is the quarter that is bright."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(4, (rows,), generator=generator)
    x = 0.3 * torch.randn(rows, 1, 8, 8, generator=generator)
    for image, label in zip(x, y.tolist(), strict=True):
        image[0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 1
    return x, y


def marked_tokens(rows: int) -> tuple[Tensor, Tensor]:
    """The class is the token that is most frequent; some rows are padded."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(4, (rows,), generator=generator)
    x = torch.randint(5, 12, (rows, 6), generator=generator)
    x[:, :3] = y[:, None] + 1
    x[::3, 5:] = 0
    return x, y


FAMILIES: dict[str, Any] = {
    "cnn": (convolutional, marked_images),
    "lstm": (Recurrent, marked_tokens),
    "transformer": (Attentive, marked_tokens),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "family", ["cnn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lstm", "transformer"))]
)
def test_it_trains(family: str) -> None:
    """Every exit, that of the paper's inference and the model's own learn what chance does not know."""
    build, draw = FAMILIES[family]
    torch.manual_seed(0)
    model, (x, y) = build(), draw(48)
    options: dict[str, Any] = {"example_inputs": (x,), "devices": ["cpu"] * 2}
    faster: dict[str, Any] = {"optimizer": lambda params: torch.optim.Adam(params, lr=0.01)}
    with autodecouple.compile(model, 3, Associated(width=16), **options, **faster) as decoupled:
        first = decoupled.train_step(x, y)
        for _ in range(60):
            last = decoupled.train_step(x, y)
        pairs = zip(first.losses, last.losses, strict=True)
        assert all(a is not None and b is not None and b < a / 2 for a, b in pairs)
        hits = {stage: (scores.argmax(1) == y).double().mean() for stage, scores in decoupled.exits.all(x).items()}
        assert set(hits) == {0, 1, 2} and all(share > 0.8 for share in hits.values()), hits


# ---------------------------------------------------------------- forms of labels, and mistakes


@pytest.mark.parametrize(
    ("features", "labels", "scores"),
    [
        ((6, 4, 5), (6, 4), (6, 4, 3)),
        ((6, 3, 4, 4), (6, 8, 8), (6, 4, 4, 3)),
        ((6, 5), (6, 4), (6, 3)),
        ((6, 3, 4, 4), (6,), (6, 3)),
    ],
)
def test_labels_per_token_and_position(
    features: tuple[int, ...], labels: tuple[int, ...], scores: tuple[int, ...]
) -> None:
    """Each is a row with the code of its label; codes are passed on for any features."""
    x, y = torch.randn(features), torch.randint(-1, 3, labels)
    signal: Any = TensorSpec("target", labels, "int64", num_classes=3)
    first = SMALL.head(TensorSpec("h", features, "float32"), signal)
    second = SMALL.head(TensorSpec("h", (6, 7), "float32"), SMALL.encoding(signal))
    loss, codes = first(x.requires_grad_(), y)
    assert codes[0] is y and codes[1].shape == (3, 3)
    later, _ = second(torch.randn(6, 7), codes)
    loss.backward()
    assert x.grad is not None and x.grad.isfinite().all() and later.isfinite()
    assert first.decode(first.predict(x)).shape == scores  # type: ignore[operator]


def test_a_batch_in_which_no_label_counts_has_no_loss() -> None:
    (head,) = chain([SMALL], torch.randn(4, 5), 3)
    x = torch.full((4, 5), math.nan, dtype=torch.float64, requires_grad=True)
    loss, _ = head(x, torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_and_autocast(dtype: torch.dtype) -> None:
    features = TensorSpec("h", (6, 5), str(dtype).removeprefix("torch."))
    head = SMALL.head(features, TensorSpec("target", (6,), "int64", num_classes=3))
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    loss, (_, codes) = head(x.to(dtype), y)
    assert loss.dtype == codes.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        again, (_, narrow) = head(x.to(dtype), y)
    assert again.dtype == narrow.dtype == torch.float32 and abs(again - loss) < 0.05


def test_mistakes_are_named() -> None:
    x, y = TensorSpec("h", (4, 6), "float32"), TensorSpec("target", (4,), "int64")
    with pytest.raises(InputError, match="number of classes"):
        SMALL.head(x, y)
    with pytest.raises(InputError, match="number of classes"):
        SMALL.encoding(y)
    with pytest.raises(InputError, match="int64 class indices"):
        SMALL.head(x, dataclasses.replace(y, dtype="float32"))
    for wrong in ({"width": 0}, {"activation": "gelu"}, {"reconstruction": "l1"}, {"hidden": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Associated(**wrong)  # type: ignore[arg-type]


def test_the_papers_heads_have_the_papers_sizes() -> None:
    with torch.device("meta"):
        features = TensorSpec("h", (2, 64, 4, 4), "float32")
        head = Associated.paper().head(features, TensorSpec("target", (2,), "int64", num_classes=10))
    sizes = [(m.in_features, m.out_features) for m in head.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(10, 500), (1024, 2500), (2500, 500), (500, 10)]
