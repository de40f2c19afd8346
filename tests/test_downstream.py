"""Heads made of the captured model's own blocks: which they are, what they compute, and that they train it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_builder import UNKEYED
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from training_tools import assert_same, compiled, make_batches, train

import autodecouple
from autodecouple.errors import InputError
from autodecouple.graph import Graph
from autodecouple.objectives import Auto, Downstream
from autodecouple.objectives.downstream import sampled
from autodecouple.objectives.objective import at_cut
from autodecouple.options import Wish
from autodecouple.passes.candidates import find_cuts
from autodecouple.passes.codegen import rehome
from autodecouple.passes.downstream.bound import AtCut
from autodecouple.passes.downstream.chain import Chain, find_chain
from autodecouple.passes.downstream.fresh import own_copy
from autodecouple.passes.downstream.route import choose_route
from autodecouple.pipeline import equipped
from autodecouple.plans import Plan

CLASSES, VOCAB, TOKENS = 4, 20, 6


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu_(self.norm1(self.conv1(x))))
        y += self.shortcut(x)
        return F.relu_(y)


class Net(nn.Module):
    """A stem, five residual blocks and a classifier; (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        widths = (4, 4, 6, 6, 8)
        self.layers = nn.Sequential(*(Residual(i, o, 1 + (o > i)) for i, o in zip((4, *widths), widths, strict=False)))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class Encoder(nn.Module):
    """A classifier of tokens (N, T), padded with 0."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True, norm_first=True) for _ in range(4)
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x, padding = self.embed(tokens), tokens == 0
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return self.fc(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=3, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(10, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.lstm(self.embed(tokens))[0][:, -1])


class Block(nn.Module):
    """Causal attention and a perceptron, each beside a shortcut."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Dropout(dropout))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Language(nn.Module):
    """A language model with a causal mask that it computes once; tokens (N, T) to scores (N, T, V)."""

    def __init__(self, dropout: float = 0.1, num_layers: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.h = nn.ModuleList(Block(dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=x.device).tril()
        for block in self.h:
            x = block(x, mask)
        return self.lm_head(self.norm(x))


class Dense(nn.Module):
    """A small encoder and decoder with a skip connection; (N, 3, 8, 8) to a class per position."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())
        self.middle = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(3)))
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.out = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        return self.out(torch.cat([self.up(self.middle(self.down2(skip))), skip], 1))


def plain(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(m for pair in itertools.pairwise(widths) for m in (nn.Linear(*pair), nn.Tanh())))


def next_token(scores: Tensor, tokens: Tensor) -> Tensor:
    """A causal language model's loss: every token tells the next one."""
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def images(rows: int = 6) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def tokens(rows: int = 6) -> Tensor:
    return torch.randint(1, VOCAB, (rows, TOKENS), generator=torch.Generator().manual_seed(1))


def labels(rows: int = 6) -> Tensor:
    return torch.arange(rows) % CLASSES


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor, Any]] = {
    "cnn": (Net, images(), labels(), None),
    "transformer": (Encoder, tokens(), labels(), None),
    "lstm": (Recurrent, tokens(), labels(), None),
    "language": (functools.partial(Language, 0.0), tokens(), tokens(), next_token),
    "dense": (Dense, images(), torch.arange(64).reshape(1, 8, 8).expand(6, 8, 8) % CLASSES, None),
    "perceptron": (lambda: plain(5, 6, 6, 6, 6, 3), torch.ones(6, 5), torch.ones(6, 3), nn.MSELoss()),
}


@functools.cache
def captured(kind: str) -> tuple[nn.Module, Graph, tuple[Any, ...]]:
    make, x, _, _ = MODELS[kind]
    torch.manual_seed(3)
    graph = autodecouple.capture(make(), x)
    return graph.model, graph, find_cuts(graph)


@functools.cache
def initial(kind: str) -> dict[str, Tensor]:
    """The weights as they were captured; asked for before anything trains."""
    return {name: value.clone() for name, value in captured(kind)[0].state_dict().items()}


def chain(kind: str) -> Chain:
    _, graph, candidates = captured(kind)
    return find_chain(graph, candidates)


def bound(kind: str, objective: Downstream, n_stages: int = 3, criterion: Any = None) -> Any:
    _, graph, candidates = captured(kind)
    wish = Wish.checked(n_stages, objective, ["cpu"])
    return equipped(wish, graph, candidates, criterion).objectives[0]


def heads_at(kind: str, objective: Downstream) -> list[tuple[AtCut, Any]]:
    """The objective at every legal cut of a model."""
    _, _, candidates = captured(kind)
    at = bound(kind, objective, criterion=MODELS[kind][3])
    cuts = [candidate.cut for candidate in candidates if candidate.cut is not None]
    return [at_cut(at, cut) for cut in cuts]  # type: ignore[misc]


def values_of(graph: Graph, x: Tensor) -> dict[str, Any]:
    """Every value of one training run of the captured model."""
    found: dict[str, Any] = {}

    class Keeper(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            # the model may write into it later
            found[n.name] = value.clone() if isinstance(value, Tensor) else value
            return value

    Keeper(graph.train).run(x)
    return found


# The chain


@pytest.mark.parametrize(
    "kind, blocks, tail",
    [
        ("cnn", [f"layers.{i}" for i in range(5)], "fc"),
        ("transformer", [f"layers.{i}" for i in range(4)], "fc"),
        ("language", [f"h.{i}" for i in range(5)], "lm_head"),
        ("perceptron", ["2", "4", "6"], "8"),
    ],
)
def test_blocks_are_the_modules_that_repeat(kind: str, blocks: list[str], tail: str) -> None:
    found = chain(kind)
    assert [block.name for block in found.blocks] == blocks
    assert found.tails[0].name == tail


def test_an_lstm_of_one_module_has_its_layers_for_blocks() -> None:
    found = chain("lstm")
    assert [block.name for block in found.blocks] == [f"lstm.lstm_layer{i}" for i in range(3)]
    assert found.tails[0].name == "fc"


def test_blocks_follow_each_other_up_to_the_output_layers() -> None:
    for kind in MODELS:
        found = chain(kind)
        for before, behind in zip(found.blocks, (*found.blocks[1:], found.tails[0]), strict=True):
            assert before.stop <= behind.start and before.entry is not None, kind
        assert {tail.stop for tail in found.tails} == {len(captured(kind)[1].operations)}


# Which blocks a head has


@given(st.integers(1, 60), st.data())
def test_sampled_blocks_are_at_equal_distances_and_the_last_is_among_them(remaining: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, remaining))
    found = sampled(count, remaining)
    assert len(set(found)) == count and found[-1] == remaining - 1 and found == tuple(sorted(found))
    gaps = [b - a for a, b in zip((-1, *found), found, strict=False)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("blocks", range(1, 9))
@pytest.mark.parametrize("n_stages", range(3, 9))
def test_narrowing_is_auglocals(blocks: int, n_stages: int) -> None:
    """With as many blocks as stages, d_l = max(1, round(d (1 - r) + r)) with r = l / (2 (L - 2))."""
    for index in range(n_stages - 1):
        share = 0.5 * index / (n_stages - 2)
        expected = max(1, round(blocks * (1 - share) + share))
        assert Downstream(blocks=blocks).count(index / (n_stages - 2), 99) == expected


@pytest.mark.parametrize(
    "objective, after, names",
    [
        (Downstream(blocks=2, budget=None), "stem", ["layers.2", "layers.4"]),
        (Downstream(blocks=5, budget=None), "stem", [f"layers.{i}" for i in range(5)]),
        (Downstream(blocks=1, budget=None), "layers.1", ["layers.4"]),
        (Downstream(blocks=3, budget=None), "layers.1", ["layers.2", "layers.3", "layers.4"]),
        (Downstream(blocks=3, budget=1e-9), "stem", ["layers.4"]),
        (Downstream(blocks=2), "layers.4", []),
    ],
    ids=str,
)
def test_a_head_has_the_expected_blocks(objective: Downstream, after: str, names: list[str]) -> None:
    at = bound("cnn", objective)
    candidate = next(c for c in captured("cnn")[2] if after in c.ended)
    route = choose_route(at.chain, objective, candidate.position, at.most_flops)
    assert [segment.name for segment in route.segments] == [*names, "fc"]


def test_the_rest_of_a_block_counts_as_one() -> None:
    at = bound("cnn", Downstream(blocks=2, budget=None))
    inside = next(c for c in captured("cnn")[2] if c.cut is not None and "layers.1.norm1" in c.ended)
    route = choose_route(at.chain, at.objective, inside.position, None)
    assert [segment.name for segment in route.segments] == ["", "layers.4", "fc"]
    assert route.segments[0].entry is None and route.segments[0].start == inside.position + 1


# What a head computes


@pytest.mark.parametrize("kind", ["cnn", "transformer", "lstm", "language", "perceptron"])
def test_with_every_block_copied_a_head_is_the_rest_of_the_model(kind: str) -> None:
    """At every legal cut, to the last bit: the values that cross, run through the head, give the model's own loss."""
    _, graph, _ = captured(kind)
    _, x, y, criterion = MODELS[kind]
    model = captured(kind)[0].train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = (criterion or nn.CrossEntropyLoss())(model(x), y)
    model.load_state_dict(state)
    values = values_of(graph, x)
    model.load_state_dict(state)
    exact = 0
    for at, cut in heads_at(kind, Downstream(blocks=99, budget=None, weights="copied")):
        route, end = at.route.segments, len(graph.operations)
        narrowed = sum(segment.stop - segment.start for segment in route) < end - route[0].start
        if narrowed:
            continue
        inputs = [values[name] for name in (*cut.features, *cut.sides)]
        loss, signal = at.task_head()(*inputs, y)
        assert torch.equal(loss, expected) and signal is y, cut.after
        exact += 1
    assert exact >= 3


@pytest.mark.parametrize("kind", list(MODELS))
def test_at_every_legal_cut_the_gradient_reaches_all_features(kind: str) -> None:
    _, graph, _ = captured(kind)
    _, x, y, _ = MODELS[kind]
    values = values_of(graph, x)
    for at, cut in heads_at(kind, Downstream()):
        inputs = [values[name] for name in (*cut.features, *cut.sides)]
        inputs = [v.detach().requires_grad_(v.is_floating_point()) for v in inputs]
        head = at.task_head()
        head(*inputs, y)[0].backward()
        for name, value in zip(cut.features, inputs, strict=False):
            assert value.grad is not None, (cut.after, name)
        assert all(p.grad is not None for p in head.parameters()), cut.after


def test_a_head_owns_its_weights() -> None:
    model = captured("cnn")[0]
    theirs = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for weights in ("fresh", "copied"):
        for at, _ in heads_at("cnn", Downstream(weights=weights)):
            head = at.task_head()
            assert theirs.isdisjoint(map(id, (*head.parameters(), *head.buffers())))


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4))
@settings(max_examples=30, deadline=None)
def test_fresh_weights_have_the_numbers_of_the_models(shape: list[int]) -> None:
    weight = nn.Parameter(torch.randn(shape))
    fresh = own_copy(weight, "fresh")
    assert fresh.requires_grad and fresh is not weight
    assert torch.equal(fresh.flatten().sort().values, weight.flatten().sort().values)
    assert torch.equal(own_copy(weight, "copied"), weight)


def test_fresh_weights_keep_orthogonality_and_biases() -> None:
    weight = nn.Parameter(nn.init.orthogonal_(torch.empty(8, 8)))
    fresh = own_copy(weight, "fresh")
    assert not torch.equal(fresh, weight)
    torch.testing.assert_close(fresh @ fresh.T, torch.eye(8))
    bias = nn.Parameter(torch.randn(5))
    assert torch.equal(own_copy(bias, "fresh"), bias)
    frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)
    assert torch.equal(own_copy(frozen, "fresh"), frozen) and not own_copy(frozen, "fresh").requires_grad


# The plan


@pytest.mark.parametrize("kind", ["cnn", "transformer", "dense", "perceptron"])
def test_the_plan_charges_what_the_heads_compute(kind: str) -> None:
    """torch's counter knows neither the LSTM nor the CPU's fused attention, so that the others are left out."""
    _, _, y, _ = MODELS[kind]
    # heads without an attention of their own: on a processor torch's counter knows nothing of its kernel
    with decoupled_of(kind, loss=Downstream(budget=1.0)) as decoupled:
        for stage in decoupled.stages[:-1]:
            spec = decoupled.plan.stages[stage.index]
            assert spec.objective == "downstream" and stage.code.head is not None
            cut = decoupled.plan.cuts[stage.index]
            inputs = [_random(cut.spec(stage.code.origin(name))) for name in stage.code.head_inputs]
            with FlopCounterMode(display=False) as counter:
                stage.code.head(*inputs, y)[0].backward()
            assert spec.head_flops == counter.get_total_flops()
            assert spec.head_parameter_bytes == sum(4 * p.numel() for p in stage.code.head.parameters())


def _random(spec: Any) -> Tensor:
    if spec.dtype == "bool":
        return torch.zeros(spec.shape, dtype=torch.bool)
    return torch.randn(spec.shape).requires_grad_()


def decoupled_of(kind: str, n_stages: int = 3, loss: Any = "downstream", **options: Any) -> Any:
    """A pipeline on the captured model with its initial weights: one at a time per kind."""
    model, graph, _ = captured(kind)
    model.load_state_dict(initial(kind))
    model.zero_grad(set_to_none=True)
    options = {"executor": "inline", "devices": ["cpu"], "criterion": MODELS[kind][3]} | options
    return autodecouple.compile(graph, n_stages, loss, **options)


@pytest.mark.slow
def test_heads_are_timed_with_the_masks_that_they_read() -> None:
    with decoupled_of("transformer", cost="measured") as decoupled:
        hidden = decoupled.plan.stages[:-1]
        assert any(cut.sides for cut in decoupled.plan.cuts) and all(stage.head_seconds for stage in hidden)


def test_the_plan_goes_to_json_and_back() -> None:
    with decoupled_of("language", loss=Downstream(budget=1.0)) as decoupled:
        plan = Plan.from_json(decoupled.plan.to_json())
        assert plan == decoupled.plan and any(cut.sides for cut in plan.cuts)
        assert all(cut.mask is None for cut in plan.cuts)
    with decoupled_of("language", loss=Downstream(budget=1.0), plan=plan) as again:
        assert again.plan == plan


# Training


@pytest.mark.parametrize("kind", list(MODELS))
def test_every_family_trains(kind: str) -> None:
    _, x, y, _ = MODELS[kind]
    with decoupled_of(kind, optimizer=lambda params: torch.optim.Adam(params, lr=0.01)) as decoupled:
        losses = [decoupled.train_step(x, y).losses for _ in range(30)]
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))


@pytest.mark.parametrize("kind", ["cnn", "lstm", pytest.param("language", marks=pytest.mark.slow), "perceptron"])
def test_with_every_block_copied_training_is_backprops(kind: str) -> None:
    """Each head stays what follows its cut, step by step: that is why copied weights close the gap."""
    make, x, y, criterion = MODELS[kind]
    torch.manual_seed(5)
    model = make().train()
    twin = copy.deepcopy(model)
    sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    cuts = {"cut_at": CUTS[kind], "devices": ["cpu"], "schedule": "sequential", "criterion": criterion}
    loss = Downstream(blocks=99, budget=None, weights="copied")
    with autodecouple.compile(model, 3, loss, example_inputs=x, optimizer=sgd, **cuts) as decoupled:
        losses = [decoupled.train_step(x, y).losses for _ in range(5)]
    optimizer, expected = sgd(twin.parameters()), []
    for _ in range(5):
        optimizer.zero_grad()
        task = (criterion or nn.CrossEntropyLoss())(twin(x), y)
        task.backward()
        optimizer.step()
        expected.append((task.item(),) * 3)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=1e-3, atol=1e-4)


CUTS = {
    "cnn": ("layers.0", "layers.2"),
    "lstm": ("lstm_layer0_output", "lstm_layer1_output"),
    "language": ("h.0", "h.2"),
    "perceptron": ("2", "4"),
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_every_parameter_has_a_gradient_of_its_own_stages_loss_and_of_no_other(kind: str) -> None:
    """By autograd, of the whole graph with the plan in it."""
    _, x, y, _ = MODELS[kind]
    with decoupled_of(kind) as decoupled:
        losses, _ = decoupled._compiled.module(x, y, UNKEYED)
        for stage in decoupled.stages:
            parts = (stage.code.body, stage.code.head)
            named = {f"{index}.{n}": p for index, m in enumerate(parts) for n, p in m.named_parameters()}
            for index, loss in enumerate(losses):
                found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
                reached = {name for name, gradient in zip(named, found, strict=True) if gradient is not None}
                assert reached == (set(named) if index == stage.index else set())


def test_another_plan_of_the_same_capture_asks_for_no_price_twice() -> None:
    graph = dataclasses.replace(captured("cnn")[1])  # which forgets all prices
    autodecouple.plan(graph, n_stages=3, loss=Downstream(budget=None), devices=["cpu"])
    known = dict(graph.memo["prices"])
    autodecouple.plan(graph, n_stages=2, loss=Downstream(budget=None), devices=["cpu"])
    assert known and graph.memo["prices"] == known


def test_the_model_comes_back_without_heads() -> None:
    _, x, y, _ = MODELS["language"]
    reference = MODELS["language"][0]()
    with decoupled_of("language") as decoupled:
        decoupled.train_step(x, y)
        assert list(decoupled.model.state_dict()) == list(reference.state_dict())
        assert len(list(decoupled.parameters())) == len(list(reference.parameters()))
        expected = decoupled.model.eval()(x)
        assert torch.equal(decoupled(x), expected)


@pytest.mark.timeout(120)
def test_streaming_equals_sequential_to_the_last_bit_with_dropout_in_the_heads() -> None:
    batches = make_batches("dropout", [8, 8, 6, 8, 3])
    loss = Downstream(blocks=2)
    reference = train(compiled("dropout", 3, loss, schedule="sequential", lanes=1), batches)
    assert_same(train(compiled("dropout", 3, loss), batches), reference)
    with compiled("dropout", 3, loss) as decoupled:
        assert any(stage.code.head_draws for stage in decoupled.stages)


@pytest.mark.timeout(120)
def test_micro_batches_change_no_loss() -> None:
    """The head meets the whole batch, whatever sizes crossed with each of its slices."""
    _, x, y, _ = MODELS["transformer"]
    with decoupled_of("transformer", optimizer=lambda p: torch.optim.SGD(p, lr=0.1)) as whole:
        expected = [whole.train_step(x, y).losses for _ in range(3)]
    schedule = autodecouple.schedules.MicroBatched(num_micro_batches=3)
    with decoupled_of("transformer", schedule=schedule, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)) as sliced:
        found = [sliced.train_step(x, y).losses for _ in range(3)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_smaller_batches_go_through_the_heads() -> None:
    for kind in ("cnn", "language"):
        _, x, y, _ = MODELS[kind]
        with decoupled_of(kind) as decoupled:
            for rows in (6, 1, 4):
                assert all(loss == loss for loss in decoupled.train_step(x[:rows], y[:rows]).losses)


def test_sequences_of_any_length_go_through_the_heads() -> None:
    x = tokens()
    options: dict[str, Any] = {"executor": "inline", "devices": ["cpu"], "criterion": next_token}
    model = Language(num_layers=3)
    with autodecouple.compile(model, 2, "downstream", example_inputs=x, dynamic=(1,), **options) as decoupled:
        for length in (TOKENS, 4, 6):
            assert all(loss == loss for loss in decoupled.train_step(x[:, :length], x[:, :length]).losses)


def test_a_language_models_heads_do_not_look_ahead() -> None:
    """The loss of the first tokens depends on no later one, at any legal cut."""
    graph, (_, x, _, _) = captured("language")[1], MODELS["language"]
    changed = x.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % VOCAB
    values, others = values_of(graph, x), values_of(graph, changed)
    at_start = dataclasses.replace(
        bound("language", Downstream()), criterion=lambda scores, y: next_token(scores[:, :3], y[:, :3])
    )
    for candidate in captured("language")[2]:
        if candidate.cut is None:
            continue
        at, cut = at_cut(at_start, candidate.cut)
        head = at.task_head()  # type: ignore[attr-defined]
        losses = [head(*(v[name] for name in (*cut.features, *cut.sides)), x)[0] for v in (values, others)]
        assert torch.allclose(*losses, atol=1e-6), cut.after


def test_heads_move_with_their_stage() -> None:
    with decoupled_of("language") as decoupled:
        for stage in decoupled.stages[:-1]:
            rehome(stage.code, torch.device("meta"))
            graphs = [m.graph for m in stage.code.head.modules() if isinstance(m, torch.fx.GraphModule)]
            devices = [
                value
                for graph in graphs
                for node in graph.nodes
                for value in (*node.args, *node.kwargs.values())
                if isinstance(value, torch.device)
            ]
            assert graphs and all(device.type == "meta" for device in devices)


def test_replanning_keeps_the_objective() -> None:
    _, x, y, _ = MODELS["cnn"]
    with decoupled_of("cnn") as decoupled:
        decoupled.train_step(x, y)
        plan = decoupled.replan(2)
        assert [stage.objective for stage in plan.stages] == ["downstream", "criterion"]
        assert all(loss == loss for loss in decoupled.train_step(x, y).losses)


def test_a_criterion_with_state_is_each_heads_own() -> None:
    _, x, y, _ = MODELS["cnn"]
    criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))
    with decoupled_of("cnn", criterion=criterion) as decoupled:
        held = [stage.code.head.get_submodule("criterion.criterion") for stage in decoupled.stages[:-1]]
        assert len({id(module) for module in (*held, criterion)}) == len(held) + 1
        assert all(loss == loss for loss in decoupled.train_step(x, y).losses)


# auto


def test_auto_takes_downstream_within_its_budget_and_says_so() -> None:
    with decoupled_of("cnn", loss="auto") as decoupled:
        assert {stage.objective for stage in decoupled.plan.stages} == {"downstream", "criterion"}
        assert any("'auto' is 'downstream'" in note and "5 blocks" in note for note in decoupled.plan.warnings)


def test_auto_takes_a_classifier_of_texts() -> None:
    """One label per text; a language model has one per token."""
    for kind, expected in (("transformer", "early_exit"), ("lstm", "early_exit"), ("language", "downstream")):
        _, graph, _ = captured(kind)
        assert autodecouple.plan(graph, n_stages=2, loss="auto", devices=["cpu"]).stages[0].objective == expected


def test_auto_takes_a_classifier_where_heads_would_cost_too_much() -> None:
    _, graph, _ = captured("cnn")
    plan = autodecouple.plan(graph, n_stages=3, loss=Auto(budget=1e-6), devices=["cpu"])
    assert plan.stages[0].objective in ("dgl", "early_exit")
    assert any("more than the budget" in note for note in plan.warnings)


def test_auto_takes_downstream_for_targets_that_are_no_classes() -> None:
    with decoupled_of("perceptron", loss=Auto(budget=1e-6)) as decoupled:
        assert decoupled.plan.stages[0].objective == "downstream"
        assert any("whatever the criterion does" in note for note in decoupled.plan.warnings)


# What is refused


def test_without_a_model_there_is_no_head() -> None:
    spec = autodecouple.plans.TensorSpec("h", (4, 5), "float32")
    for objective in (Downstream(), Auto()):
        with pytest.raises(InputError, match="captured model"):
            objective.head(spec, spec)


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda: Downstream(blocks=0), "blocks=0"),
        (lambda: Downstream(budget=-1.0), "budget=-1.0"),
        (lambda: Downstream(weights="new"), "weights='new' .*'fresh', 'copied'"),
        (lambda: Auto(budget=0.0), "budget=0.0"),
    ],
)
def test_choices_are_checked_when_they_are_made(build: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build()


class Opaque(nn.Module):
    """Runs whole: no graph can hold a choice that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 1e9 else self.linear(x).tanh()


def test_a_block_that_runs_whole_is_no_part_of_a_head() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), Opaque(), nn.Linear(6, 6), nn.Linear(6, 3))
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    options: dict[str, Any] = {"executor": "inline", "devices": ["cpu"], "example_inputs": x, "cut_at": ["0"]}
    with autodecouple.compile(model, 2, Downstream(blocks=9), **options) as decoupled:
        assert all(loss == loss for loss in decoupled.train_step(x, y).losses)
