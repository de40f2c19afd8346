"""Modules that no graph can hold run whole: what they compute, train, draw and write is the original's."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_strategies import touch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stage_builder import Built, build, target
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import autodecouple
from autodecouple.errors import TraceError
from autodecouple.graph import LEAF, Graph
from autodecouple.passes.capturing.blame import modules_of
from autodecouple.passes.capturing.observe import size_rule
from autodecouple.passes.capturing.opaque import Size
from autodecouple.passes.capturing.surroundings import held
from autodecouple.passes.measure import annotate
from autodecouple.passes.trace import capture
from autodecouple.pipeline import analyse
from autodecouple.randomness import Randomness

SWEEP = settings(max_examples=5, suppress_health_check=list(HealthCheck))
SLOW = settings(max_examples=60, suppress_health_check=list(HealthCheck))
WIDTH = 8


class Flip(torch.autograd.Function):
    """Gradient reversal: the backward is not that of the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -2 * gradient


flip = Flip.apply
"""The usual idiom: a reference to `apply` that was taken before any capture."""


class Block(nn.Module):
    """A layer whose forward is a function of the layer and the input."""

    def __init__(self, function: Callable[[Block, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.drop, self.norm = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.BatchNorm1d(WIDTH)
        self.register_buffer("calls", torch.zeros(()))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def branch(self: Block, x: Tensor) -> Tensor:
    y: Tensor = self.layer(x)
    return y * 2 if y.sum() > 0 else y


def loop(self: Block, x: Tensor) -> Tensor:
    for _ in range(int(x.argmax().item()) % 3 + 1):
        x = self.layer(x).tanh()
    return x


def dropped(self: Block, x: Tensor) -> Tensor:
    """Layerdrop: whether the layer runs is drawn."""
    return self.drop(self.layer(x)) if torch.rand(()).item() < 0.7 else x


def counted(self: Block, x: Tensor) -> Tensor:
    self.calls += 1
    y: Tensor = self.norm(self.layer(x))
    return y if y.detach().numpy().mean() > 0 else -y


def routed(self: Block, x: Tensor) -> Tensor:
    """A mixture of experts sends each row where the data say."""
    chosen = (x[:, 0] > 0).nonzero()[:, 0]
    return x.index_add(0, chosen, self.layer(x[chosen])) if len(chosen) else x


def flipped(self: Block, x: Tensor) -> Tensor:
    y: Tensor = flip(self.layer(x))
    return y


def hooked(self: Block, x: Tensor) -> Tensor:
    y: Tensor = self.layer(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: 3 * gradient)
    return y


def reentrant(self: Block, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(self.layer, x, use_reentrant=True)
    return y


def saved(self: Block, x: Tensor) -> Tensor:
    """What autograd saves is rounded: the gradients change."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.float()):
        y: Tensor = self.layer(x).tanh()
    return y


def force(self: Block, x: Tensor) -> Tensor:
    """An energy model's step along its own gradient."""
    energy = self.layer(x).square().sum()
    (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
    return x + gradient.tanh()


def per_row(self: Block, x: Tensor) -> Tensor:
    """torch.func inside the forward."""
    gradients = torch.func.vmap(torch.func.grad(lambda row: row.sin().sum()))(x)
    y: Tensor = self.layer(x) + gradients
    return y


def in_place(self: Block, x: Tensor) -> Tensor:
    """Writes into its input, and returns that very tensor."""
    x.mul_(2.0 if x.sum().item() > 0 else 0.5)
    return x


KINDS = {
    f.__name__: f for f in (branch, loop, dropped, counted, routed, flipped, hooked, reentrant, saved, force, per_row)
}


class Net(nn.Module):
    """Layers that a graph can hold, and between them blocks that it cannot."""

    def __init__(self, *kinds: str | Callable[[Block, Tensor], Any]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in kinds)
            self.blocks = nn.ModuleList(Block(KINDS[k] if isinstance(k, str) else k) for k in kinds)
            self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer, block in zip(self.layers, self.blocks, strict=True):
            x = block(layer(x).tanh())
        y: Tensor = self.last(x)
        return y


def batch(rows: int = 4) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))


def leaves_of(graph: Graph) -> list[str]:
    return [node.meta[LEAF].path for node in graph.operations if LEAF in node.meta]


def trained(model: nn.Module, run: Callable[[Tensor], Any], rows: int) -> list[Any]:
    """Output, gradients and buffers of one step from a fixed random state."""
    model.zero_grad()
    torch.manual_seed(rows)
    output = run(batch(rows))
    touch(output).backward()
    return [output, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def same(a: list[Any], b: list[Any]) -> bool:
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_whole(kinds: list[str]) -> None:
    model, twin = Net(*kinds), Net(*kinds)
    graph = capture(model, batch())
    assert leaves_of(graph) == [f"blocks.{index}" for index in range(len(kinds))]
    assert any("run" in note and "whole" in note for note in graph.warnings)
    for rows in (4, 2, 7):
        assert same(trained(twin, twin, rows), trained(model, graph.train, rows)), f"{rows} rows"
    if graph.evaluation is not None:
        assert torch.equal(twin.eval()(batch(5)), graph.evaluation(batch(5)))


@SWEEP
@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3))
def test_a_module_that_runs_whole_is_the_original(kinds: list[str]) -> None:
    """Outputs, gradients, buffers and random draws are bitwise the original's, at any batch size and in both modes."""
    check_whole(kinds)


@pytest.mark.slow
@SLOW
@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4))
def test_a_module_that_runs_whole_is_the_original_for_many(kinds: list[str]) -> None:
    check_whole(kinds)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_stages_with_modules_that_run_whole(kind: str) -> None:
    """Cut before and behind them, the stages are the model at another batch size, and every parameter trains."""
    model, twin = Net(kind, kind), Net(kind, kind)
    built = build(model, batch(), 3)
    assert len(built.codes) == 3, built.plan
    # its buffers may be written, so that a batch that is left out gives them back
    assert {name for code in built.codes for name in code.written} >= {"blocks.0.calls", "blocks.1.calls"}
    torch.manual_seed(0)
    expected = twin(batch(6))
    torch.manual_seed(0)
    assert torch.equal(built.output(built.run(batch(6))[-1]), expected)
    losses, _ = built.module(batch(), target(4), Randomness(0))
    sum(losses).backward()
    touch(twin(batch())).backward()
    for (name, parameter), reference in zip(model.named_parameters(), twin.parameters(), strict=True):
        # whether a dropped layer runs is drawn, and the stages draw keyed numbers
        assert kind == "dropped" or (parameter.grad is None) == (reference.grad is None), name


@pytest.mark.parametrize("kind", ["dropped", "counted"])
def test_streaming_equals_sequential_with_them(kind: str) -> None:
    """Random draws inside them are keyed by node and batch, and their buffers are the user's own."""
    found = []
    for schedule in ("sequential", "streaming"):
        model = Net(kind, kind)
        options: dict[str, Any] = {"devices": ["cpu"] * 3, "schedule": schedule, "example_inputs": batch(6)}
        with autodecouple.compile(model, 3, **options) as decoupled:
            steps = [decoupled.train_step(batch(6 + i), torch.arange(6 + i) % 3) for i in range(5)]
            losses = [step.losses for step in steps]
        found.append((losses, [*model.parameters(), *model.buffers()]))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


def test_flops_are_those_of_the_model() -> None:
    """What runs whole is counted in a real run, forward and backward: the stages' sums are the whole step's."""
    model = Net("branch", "branch")
    built = build(model, batch(), 1)
    (stage,) = built.plan.stages
    with FlopCounterMode(display=False) as counter:
        touch(Net("branch", "branch")(batch())).backward()
    assert stage.forward_flops + stage.backward_flops == counter.get_total_flops()


def test_the_smallest_module_runs_whole() -> None:
    """The block around it, and the layer beside it, stay in the graph."""
    inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(branch), nn.Linear(WIDTH, WIDTH))
    graph = capture(nn.Sequential(nn.Sequential(inner), nn.Linear(WIDTH, 3)), batch())
    assert leaves_of(graph) == ["0.0.1"]
    assert sum("linear" in node.name for node in graph.operations) == 3


def test_a_module_that_is_an_argument_is_not_to_blame() -> None:
    """checkpoint(self.layer, x) fails in a frame whose first argument is the layer; the fault is its caller's."""

    def call(layer: nn.Module, x: Tensor) -> None:
        raise ValueError

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(this, x: Tensor) -> None:
            call(this.layer, x)

    model = nn.Sequential(Caller())
    with pytest.raises(ValueError) as caught:
        model(torch.zeros(1, 2))
    assert modules_of(model, caught.value) == ["0", ""]


class Boxed:
    """No tensor, and nothing that pytree knows."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Opened(nn.Module):
    """Its inner block returns an object: only the module around it can run whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block(lambda block, x: Boxed(branch(block, x)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x).value
        return y


def test_where_one_cannot_run_whole_the_module_around_it_does() -> None:
    graph = capture(nn.Sequential(nn.Linear(WIDTH, WIDTH), Opened()), batch())
    assert leaves_of(graph) == ["1"]


def selected(self: Block, x: Tensor) -> Tensor:
    y: Tensor = self.layer(x)
    return y[x[:, 0] > 0] if x.sum().item() else y


def test_a_size_that_only_the_data_knows_cannot_run_whole() -> None:
    """Rows that the data choose: no rule gives the output's size, and the error says so beside the user's line."""
    with pytest.raises(TraceError, match=r"'0' cannot run whole instead: .*depends") as caught:
        capture(nn.Sequential(Block(selected), nn.Linear(WIDTH, 3)), batch(9))
    assert f"{__file__}:" in str(caught.value)
    assert 'mode="eval"' in str(caught.value)


def short(self: Block, x: Tensor) -> Tensor:
    y: Tensor = self.layer(x)
    return y[:-1] if x[0, 0].item() > 100 else y


def test_a_size_that_breaks_its_promise_is_refused() -> None:
    """The rest of the graph counts on it: a mean over rows that are not there would be wrong without a word."""
    graph = capture(nn.Sequential(Block(short), nn.Linear(WIDTH, 3)), batch())
    graph.train(batch(6))
    with pytest.raises(TraceError, match=r"'0' runs whole and returned a tensor of shape \(5, 8\).*promised \(6, 8\)"):
        graph.train(batch(6) + 200)


@pytest.mark.parametrize(
    ("sizes", "values"),
    [
        ([(4, 8), (5, 8), (9, 8)], [4, 5, 9]),
        ([(4, 8), (5, 8), (9, 8)], [7, 7, 7]),
        ([(4, 8), (5, 8), (9, 8)], [12, 15, 27]),
        ([(4, 8), (5, 8), (9, 8)], [3, 4, 8]),
        ([(4, 8), (5, 8), (9, 8)], [2, 2, 4]),
        ([(4, 6), (5, 6), (9, 6), (4, 7)], [24, 30, 54, 28]),
        ([(4, 6), (5, 6), (9, 6), (4, 7)], [9, 11, 19, 9]),
        ([(4, 6), (5, 6), (9, 6), (4, 7)], [6, 6, 6, 7]),
    ],
    ids=["same", "constant", "multiple", "shorter", "half", "product", "affine", "length"],
)
def test_sizes_follow_the_inputs(sizes: list[tuple[int, ...]], values: list[int]) -> None:
    rule = size_rule(values, sizes)
    assert [rule.of(size) for size in sizes] == values


def test_sizes_are_rules_not_numbers() -> None:
    assert Size((0, 1), factor=3, divisor=2, offset=1).of((4, 5)) == 31


def structured(self: Block, x: Tensor) -> Any:
    y = branch(self, x)
    return {"y": y, "none": None, "twice": (y.repeat(2, 1), y.sum(1)), "name": "block", "mean": y.mean()}


class Structures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(WIDTH, WIDTH), Block(structured), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.block(self.first(x))
        assert found["none"] is None
        doubled, sums = found["twice"]
        y: Tensor = self.last(found["y"] + doubled[: x.shape[0]] + sums[:, None]) * found["mean"]
        return y


def test_outputs_in_any_structure() -> None:
    """Dicts, None, constants, tensors of other sizes than the batch's."""
    model = Structures()
    graph = capture(model, batch())
    assert leaves_of(graph) == ["block"]
    for rows in (4, 7):
        assert torch.equal(graph.train(batch(rows)), model(batch(rows)))


def test_a_module_that_is_called_several_times_with_other_arguments() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.last = Scaled(), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.block(self.block(x, scale=0.5), rows=x.shape[0]))
            return y

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, scale: float = 1.0, rows: int = 1) -> Tensor:
            y: Tensor = self.layer(x) * scale / rows
            return y if y.sum() > 0 else -y

    model = Twice()
    graph = annotate(capture(model, batch()))
    assert leaves_of(graph) == ["block", "block"]
    for rows in (4, 7):
        assert torch.equal(graph.train(batch(rows)), model(batch(rows)))
    assert all(len(uses) == 2 for name, uses in graph.parameter_uses().items() if "block" in name)


def test_what_a_module_writes_into_is_known() -> None:
    """An input that it changes in place is copied at a cut in front of it, as for an operator of torch."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(in_place), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))

    model = make()
    graph, candidates = analyse(model, batch())
    (node,) = (node for node in graph.operations if LEAF in node.meta)
    source, made = node.args[2], next(iter(node.users))
    assert isinstance(source, torch.fx.Node)
    written = graph.measures[node.name].writes
    assert graph.measures[source.name].storages & written
    assert graph.measures[made.name].storages & written, "it returns the tensor that it was given"
    front = next(candidate for candidate in candidates if candidate.node == source.name)
    assert front.cut is not None
    assert front.cut.copied == (source.name,)
    built = build(model, batch(), 3)
    assert torch.equal(built.output(built.run(batch(6))[-1]), make()(batch(6)))


def test_the_flags_of_the_capture_hold_while_it_runs() -> None:
    """model.eval() between two batches must not switch off the dropout of the stages."""
    model = Net("dropped")
    graph = capture(model, batch())
    torch.manual_seed(3)
    expected = graph.train(batch())
    model.eval()
    torch.manual_seed(3)
    assert torch.equal(graph.train(batch()), expected)
    assert not any(module.training for module in model.modules())


def test_what_is_held_by_two_comes_back_once() -> None:
    """Two stages that hold one flag at once: the first to end must not give it back under the other."""
    module, inside, leave = nn.Linear(2, 2).eval(), threading.Event(), threading.Event()

    def hold() -> None:
        with held([(module, "training", True)]):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    with held([(module, "training", True)]):
        pass
    assert module.training
    leave.set()
    thread.join()
    assert not module.training


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_a_module_are_called(kind: str) -> None:
    """Trap: export forgets them without a word; the module that has one runs whole, others of its class do not."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, 3))
    scale = (lambda m, g_in, g_out: (5 * g_in[0],)) if "pre" not in kind else (lambda m, g_out: (5 * g_out[0],))
    getattr(model[1], kind)(scale)
    graph = capture(model, batch())
    assert leaves_of(graph) == ["1"]
    assert same(trained(model, model, 5), trained(model, graph.train, 5))


def test_a_backward_hook_on_the_model_itself_is_refused() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 3))
    model.register_full_backward_hook(lambda m, g_in, g_out: None)
    with pytest.raises(TraceError, match="has a backward hook"):
        capture(model, batch())


@pytest.mark.parametrize("pre", [False, True])
def test_forward_hooks_are_part_of_the_graph(pre: bool) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    if pre:
        model[1].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    else:
        model[0].register_forward_hook(lambda m, args, out: out * 2)
    graph = capture(model, batch())
    assert leaves_of(graph) == []
    assert torch.equal(graph.train(batch(6)), model(batch(6)))


def test_a_function_of_the_models_own_forward_is_refused_by_name() -> None:
    """Nothing is left that could run whole."""

    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = flip(self.layer(x))
            return y

    with pytest.raises(TraceError, match="Flip has a backward of its own") as caught:
        capture(Reversed(), batch())
    assert "put that part into a submodule" in str(caught.value)
    assert f"{__file__}:" in str(caught.value)


def test_other_threads_go_on_training_during_a_capture() -> None:
    """A capture notices functions of its own thread only."""
    stop, errors = threading.Event(), []

    def train() -> None:
        x = torch.ones(3, requires_grad=True)
        while not stop.is_set():
            try:
                flip(x).sum().backward()
            except Exception as error:
                errors.append(error)
                return

    thread = threading.Thread(target=train)
    thread.start()
    try:
        capture(Net("flipped"), batch())
    finally:
        stop.set()
        thread.join()
    assert not errors


@pytest.mark.parametrize(
    "make", [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm]
)
def test_parametrizations_are_part_of_the_graph(make: Callable[[nn.Module], nn.Module]) -> None:
    """Their originals are trained, and what spectral_norm counts is the user's own buffer."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(make(nn.Linear(WIDTH, WIDTH)), nn.Tanh(), nn.Linear(WIDTH, 3)))
    model, twin = models
    graph = capture(model, batch())
    assert leaves_of(graph) == []
    assert same(trained(twin, twin, 5), trained(model, graph.train, 5))


def test_functional_state_is_part_of_the_graph() -> None:
    """torch.func.functional_call with weights that the forward makes."""

    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gain = nn.Linear(WIDTH, 3), nn.Parameter(torch.rand(3, 1))

        def forward(self, x: Tensor) -> Tensor:
            weights = {"weight": self.inner.weight * self.gain, "bias": self.inner.bias}
            y: Tensor = torch.func.functional_call(self.inner, weights, (x,))
            return y

    model = Made()
    graph = capture(model, batch())
    assert same(trained(model, model, 5), trained(model, graph.train, 5))


class Renewed(Net):
    """Every call begins with a fresh state, unless it goes on from a cache: the capture has neither."""

    def forward(self, x: Tensor, go_on: bool = False) -> Tensor:
        if not torch.compiler.is_exporting() and not go_on:
            self.blocks[0].state = None  # type: ignore[assignment]
        return super().forward(x)


def test_a_state_kept_from_batch_to_batch_is_refused_by_name() -> None:
    """RecurrentGemma's linear unit goes on from the last batch's state: a smaller last batch failed in training."""

    def going_on(self: Block, x: Tensor) -> Tensor:
        y: Tensor = flip(self.layer(x))
        self.state = y.detach() if getattr(self, "state", None) is None else self.state * 0 + y.detach()  # type: ignore
        return y + 0 * self.state

    with pytest.raises(TraceError, match=r"no batch of another size.*blocks\.0\.state"):
        capture(Renewed(going_on), (batch(),))


def test_meta_tensors_cannot_show_what_a_module_does() -> None:
    with pytest.raises(TraceError, match="pass real tensors as example inputs"):
        capture(Net("branch"), batch().to("meta"))


def test_nothing_of_torchs_own_reaches_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """A failed export dumps its graph twice and logs warnings; what matters is in the error and the warnings."""
    levels = {name: logging.getLogger(name).disabled for name in logging.root.manager.loggerDict}
    capture(Net("branch", "flipped"), batch())
    with pytest.raises(TraceError):
        capture(Block(branch), batch())
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert all(logging.getLogger(name).disabled == before for name, before in levels.items())


def test_the_model_is_left_as_it_was() -> None:
    """Runs that only look leave buffers, gradients, hooks and Python attributes alone."""
    model = Net("counted", "dropped")
    before = [dict(vars(module)) for module in model.modules()]
    values = [t.clone() for t in (*model.parameters(), *model.buffers())]
    random = torch.get_rng_state()
    capture(model, batch())
    assert [dict(vars(module)) for module in model.modules()] == before
    assert same(values, [*model.parameters(), *model.buffers()])
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())


def plan_of(built: Built) -> list[str]:
    return [cut.after for cut in built.plan.cuts]


def test_no_cut_lies_inside() -> None:
    built = build(Net("loop", "loop"), batch(), 4)
    inside = {node.name for node in built.graph.operations if LEAF in node.meta}
    assert inside
    assert not inside & set(plan_of(built)), "its items can be cut at, not its list"
