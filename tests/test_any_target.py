"""Labels of rows, tokens and positions: what heads and the default criterion compare with, end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_tools import sgd

import autodecouple
from autodecouple.errors import InputError
from autodecouple.objectives import DeInfoReg, EarlyExit, SupCon

ROWS, TOKENS, SIZE, CLASSES = 6, 5, 8, 3


class Tagger(nn.Module):
    """One class per token, like a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.last = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x).relu()
        y: Tensor = self.last(x)
        return y


class Segmenter(nn.Module):
    """One class per pixel, from features at half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1)
        )
        self.last = nn.Conv2d(6, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(F.interpolate(self.layers(x).relu(), scale_factor=2.0))
        return y


def inputs_of(kind: str, generator: torch.Generator) -> Tensor:
    if kind == "tokens":
        return torch.randint(11, (ROWS, TOKENS), generator=generator)
    return torch.randn(ROWS, 1, SIZE, SIZE, generator=generator)


def batches(kind: str, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, TOKENS) if kind == "tokens" else (ROWS, SIZE, SIZE)
    found = []
    for _ in range(count):
        target = torch.randint(CLASSES, shape, generator=generator)
        target[0, :2] = -100  # padding: no loss counts it
        found.append((inputs_of(kind, generator), target))
    return found


MODELS = {"tokens": Tagger, "pixels": Segmenter}
LOSSES = [SupCon(hidden=8, out=4), DeInfoReg(widths=(8, 8, 8)), EarlyExit(hidden=8)]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("kind", MODELS)
def test_every_stage_learns_from_labels_of_tokens_and_positions(kind: str, loss: Any) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    before = {name: p.clone() for name, p in model.named_parameters()}
    example = (batches(kind)[0][0],)
    with autodecouple.compile(model, 3, loss, example_inputs=example, optimizer=sgd, devices=["cpu"] * 2) as decoupled:
        steps = [decoupled.train_step(x, y) for x, y in batches(kind)]
        assert all(value is not None and value == value for step in steps for value in step.losses)
        logits, target = steps[0].output, batches(kind)[0][1]
        classes_last = logits if kind == "tokens" else logits.movedim(1, -1)
        expected = F.cross_entropy(classes_last.reshape(-1, CLASSES), target.reshape(-1))  # ignores -100
        torch.testing.assert_close(torch.tensor(steps[0].losses[-1]), expected.detach())
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert all("bias" in name for name in still), "a loss that centres its embeddings is blind to a shift"


def test_the_first_batch_tells_what_labels_look_like() -> None:
    """A tagger may as well be trained with one label per row, if the criterion says how."""
    x = inputs_of("tokens", torch.Generator().manual_seed(0))
    y = torch.arange(ROWS) % CLASSES
    options: dict[str, Any] = {"criterion": lambda output, target: F.cross_entropy(output.mean(1), target)}
    for early in (True, False):
        given = {"example_inputs": (x,), "example_target": y} if early else {}
        with autodecouple.compile(Tagger(), 3, devices=["cpu"], **options, **given) as decoupled:
            step = decoupled.train_step(x, y)
            assert all(value is not None and value > 0 for value in step.losses)
            assert decoupled.graph.signal.shape == (ROWS,)


def test_a_target_of_another_form_is_refused() -> None:
    example = (inputs_of("pixels", torch.Generator().manual_seed(0)),)
    with autodecouple.compile(Segmenter(), 2, example_inputs=example, devices=["cpu"]) as decoupled:
        x, y = batches("pixels")[0]
        with pytest.raises(InputError, match=r"shape \(6, 8\), but .* class indices of shape \(6, 8, 8\)"):
            decoupled.train_step(x, y[:, 0])
        with pytest.raises(InputError, match="class 3, but the model's output has 3 classes"):
            decoupled.train_step(x, y + (y == 2).long())
        with pytest.raises(InputError, match="class -1"):
            decoupled.train_step(x, y.clamp(min=-1))


def test_labels_of_rows_are_refused_where_the_default_criterion_needs_one_per_token() -> None:
    """Its error came from within torch, when earlier stages had been trained on the batch."""
    x, y = batches("tokens")[0][0], torch.arange(ROWS) % CLASSES
    with autodecouple.compile(Tagger(), 3, LOSSES[2], example_inputs=(x,), devices=["cpu"], optimizer=sgd) as decoupled:
        before = {name: value.clone() for name, value in decoupled.model.state_dict().items()}
        with pytest.raises(InputError, match=r"shape \(6,\), but .* class indices of shape \(6, 5\)"):
            decoupled.train_step(x, y)
        assert all(torch.equal(value, before[name]) for name, value in decoupled.model.state_dict().items())


def test_labels_of_rows_have_the_models_classes_where_heads_classify_tokens() -> None:
    """A class too many was an IndexError in a stage's thread, where labels per token were checked beforehand."""
    x, y = batches("tokens")[0][0], torch.tensor([0, 1, 2, 7, 0, 1])
    options: dict[str, Any] = {"criterion": lambda output, target: F.cross_entropy(output.mean(1), target)}
    with autodecouple.compile(Tagger(), 3, LOSSES[2], example_inputs=(x,), devices=["cpu"], **options) as decoupled:
        with pytest.raises(InputError, match="class 7, but the model's output has 3 classes"):
            decoupled.train_step(x, y)
        assert decoupled.train_step(x, y.clamp(max=2)).losses


def test_one_capture_serves_many_plans() -> None:
    x, y = batches("tokens")[0]
    graph = autodecouple.capture(Tagger(), (x,))
    plans = [autodecouple.plan(graph, n_stages=k, loss=LOSSES[0]) for k in (2, 3, 4)]
    assert [len(plan.stages) for plan in plans] == [2, 3, 4]
    assert plans[1] == autodecouple.plan(Tagger(), (x,), 3, LOSSES[0])
    with autodecouple.compile(graph, 3, LOSSES[0], devices=["cpu"]) as decoupled:
        assert decoupled.model is graph.model
        assert [cut.after for cut in decoupled.plan.cuts] == [cut.after for cut in plans[1].cuts]
        assert decoupled.train_step(x, y).losses


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 7, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x).relu()
        y: Tensor = self.last(x)
        return y


def test_tied_weights_are_parted_on_request() -> None:
    """Trap 4: the peer makes two silent copies. Here the plan says so, and a plan alone changes nothing."""
    tokens = torch.randint(7, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    model = Tied()
    with pytest.raises(autodecouple.errors.PartitionError, match='tied="untie" makes them 2 parameters'):
        autodecouple.plan(model, (tokens,), 3)
    plan = autodecouple.plan(model, (tokens,), 3, tied="untie")
    assert any("untied" in note and "'last.weight'" in note for note in plan.warnings)
    assert model.last.weight is model.embedding.weight
    state = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {"example_inputs": (tokens,), "tied": "untie", "devices": ["cpu"], "optimizer": sgd}
    with autodecouple.compile(model, 3, LOSSES[0], **options) as decoupled:
        decoupled.train_step(tokens, tokens)
        trained = decoupled.model.state_dict()
    assert trained.keys() == state.keys() and model.last.weight is not model.embedding.weight
    assert not torch.equal(trained["last.weight"], trained["embedding.weight"])


class Named(nn.Module):
    """Its inputs have the names of the compiler's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.last = nn.Linear(4, 1)

    def forward(self, target: Tensor, randomness: Tensor) -> Tensor:
        x = target
        for layer in self.layers:
            x = F.dropout(layer(x) + randomness, 0.5)
        y: Tensor = self.last(x)
        return y


def test_inputs_may_be_called_what_they_want() -> None:
    """And with a criterion of its own, labels need not be the outputs' indices: a critic has one output."""
    x, y = torch.randn(ROWS, 4), torch.arange(ROWS) % 2
    options: dict[str, Any] = {"criterion": lambda output, target: output.mean(), "devices": ["cpu"]}
    with autodecouple.compile(Named(), 3, LOSSES[0], example_inputs=(x, x), **options) as decoupled:
        assert all(decoupled.train_step((x, x), y).losses)
    refused = pytest.raises(InputError, match="class 1, but the model's output has 1 classes")
    with autodecouple.compile(Named(), 2, LOSSES[2], example_inputs=(x, x), **options) as decoupled, refused:
        decoupled.train_step((x, x), y)
