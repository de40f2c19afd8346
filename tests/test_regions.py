"""Code under no_grad, autocast and vmap, and operators with branches and loops, in the captured graph and in stages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graph_strategies import leaves, touch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from stage_builder import build
from torch import Tensor, fx, nn
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional as F
from training_tools import Batch, assert_same, sgd, train

import autodecouple
from autodecouple.graph import attribute, module_path, operations
from autodecouple.passes.capturing.autocast import called, under_autocast
from autodecouple.passes.capturing.regions import inline_regions, marked
from autodecouple.passes.capturing.vmaps import BODIES, call_whole

aten = torch.ops.aten
WIDTH = 4
MARKS = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast", "wrap_with_set_grad_enabled", "wrap_with_autocast")

REGIONS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "disabled": lambda: torch.autocast("cpu", enabled=False),
    "elsewhere": lambda: torch.autocast("mps", enabled=False),
}
STEPS = (
    *("linear", "square", "tanh", "softmax", "norm", "matmul", "cat", "einsum", "dropout", "dropped", "float", "half"),
    *("mul_", "relu_", "write", "view", "save", "add", "count", "observe", "batch_norm", "split", "weight_"),
)


@dataclass(frozen=True)
class Block:
    """A step, or a region with the blocks within."""

    kind: str
    inside: tuple[Block, ...] = ()


def blocks(depth: int = 3) -> st.SearchStrategy[tuple[Block, ...]]:
    step = st.builds(Block, st.sampled_from(STEPS))
    region = st.deferred(lambda: st.builds(Block, st.sampled_from(list(REGIONS)), blocks(depth - 1)))
    return st.lists(st.one_of(step, step, region) if depth else step, min_size=1, max_size=4).map(tuple)


class Nested(nn.Module):
    """Walks blocks; each weight is used once, so that autocast's cache of cast weights changes no gradient."""

    def __init__(self, *program: Block) -> None:
        super().__init__()
        self.program = program
        self.first = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList()
        self.weights = nn.ParameterList()
        self.frozen = nn.Dropout(0.5)
        self.register_buffer("counter", torch.zeros(()))
        self.register_buffer("scale", torch.ones(WIDTH))
        self._build(program)
        self.frozen.eval()

    def _build(self, program: tuple[Block, ...]) -> None:
        for block in program:
            self._build(block.inside)
            if block.kind in ("linear", "square"):
                self.layers.append(nn.Linear(WIDTH, WIDTH, bias=block.kind == "linear"))
            elif block.kind in ("norm", "batch_norm"):
                self.layers.append(nn.LayerNorm(WIDTH) if block.kind == "norm" else nn.BatchNorm1d(WIDTH))
            elif block.kind in ("matmul", "einsum", "weight_"):
                self.weights.append(nn.Parameter(torch.randn(WIDTH, WIDTH)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.rest, self.pool, self.saved = iter(self.layers), iter(self.weights), [x]
        x = self._walk(self.program, self.first(x))
        return self.last(x.float()), x

    def _walk(self, program: tuple[Block, ...], x: Tensor) -> Tensor:
        for block in program:
            if block.kind in REGIONS:
                with REGIONS[block.kind]():
                    x = self._walk(block.inside, x)
            else:
                x = getattr(self, f"_{block.kind.rstrip('_')}")(x)
        return x

    def _linear(self, x: Tensor) -> Tensor:
        return next(self.rest)(x.float())

    _square = _norm = _batch_norm = _linear

    def _tanh(self, x: Tensor) -> Tensor:
        return x.tanh() * self.scale.sum()

    def _softmax(self, x: Tensor) -> Tensor:
        return x.softmax(-1)

    def _matmul(self, x: Tensor) -> Tensor:
        return x.float() @ next(self.pool)

    def _einsum(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,ij->nj", x.float(), next(self.pool))

    def _weight(self, x: Tensor) -> Tensor:
        weight = next(self.pool)
        with torch.no_grad():
            weight.clamp_(-1, 1)
        return x * weight.sum(0)

    def _cat(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.saved[-1].to(x.dtype)], 1)[:, :WIDTH] + 1

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3)

    def _dropped(self, x: Tensor) -> Tensor:
        return self.frozen(x)

    def _float(self, x: Tensor) -> Tensor:
        return x.float()

    def _half(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)

    def _mul(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)

    def _relu(self, x: Tensor) -> Tensor:
        F.relu_(x)
        return x

    def _write(self, x: Tensor) -> Tensor:
        x[:, 0] = 0.25
        return x

    def _view(self, x: Tensor) -> Tensor:
        return x.view(2, -1).view(-1, WIDTH)

    def _split(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat([a * 2, b], 1)

    def _save(self, x: Tensor) -> Tensor:
        self.saved.append(x)
        return x * 1.5

    def _add(self, x: Tensor) -> Tensor:
        return x + self.saved[-1]

    def _count(self, x: Tensor) -> Tensor:
        self.counter += 1
        return x

    def _observe(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(0.9).add_(x.detach().float().abs().mean(0) * 0.1)
        return x


def flat(model: nn.Module, x: Tensor, *, folded: bool = False) -> fx.GraphModule:
    """The graph of a model with its regions taken out; `folded`: from the operators that torch.export makes of them."""
    with contextlib.nullcontext() if folded else marked():
        shapes = ({0: torch.export.Dim.AUTO},)
        program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    module = program.module(check_guards=False)
    module._forward_pre_hooks.clear()  # which check the size of the batch
    assert isinstance(module, fx.GraphModule)
    for node in reversed(operations(module.graph)):
        if "_assert_tensor_metadata" in str(node.target):
            module.graph.erase_node(node)
    inline_regions(module)
    module.graph.lint()
    return module


@dataclass(frozen=True)
class Outcome:
    """What one training step leaves: outputs, gradients, parameters and buffers."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    state: dict[str, Tensor]


def outcome(run: Callable[..., Any], model: nn.Module, x: Tensor) -> Outcome:
    """Of a forward and backward through `run`, which uses the model's parameters; the model is put back afterwards."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        outputs = run(x)
    touch(outputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(before)
    return Outcome([leaf.detach() for leaf in leaves(outputs)], gradients, state)


def batch(rows: int, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


def made(kind: Callable[..., nn.Module], *args: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*args)


def assert_trains_alike(model: nn.Module, *, folded: bool = False) -> fx.GraphModule:
    """The flat graph computes, differentiates and writes what the model does, at another batch size than captured."""
    module = flat(model, batch(4), folded=folded)
    assert not {getattr(node.target, "__name__", "") for node in module.graph.nodes} & set(MARKS)
    expected, found = outcome(model, model, batch(6)), outcome(module, model, batch(6))
    assert_same(vars(expected), vars(found))
    return module


@settings(max_examples=20)
@given(blocks())
def test_regions_nested_anyhow_train_as_the_model_does(program: tuple[Block, ...]) -> None:
    """Outputs, gradients, buffers and written parameters, bitwise, for any nesting of regions around any steps."""
    model = made(Nested, *program)
    try:
        outcome(model, model, batch(6))
    except RuntimeError as error:
        if any(word in str(error) for word in ("inplace", "in-place", "at::autocast::prioritize")):
            reject()  # torch itself does not train this program
        raise
    assert_trains_alike(made(Nested, *program))


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("region", ["bfloat16", "disabled"])
def test_an_autocast_of_the_caller_changes_nothing_within_a_region(region: str, ambient: torch.dtype) -> None:
    """Each operation takes its autocast along, so that a stage may run it within any other."""
    steps = [Block(kind) for kind in ("linear", "matmul", "softmax", "einsum", "norm", "dropout", "cat")]
    model = made(Nested, Block(region, tuple(steps)))
    model.first, model.last = nn.Identity(), nn.Identity()
    module = flat(model, batch(4))

    def within(x: Tensor) -> Any:
        with torch.autocast("cpu", ambient):
            return module(x)

    expected, found = outcome(module, model, batch(6)), outcome(within, model, batch(6))
    assert_same(vars(expected), vars(found))


def test_regions_that_export_folded_are_entered() -> None:
    """Without `marked()` a region is an operator with a body, nested ones bodies within bodies."""
    inner = Block("disabled", (Block("matmul"), Block("tanh")))
    mixed = Block("bfloat16", (Block("linear"), Block("dropout"), inner, Block("softmax")))
    program = (Block("no_grad", (Block("linear"), Block("observe"))), mixed, Block("no_grad", (Block("mul_"), mixed)))
    module = assert_trains_alike(made(Nested, *program), folded=True)
    assert not [name for name, child in module.named_modules() if name and isinstance(child, fx.GraphModule)]


def test_nodes_keep_names_metadata_and_the_users_parameters() -> None:
    inside = (Block("linear"), Block("dropout"), Block("no_grad", (Block("square"),)))
    model = made(Nested, Block("bfloat16", inside))
    module = flat(model, batch(4))
    for node in operations(module.graph):
        assert isinstance(node.meta["val"], Tensor)
        assert "nn_module_stack" in node.meta and "stack_trace" in node.meta
    nodes = {node.name: node for node in module.graph.nodes}
    assert module_path(nodes["linear_1"]) == ("", "layers.0")
    assert module_path(nodes["layers_1_weight_detached"]) == ("", "layers.1")
    assert attribute(module, nodes["layers_0_weight"]) is model.layers[0].weight
    assert nodes["dropout"].target is aten.dropout.default, "what no autocast acts on stays what it was"
    device, dtype, enabled = nodes["linear_1"].args[:3]
    assert nodes["linear_1"].target is under_autocast
    assert (device, dtype, enabled) == (torch.device("cpu"), torch.bfloat16, True)
    assert called(nodes["linear_1"]) == (aten.linear.default, nodes["linear_1"].args[4:])
    assert called(nodes["dropout"]) == (aten.dropout.default, nodes["dropout"].args)


def test_no_cut_is_lost_within_a_region() -> None:
    """A model that runs wholly under autocast is cut as often, and as well, as without."""

    class Deep(nn.Module):
        def __init__(self, region: str) -> None:
            super().__init__()
            self.region = region
            self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))

        def forward(self, x: Tensor) -> Tensor:
            with REGIONS[self.region]():
                return self.layers(x)

    plain, mixed = (build(made(Deep, kind), (batch(4, 8),), 3) for kind in ("enable_grad", "bfloat16"))
    assert [stage.nodes for stage in plain.plan.stages] == [stage.nodes for stage in mixed.plan.stages]
    assert [stage.flops for stage in plain.plan.stages] == [stage.flops for stage in mixed.plan.stages]
    last = mixed.run((batch(6, 8),))[-1]
    assert_same(mixed.model(batch(6, 8)), mixed.output(last))


def test_a_no_grad_within_an_autocast_is_kept() -> None:
    """torch.export's splitter put the autocast first and then did not see the no_grad: weights used under no_grad got
    gradients, and everything before it wrong ones, though the outputs were right.
    """
    inside = (Block("linear"), Block("no_grad", (Block("square"), Block("observe"))), Block("add"))
    module = assert_trains_alike(made(Nested, Block("save"), Block("bfloat16", inside)))
    assert [node.name for node in module.graph.nodes if node.target is aten.detach.default]


class Inferring(nn.Module):
    """Takes a threshold of its features under inference_mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.inference_mode():
            threshold = self.first(x).mean()
            with torch.inference_mode(False):
                doubled = x * 2
        return self.last(x + threshold + doubled)


def test_inference_mode_gives_no_gradient() -> None:
    """torch.export leaves no trace of inference_mode: its results carried gradients."""
    enter = torch.inference_mode.__enter__
    assert_trains_alike(made(Inferring))
    assert torch.inference_mode.__enter__ is enter


@pytest.mark.parametrize("step", ["float", "dropped", "mul_", "relu_", "write"])
def test_an_operand_that_comes_back_under_no_grad_keeps_its_gradient(step: str) -> None:
    """`x.float()` of a float gives x itself, a write too: what follows outside the region is still trained."""
    module = assert_trains_alike(made(Nested, Block("linear"), Block("no_grad", (Block(step),)), Block("square")))
    names = {str(node.target) for node in module.graph.find_nodes(op="get_attr") if node.users}
    assert "first.weight" in names
    gradients = outcome(module, module, batch(4)).gradients
    assert gradients["layers.0.weight"] is not None and gradients["layers.0.weight"].any()


class Memory(nn.Module):
    """Writes features through a view into memory that carried no gradient, and reads it under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, memory = self.first(x), torch.zeros(2, WIDTH)
        memory[0] = x.mean(0)
        with torch.no_grad():
            level = memory.sum(0)
        x = x * 2
        with torch.no_grad():
            level = level + x.mean(0)
        return self.last(x + level + memory.sum(0) * level)


def test_memory_that_a_write_gave_a_gradient_is_detached_under_no_grad() -> None:
    module = assert_trains_alike(made(Memory))
    detached = [node.args[0] for node in module.graph.nodes if node.target is aten.detach.default]
    assert [str(source) for source in detached] == ["zeros", "mul"]


def test_an_alias_lives_no_longer_than_its_region() -> None:
    """One kept for a later region would cross every cut in between."""
    region = Block("no_grad", (Block("tanh"), Block("add")))
    module = assert_trains_alike(made(Nested, Block("save"), region, Block("linear"), region))
    sources = [node.args[0] for node in module.graph.nodes if node.target is aten.detach.default]
    assert len(set(sources)) < len(sources)


def test_a_weight_that_an_autocast_uses_twice() -> None:
    """autocast caches the cast weight and adds its two gradients in bfloat16; here they meet in float32.

    Without the cache, the gradients are the same.
    """

    class Twice(nn.Module):
        def __init__(self, cache: bool) -> None:
            super().__init__()
            self.cache = cache
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=self.cache):
                return self.linear(self.linear(x).tanh())

    assert_trains_alike(made(Twice, False))
    model = made(Twice, True)
    expected, found = outcome(model, model, batch(6)), outcome(flat(model, batch(4)), model, batch(6))
    assert_same(expected.outputs, found.outputs)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=2e-2, atol=2e-2)


class Body(nn.Module):
    """Layers around something that is done with a function of rows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.inner, self.other = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(getattr(self, self.kind)(self.first(x)).float())

    def vmap(self, x: Tensor) -> Tensor:
        def row(v: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                w = self.other(v) * 3
            return torch.vmap(lambda u: u * 2 + u.sum())(v[None])[0] + w, self.inner(v).relu()

        with torch.autocast("cpu", torch.bfloat16):
            a, b = torch.vmap(row)(x)
        return a + b + torch.vmap(torch.sin)(x)

    def cond(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda v: self.inner(v).relu(), lambda v: self.other(v) - v, (x,))

    def cond_under(self, x: Tensor) -> Tensor:
        def yes(v: Tensor) -> Tensor:
            with torch.no_grad():
                w = self.other(v)
            return self.inner(v) + w

        with torch.autocast("cpu", torch.bfloat16):
            return torch.cond(x.sum() > -1e9, yes, self.other, (x,))

    def map(self, x: Tensor) -> Tensor:
        return map_over(lambda v: self.inner(v).tanh(), x)

    def scan(self, x: Tensor) -> Tensor:
        last, rows = scan(lambda c, v: (c + self.inner(v), c * v), x[0] * 0, x)
        return rows + last

    def loop(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            _, y = while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, v * 2), (torch.tensor(0), x.detach()))
        return self.inner(x) + y


def test_a_vmap_is_one_operation() -> None:
    """Between two of its operations a cut would part tensors that exist within the vmap only."""
    module = assert_trains_alike(made(Body, "vmap"))
    whole = [node for node in module.graph.nodes if node.target is call_whole]
    assert len(whole) == 2
    assert not [node for node in module.graph.nodes if "batch_dim" in str(node.target)]
    assert all(isinstance(body, fx.GraphModule) for node in whole for body in node.meta[BODIES])
    assert called(whole[0])[0] is whole[0].args[0]


@pytest.mark.parametrize("kind", ["cond", "cond_under", "loop"])
def test_branches_and_loops_train_as_the_model_does(kind: str) -> None:
    module = assert_trains_alike(made(Body, kind))
    (whole,) = [node for node in module.graph.nodes if node.target is call_whole]
    assert whole.meta[BODIES]


@pytest.mark.parametrize("kind", ["map", "scan"])
def test_loops_over_rows_train_as_the_model_does(kind: str) -> None:
    """torch adds the rows' gradients in another order, so not to the last bit."""
    model = made(Body, kind)
    expected, found = outcome(model, model, batch(6)), outcome(flat(model, batch(4)), model, batch(6))
    torch.testing.assert_close(vars(found), vars(expected))


class Switches(nn.Module):
    """Blocks that each decide by their values what to do, and a vmap in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cond(x.sum() > 0, lambda v, f=layer: f(v) * 2, lambda v, f=layer: f(v).tanh() - v, (x,))
            x = torch.vmap(lambda v: v / (1 + v.abs().sum()))(x)
        return self.last(x)


@pytest.mark.slow
def test_stages_with_branches_stream() -> None:
    """Several threads run conditions at once: torch's own kernel traces the branch at each call and fails there."""
    batches: list[Batch] = [(batch(rows, 8), torch.arange(rows) % 2) for rows in (4, 6, 5, 4)]
    results = []
    for schedule, lanes in (("sequential", 1), ("streaming", 3)):
        options: dict[str, Any] = {"schedule": schedule, "devices": ["cpu"] * lanes, "optimizer": sgd}
        decoupled = autodecouple.compile(made(Switches), 3, "supcon", example_inputs=(batch(4, 8),), **options)
        results.append(train(decoupled, batches))
    assert_same(vars(results[0]), vars(results[1]))


@pytest.mark.slow
def test_rotary_embeddings_of_a_language_model() -> None:
    """Their cosines are taken under no_grad, of what carries no gradient: nothing need be detached."""
    from zoo.ops import transformers  # slow to import, and in need of torchvision's operators

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, use_cache=False, **sizes)
    model = made(transformers.LlamaForCausalLM, config)
    tokens = torch.arange(12).view(2, 6)
    with marked():
        shapes = {"input_ids": {0: torch.export.Dim.AUTO}}
        program = torch.export.export(model, (), {"input_ids": tokens}, dynamic_shapes=shapes, strict=False)
    module = program.module(check_guards=False)
    inline_regions(module)
    names = {getattr(node.target, "__name__", "") for node in module.graph.nodes}
    assert not names & {*MARKS, "detach.default"}
    results = [outcome(lambda ids, f=run: f(input_ids=ids).logits, model, tokens) for run in (model, module)]
    assert_same(vars(results[0]), vars(results[1]))
