"""Recurrent layers written out layer by layer: the same results, and places to cut between the layers."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_builder import build, target
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import autodecouple
from autodecouple.passes import trace
from autodecouple.passes.capturing import export as exporting
from autodecouple.passes.capturing.recurrent import OPERATORS, shape_only, split_layers
from autodecouple.pipeline import analyse
from autodecouple.randomness import Randomness

WIDTH, HIDDEN, STEPS = 4, 5, 3
KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
}
STATES = {
    "zeros": lambda self, x, n, width: None,
    "made": lambda self, x, n, width: torch.zeros(self.rows, n, width, device=x.device).requires_grad_(),
    "detached": lambda self, x, n, width: torch.zeros(self.rows, n, width).to(x.device).detach(),
    "new": lambda self, x, n, width: x.new_zeros(self.rows, n, width),
    "like": lambda self, x, n, width: torch.zeros_like(x.reshape(-1)[:1].expand(self.rows, n, width)),
    "expanded": lambda self, x, n, width: torch.zeros(self.rows, 1, width).expand(-1, n, -1),
    "ones": lambda self, x, n, width: torch.ones(self.rows, n, width),
    "filled": lambda self, x, n, width: torch.zeros(self.rows, n, width).fill_(0.5),
    "written": lambda self, x, n, width: half(torch.zeros(self.rows, n, width)),
    "learned": lambda self, x, n, width: self.learned[..., :width].expand(-1, n, -1),
    "computed": lambda self, x, n, width: (x.mean() * self.learned[..., :width]).expand(-1, n, -1),
}
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda h: torch.zeros(()),
    "last": lambda h: h[-1],
    "first": lambda h: h[0],
    "last slice": lambda h: h[-1:, :, 1:],
    "directions": lambda h: torch.cat([h[-2], h[-1]], 1),
    "ends": lambda h: h[0] + 2 * h[-1],
    "inner": lambda h: h[1:3].sum(0) + h[2],
    "strided": lambda h: h[::3].sum(0),
    "everything": lambda h: h.transpose(0, 1).flatten(1),
    "everything and last": lambda h: h.sum() + h[-1],
    "written": lambda h: h[-1].mul_(2) + h[-1] + h[0],
    "part and middle": lambda h: h[:, :1].sum() + h[1],
    "outer dimension": lambda h: h.select(-3, 1),
}


def half(h: Tensor) -> Tensor:
    """Writes through a view."""
    h[0] = 0.5
    return h


@dataclass(frozen=True)
class Case:
    """A recurrent model as data."""

    kind: str = "lstm"
    num_layers: int = 3
    bidirectional: bool = False
    batch_first: bool = True
    bias: bool = True
    projection: int = 0
    dropout: float = 0.0
    state: str = "zeros"
    read: str = "last"
    output: bool = True

    def model(self) -> Recurrent:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Recurrent(self)

    def inputs(self, rows: int) -> Tensor:
        return torch.randn(rows, STEPS, WIDTH, generator=torch.Generator().manual_seed(rows))


class Recurrent(nn.Module):
    """(N, T, WIDTH) -> what it reads of the final states, and the output."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        options: dict[str, Any] = {"proj_size": case.projection} if case.kind == "lstm" else {}
        self.case = case
        self.rows = case.num_layers * (2 if case.bidirectional else 1)
        self.layers = KINDS[case.kind](
            WIDTH,
            HIDDEN,
            case.num_layers,
            bias=case.bias,
            batch_first=case.batch_first,
            dropout=case.dropout,
            bidirectional=case.bidirectional,
            **options,
        )
        if case.state in ("learned", "computed"):
            self.learned = nn.Parameter(torch.randn(self.rows, 1, HIDDEN))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows, make = x.shape[0], STATES[self.case.state]
        hx: Any = make(self, x, rows, self.case.projection or HIDDEN)
        if hx is not None and self.case.kind == "lstm":
            hx = (hx, make(self, x, rows, HIDDEN))
        y, states = self.layers(x if self.case.batch_first else x.transpose(0, 1), hx)
        read = [READS[self.case.read](h) for h in (states if isinstance(states, tuple) else (states,))]
        return (*read, y) if self.case.output else tuple(read)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(sorted(KINDS)))
    return Case(
        kind=kind,
        num_layers=draw(st.integers(3, 5)),
        bidirectional=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bias=draw(st.booleans()),
        projection=draw(st.sampled_from([0, 2])) if kind == "lstm" else 0,
        dropout=draw(st.sampled_from([0.0, 0.5])),
        state=draw(st.sampled_from(sorted(STATES))),
        read=draw(st.sampled_from(sorted(READS))),
        output=draw(st.booleans()),
    )


def export(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The model as torch.export sees it, in the mode that it is in."""
    shapes = tuple({0: Dim.AUTO} for _ in inputs)
    forward = inspect.signature(model.forward)
    with shape_only():
        program = torch.export.export(
            model, inputs, dynamic_shapes=dict(zip(forward.parameters, shapes, strict=False)), strict=False
        )
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def split(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    module = export(model, *inputs)
    split_layers(module)
    return module


def recurrent_nodes(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target in OPERATORS]


def run(model: nn.Module, module: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and gradients, from the same random state. Layers that nothing reads get none, or zeros when fused."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    outputs = list(module(x))
    trained = [y for y in outputs if y.requires_grad]
    if trained:
        torch.autograd.backward(trained, [torch.ones_like(y) for y in trained])
    return outputs + [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters()]


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(cases(), st.booleans())
def test_layers_one_by_one_are_the_fused_layers(case: Case, training: bool) -> None:
    """Outputs, gradients, and the masks that dropout draws, to the last bit, at any batch size, in both modes; no node
    of several layers is left, so that splitting again changes nothing."""
    model = case.model().train(training)
    module = split(model, case.inputs(3))
    assert [node.args[4] for node in recurrent_nodes(module)] == [1] * case.num_layers
    for rows in (1, 2, 6):
        x = case.inputs(rows)
        for found, expected in zip(run(model, module, x), run(model, model, x), strict=True):
            assert torch.equal(found, expected)
    before = [node.format_node() for node in module.graph.nodes]
    split_layers(module)
    assert [node.format_node() for node in module.graph.nodes] == before


@settings(max_examples=settings.default.max_examples // 2)
@given(cases(), st.integers(1, 6))
def test_fake_values_tell_the_shapes(case: Case, rows: int) -> None:
    """Every node's `meta["val"]` has the shape and type of what really comes out, with one symbol for the batch; and
    it knows its place in the user's code."""
    model = case.model()
    module = split(model, case.inputs(3))
    (x,) = module.graph.find_nodes(op="placeholder")
    symbol = x.meta["val"].shape[0].node.expr
    found = _Recorder(module)
    found.run(case.inputs(rows))
    for node, value in found.values.items():
        if node.meta.get("val") is None:
            continue  # what only asserts
        said, real = pytree.tree_leaves(node.meta["val"]), pytree.tree_leaves(value)
        for a, b in zip(said, real, strict=True):
            if not isinstance(a, Tensor):
                assert int(a.node.expr.subs({symbol: rows}) if isinstance(a, torch.SymInt) else a) == b
                continue
            sizes = [int(s.node.expr.subs({symbol: rows})) if isinstance(s, torch.SymInt) else s for s in a.shape]
            assert (sizes, a.dtype) == (list(b.shape), b.dtype), node.format_node()
        if "layer" in node.name:
            assert [name for name, _ in node.meta["nn_module_stack"].values()] == ["", "layers"]
            assert node.meta["stack_trace"]


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function":
            self.values[n] = value
        return value


# --- what crosses a cut between two layers ----------------------------------------------------------------------------


def crossing(case: Case) -> list[int]:
    """For each border between two layers, how many tensors that carry a gradient cross it, at best."""
    graph = analyse(case.model(), (case.inputs(3),))[0]
    ends = [i for i, node in enumerate(graph.operations) if node.target in OPERATORS]
    last = {
        node: max((graph.operations.index(u) for u in node.users if u.op != "output"), default=-1)
        for node in graph.operations
    }
    returned = {leaf for leaf in graph.outputs if isinstance(leaf, fx.Node)}
    counts = []
    for start, stop in itertools.pairwise(ends):
        counts.append(
            min(
                sum(
                    graph.measures[node.name].carries_gradient(place) and (last[node] > place or node in returned)
                    for node in graph.operations[: place + 1]
                )
                for place in range(start + 1, stop)
            )
        )
    return counts


@pytest.mark.parametrize(
    ("kind", "state"),
    [("lstm", "zeros"), ("lstm", "made"), ("gru", "detached"), ("rnn", "new"), ("lstm", "like"), ("relu", "expanded")],
)
def test_one_tensor_crosses_where_states_start_at_zero_and_the_last_is_read(kind: str, state: str) -> None:
    assert crossing(Case(kind, 4, state=state, bidirectional=True, read="directions", output=False)) == [1, 1, 1]


@pytest.mark.parametrize(
    ("read", "expected"),
    [("first", [2, 2, 2]), ("ends", [2, 2, 2]), ("inner", [1, 2, 2]), ("everything", [2, 2, 2]), ("nothing", [1] * 3)],
)
def test_the_states_of_many_layers_cross_as_one(read: str, expected: list[int]) -> None:
    """Joined layer by layer, the final states never are more than one tensor beside the sequence; and none before the
    first layer that is read."""
    assert crossing(Case("gru", 4, read=read)) == expected


def test_zeros_that_something_writes_into_are_no_zeros() -> None:
    """A state that is made of zeros, and then written into through a view, must reach every layer as it is then."""
    for state, made in (("written", 0), ("filled", 0), ("zeros", 3), ("expanded", 3)):
        module = split(Case("gru", state=state).model(), Case().inputs(3))
        names = [str(node.args[1].target) for node in recurrent_nodes(module)]  # type: ignore[union-attr]
        assert names.count("aten.new_zeros.default") == made, state


def test_what_made_the_zeros_is_gone() -> None:
    """Their sizes, copies and casts would be computed for nothing, and the number of rows would cross every cut."""
    for state in ("zeros", "made", "detached", "new", "expanded"):
        graph = split(Case(state=state).model(), Case().inputs(3)).graph
        unread = [node.name for node in graph.nodes if node.op == "call_function" and not node.users]
        assert not unread, state


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(("num_layers", "bidirectional"), [(3, True), (4, False)])
def test_every_way_to_read_the_states(read: str, num_layers: int, bidirectional: bool) -> None:
    """Steps over rows, rows of some layers only, writes: what is left out must not move what is read."""
    case = Case("gru", num_layers, bidirectional, read=read)
    model, x = case.model(), case.inputs(6)
    module = split(model, case.inputs(3))
    for found, expected in zip(run(model, module, x), run(model, model, x), strict=True):
        assert torch.equal(found, expected)


# --- examples ---------------------------------------------------------------------------------------------------------


class Written(nn.Module):
    """nn.GRU with dropout, layer by layer, by hand."""

    def __init__(self, fused: nn.GRU) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for index in range(fused.num_layers):
            layer = nn.GRU(fused.input_size if index == 0 else fused.hidden_size, fused.hidden_size)
            for name, value in layer.named_parameters():
                value.data.copy_(getattr(fused, name.replace("l0", f"l{index}")))
            self.layers.append(layer)
        self.p = fused.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        for index, layer in enumerate(self.layers):
            x = layer(nn.functional.dropout(x, self.p, self.training) if index else x)[0]
        return x.transpose(0, 1)


def test_dropout_lies_between_the_layers() -> None:
    """Behind every layer but the last, as in a module written by hand."""
    model = nn.GRU(WIDTH, HIDDEN, 3, dropout=0.5, batch_first=True)
    module, written = split(model, torch.randn(3, STEPS, WIDTH)), Written(model)
    x = torch.randn(6, STEPS, WIDTH)
    torch.manual_seed(3)
    found = module(x)[0]
    torch.manual_seed(3)
    assert torch.equal(found, written(x))


def test_names_can_be_read() -> None:
    model = Case("lstm", 2, dropout=0.1, read="everything").model()
    for training in (True, False):
        module = split(model.train(training), Case().inputs(3))
        names = [node.name for node in module.graph.nodes if "layer" in node.name and node.op == "call_function"]
        first = ["batch", "h0", "c0", "", "output", "h", "c"]
        second = ["swapped", "dropout", "input", *first, "h_joined", "c_joined"]
        wanted = [f"lstm_layer0_{n}".rstrip("_") for n in first] + [f"lstm_layer1_{n}".rstrip("_") for n in second]
        assert sorted(names) == sorted(wanted)


class Translator(nn.Module):
    """The decoder begins in the encoder's final states; its own single layer stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True)
        self.decoder = nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True)
        self.smooth = nn.GRU(HIDDEN, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, states = self.encoder(x)
        y, (h, _) = self.decoder(x.flip(1), states)
        return self.smooth(y)[0], h


def test_states_go_from_one_recurrent_network_to_the_next() -> None:
    model = Translator()
    module = split(model, torch.randn(3, STEPS, WIDTH))
    assert [str(node.target) for node in recurrent_nodes(module)] == ["aten.lstm.input"] * 4 + ["aten.gru.input"]
    x = torch.randn(5, STEPS, WIDTH)
    for found, expected in zip(run(model, module, x), run(model, model, x), strict=True):
        assert torch.equal(found, expected)


class Given(nn.Module):
    """Initial states are inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(WIDTH, HIDDEN, 3, batch_first=True)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.layers(x, (h.transpose(0, 1), c.transpose(0, 1)))


def test_states_that_are_inputs_are_taken_layer_by_layer() -> None:
    model = Given()
    x, h, c = torch.randn(3, STEPS, WIDTH), torch.randn(3, 3, HIDDEN), torch.randn(3, 3, HIDDEN)
    module = split(model, x, h, c)
    for found, expected in zip(pytree.tree_leaves(module(x, h, c)), pytree.tree_leaves(model(x, h, c)), strict=True):
        assert torch.equal(found, expected)


# --- from the model to trained stages ---------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self, kind: str, dropout: float) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(9, 8), nn.Linear(8, 3)
        self.layers = KINDS[kind](8, 8, 4, batch_first=True, dropout=dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        _, states = self.layers(self.embedding(tokens))
        y: Tensor = self.last((states[0] if isinstance(states, tuple) else states)[-1])
        return y


def tokens(rows: int) -> Tensor:
    return torch.randint(9, (rows, 6), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(("kind", "dropout"), [("lstm", 0.0), ("gru", 0.5), ("rnn", 0.2)])
def test_four_layers_are_four_stages(kind: str, dropout: float) -> None:
    """Trap 13: a fused stack is one node, and a third of the stages did nothing. Composed, the stages are the model,
    every parameter trains, each layer in its own stage, and dropout between the layers is keyed."""
    model = Classifier(kind, dropout)
    built = build(model, tokens(4), 4)
    assert len(built.codes) == 4
    assert all(len(cut.crossing) == 1 for cut in built.plan.cuts), built.plan
    layers = [[n for n in code.body.graph.nodes if n.target in OPERATORS] for code in built.codes]
    assert [len(nodes) for nodes in layers] == [1, 1, 1, 1]
    assert not any("kernel" in warning for warning in built.plan.warnings)
    for rows in (4, 7):
        torch.manual_seed(0)
        expected = model(tokens(rows))
        torch.manual_seed(0)
        assert torch.equal(built.output(built.run(tokens(rows))[-1]), expected)
    losses, _ = built.module(tokens(4), target(4), Randomness(0))
    sum(losses).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_every_border_between_layers_is_a_legal_cut() -> None:
    _, candidates = analyse(Classifier("lstm", 0.0), (tokens(4),))
    legal = {candidate.node for candidate in candidates if candidate.cut is not None}
    assert {f"lstm_layer{index}_output" for index in range(3)} <= legal


def test_layers_whose_kernel_draws_by_itself_are_parted_after_the_comparison() -> None:
    """cuDNN draws dropout inside its kernel: parted layers draw other masks, and the capture was taken for wrong."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.LSTM(4, 6, 3, dropout=0.5, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.rnn(x)[0][:, -1])
            return y

    with (
        mock.patch.object(trace, "draws_as_fused", lambda model: False),
        mock.patch.object(exporting, "draws_as_fused", lambda model: False),
    ):
        plan = autodecouple.plan(Model(), (torch.randn(4, 5, 4),), 3, devices=["cpu"])
    assert len(plan.stages) == 3
    assert any("lstm_layer2" in name for name in plan.stages[-1].nodes)
