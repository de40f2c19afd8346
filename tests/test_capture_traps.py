"""The traps that 246 real models showed (one test each where no other file has one), from capture to trained stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_strategies import touch
from stage_builder import Built, build, target
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from autodecouple.errors import TraceError
from autodecouple.passes.candidates import find_cuts
from autodecouple.passes.capturing.bind import bind
from autodecouple.passes.codegen import rehome
from autodecouple.passes.measure import annotate
from autodecouple.passes.trace import capture
from autodecouple.pipeline import analyse
from autodecouple.randomness import Randomness


def layers(count: int, width: int = 8) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count))


def check(model: nn.Module, inputs: Any, other: Any, n_stages: int) -> Built:
    """As many stages as asked for; composed they are the model at another batch size, and every parameter trains."""
    built = build(model, inputs, n_stages)
    assert len(built.codes) == n_stages, built.plan
    for values in (inputs, other):
        torch.manual_seed(0)
        expected = model(*values)
        torch.manual_seed(0)
        assert torch.equal(built.output(built.run(values)[-1]), expected)
    named = built.values(inputs)
    losses, _ = built.module(*named.values(), target(len(next(iter(named.values())))), Randomness(0))
    sum(losses).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return built


class Rotary(nn.Module):
    """Trap 8: positions under no_grad() sit in a graph of their own inside the graph; 31 models of 96."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layers, self.last = nn.Embedding(9, 8), layers(4), nn.Linear(8, 3)

    @torch.no_grad()
    def rotation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inverse = 1.0 / 100 ** (torch.arange(0, 8, 2, device=x.device).float() / 8)
        angles = (torch.arange(x.shape[1], device=x.device).float()[:, None] @ inverse[None, :]).repeat(1, 2)
        return angles.cos(), angles.sin()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        cos, sin = self.rotation(x)
        for layer in self.layers:
            h = layer(x)
            x = x + (h * cos + torch.cat([-h[..., 4:], h[..., :4]], -1) * sin).tanh()
        y: Tensor = self.last(x.mean(1))
        return y


def tokens(rows: int) -> tuple[Tensor]:
    return (torch.randint(9, (rows, 5), generator=torch.Generator().manual_seed(rows)),)


def test_a_graph_inside_the_graph_is_measured_and_crosses() -> None:
    """Its side tensors cross every cut beside the features, and its products are counted."""
    model = Rotary()
    built = check(model, tokens(4), tokens(7), 4)
    assert all(len(cut.crossing) > 1 for cut in built.plan.cuts)
    with FlopCounterMode(display=False) as counter:
        model(*tokens(4))
    assert sum(stage.forward_flops for stage in built.plan.stages) == counter.get_total_flops()


class Constants(nn.Module):
    """Trap 9: tensors made in the forward are lifted into the graph, and `device=` is baked."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = layers(3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.tensor([1.0, 2.0] * 4)
        positions = torch.arange(8, device=x.device, dtype=x.dtype)
        for layer in self.layers:
            x = layer(x * weights + positions).tanh()
        y: Tensor = self.last(x * weights)
        return y


def test_lifted_constants_go_to_every_stage_that_reads_them() -> None:
    check(Constants(), (torch.randn(4, 8),), (torch.randn(7, 8),), 4)


@pytest.mark.parametrize("kind", ["constants", "rotary"])
def test_baked_devices_follow_the_stage(kind: str) -> None:
    """Trap 9: 101 graphs hold the device of the capture as a constant, some inside a graph of their own; a stage that
    is placed elsewhere would make its tensors on the wrong one."""
    model, inputs = (Constants(), (torch.randn(4, 8),)) if kind == "constants" else (Rotary(), tokens(4))
    built = build(model, inputs, 3)
    assert any("device" in node.kwargs for code in built.codes for node in _nodes(code.body)), "nothing baked: no test"
    received = {name: value.to("meta") for name, value in built.values(inputs).items()}
    for index, code in enumerate(built.codes):
        rehome(code, torch.device("meta"))
        code.body.to("meta")
        received = built.stage(index, received)
        assert all(value.is_meta for value in received.values() if isinstance(value, Tensor))


def _nodes(module: nn.Module) -> list[fx.Node]:
    return [node for part in module.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes]


class Checkpointed(nn.Module):
    """Trap 10: checkpoint() disappears in the graph; the results must not."""

    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.layers, self.drop, self.last = layers(3), nn.Dropout(0.5), nn.Linear(8, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(lambda h, layer=layer: self.drop(layer(h).tanh()), x, use_reentrant=self.use_reentrant)
        y: Tensor = self.last(x)
        return y


def test_checkpointed_layers_are_the_layers() -> None:
    """They are captured as they are; that their activations are kept, and what helps, is said once."""
    built = check(Checkpointed(), (torch.randn(4, 8),), (torch.randn(7, 8),), 4)
    (note,) = built.plan.warnings
    assert "torch.utils.checkpoint" in note
    assert "recompute=True" in note


def test_reentrant_checkpoints_are_refused_by_name() -> None:
    """Export traces them as if they were nothing, and their gradients are lost: parameters below got none."""
    with pytest.raises(TraceError, match="CheckpointFunction has a backward of its own"):
        build(Checkpointed(use_reentrant=True), (torch.randn(4, 8),), 3)


class Drops(nn.Module):
    """An encoder that draws which of its layers run, as wav2vec2 and hubert do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or torch.rand(()).item() > 0.3:
                x = x + layer(x).tanh()
        return x


def test_an_encoder_with_layerdrop_runs_whole_or_trains_as_it_evaluates() -> None:
    """Trap 11: nothing lies between the layers for a cut, so mode="eval" is the way to more stages."""
    x = torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(8, 8), Drops(), nn.Linear(8, 3))
    whole, candidates = analyse(model, (x,))
    assert any(note.startswith("1 runs whole") for note in whole.warnings)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(whole.train(x), expected)
    graph = annotate(capture(model, (x,), mode="eval"))
    assert len([c for c in find_cuts(graph) if c.cut]) > len([c for c in candidates if c.cut])
    assert torch.equal(graph.train(x), model.eval()(x))


@pytest.mark.slow
def test_caches_and_outputs_of_transformers() -> None:
    """Trap 7: use_cache=True is the default; a ModelOutput comes back as itself, at another length too."""
    from zoo.ops import transformers  # slow to import, and in need of torchvision's operators

    options = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 50}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options))
    inputs = {"input_ids": torch.randint(50, (4, 4)), "attention_mask": torch.ones(4, 4, dtype=torch.int64)}
    graph = capture(model, inputs, dynamic=(1,))
    assert model.config.use_cache is True
    other = {"input_ids": torch.randint(50, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    bind(graph, other)
    for training, module in ((True, graph.train), (False, graph.evaluation)):
        assert module is not None
        torch.manual_seed(0)
        expected = model.train(training)(**other, use_cache=False)
        torch.manual_seed(0)
        found = module(**other)
        assert type(found) is type(expected)
        assert torch.equal(found.logits, expected.logits)


class LastToken(nn.Module):
    """Trap 12: bart and t5 gather the token behind the end mark: how many there are, only the data says."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embedding, self.layers, self.last = nn.Embedding(9, 8), layers(3), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x).tanh()
        if self.way == "mask":
            x = x[tokens == 0].view(x.size(0), -1, x.size(2))[:, -1]
        else:
            x = x[torch.arange(x.shape[0], device=x.device), (tokens != 0).sum(1) - 1]
        y: Tensor = self.last(x)
        return y


@pytest.mark.parametrize("way", ["mask", "index"])
def test_sizes_that_only_the_data_knows(way: str) -> None:
    """FLOP formulas that ask for such a size fall back, and never stop the compiler."""
    texts = [torch.tensor([[1, 2, 3, 4, 0]] * rows) for rows in (4, 6)]
    check(LastToken(way), (texts[0],), (texts[1],), 3)


class Positions(nn.Module):
    """A buffer of positions that is only read, from both sides of every cut; and a counter that stands behind it."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = layers(3), nn.Linear(8, 3)
        self.register_buffer("table", torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x + self.table[: x.size(1)]).tanh()
        y: Tensor = self.last(x.mean(1))
        return y


def test_a_buffer_that_is_only_read_may_be_read_by_every_stage() -> None:
    built = check(Positions(), (torch.randn(4, 5, 8),), (torch.randn(7, 5, 8),), 3)
    assert all("table" not in code.written for code in built.codes)


class Frozen(nn.Module):
    """A frozen trunk and a frozen layer used twice: nothing that is not trained forbids a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.twice = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8).requires_grad_(False)
        self.layers, self.last = layers(3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        for layer in self.layers:
            x = self.twice(layer(x).tanh())
        y: Tensor = self.last(x)
        return y


def test_frozen_parameters_may_be_shared_by_stages() -> None:
    model = Frozen()
    built = check(model, (torch.randn(4, 8),), (torch.randn(7, 8),), 4)
    users = [code for code in built.codes if "twice.weight" in dict(code.body.named_parameters())]
    assert len(users) > 1
    assert all(dict(code.body.named_parameters())["twice.weight"] is model.twice.weight for code in users)
    assert built.plan.stages[0].parameter_bytes == 4 * (64 + 8), "its memory is that of what it trains"


class StochasticDepth(nn.Module):
    """Trap 1: in training whole branches are dropped by row, in evaluation the graph has none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last, self.side = layers(3), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            h = layer(x).tanh()
            if self.training:
                h = h * torch.empty(x.shape[0], 1).bernoulli_(0.8) / 0.8
            x = x + h
        return (self.last(x), self.side(x)) if self.training else self.last(x)


def test_two_modes_are_two_graphs() -> None:
    """Auxiliary heads (googlenet) and drop path exist in one mode only; each mode comes back as the model gives it."""
    model, x = StochasticDepth(), torch.randn(4, 8)
    built = build(model, (x,), 3)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    found = built.output(built.run((x,))[-1])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert built.graph.evaluation is not None
    assert torch.equal(built.graph.evaluation(x), model.eval()(x))
    assert any("bernoulli" in warning for warning in built.plan.warnings)
    touch(model.train()(x)).backward()
    assert model.side.weight.grad is not None


class Half(nn.Module):
    """float64 and bfloat16 models are cut like others; the heads' losses are taken in full precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers, self.last = layers(3).to(dtype), nn.Linear(8, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        y: Tensor = self.last(x)
        return y


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floating_point_types(dtype: torch.dtype) -> None:
    check(Half(dtype), (torch.randn(4, 8, dtype=dtype),), (torch.randn(7, 8, dtype=dtype),), 4)


class WrittenInput(nn.Module):
    """x.sub_(mean) on the input itself: the caller's tensor is written into, as by the original; one buffer deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = layers(2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x -= x.mean(0)
        for layer in self.layers:
            x = layer(x).relu_()
        y: Tensor = self.last(x)
        return y


def test_in_place_operations_before_the_first_parameter() -> None:
    check(WrittenInput(), (torch.randn(4, 8),), (torch.randn(7, 8),), 3)
