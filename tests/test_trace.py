"""Capture: the graphs are the model, and what cannot be a graph is refused with the place and the ways out."""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from graph_strategies import Program, leaves, programs
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autodecouple.errors import InputError, TraceError
from autodecouple.graph import Graph, attribute
from autodecouple.passes.capturing.bind import as_call, bind
from autodecouple.passes.measure import annotate
from autodecouple.passes.trace import capture
from autodecouple.plans import Plan, StageSpec

SWEEP = settings(max_examples=8, suppress_health_check=list(HealthCheck))
SLOW = settings(max_examples=100, suppress_health_check=list(HealthCheck))


def run(graph: Graph, inputs: Any, *, training: bool) -> Any:
    """The captured graph on a batch, its flat result put back as the out-spec says."""
    module = graph.train if training else graph.evaluation
    assert module is not None
    args, kwargs = as_call(inputs)
    return module(*args, **kwargs)


def equal(a: Any, b: Any) -> bool:
    x, y = pytree.tree_flatten(a), pytree.tree_flatten(b)
    same = [torch.equal(u, v) if isinstance(u, Tensor) else u == v for u, v in zip(x[0], y[0], strict=True)]
    return x[1] == y[1] and all(same)


def state(model: nn.Module) -> list[Any]:
    """All that a model remembers: parameters, buffers, gradients, flags."""
    tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    return [
        *tensors,
        *[p.grad is None for p in model.parameters()],
        *[p.requires_grad for p in model.parameters()],
        *[m.training for m in model.modules()],
    ]


def check_capture(program: Program) -> None:
    model = program.model()
    before, random = state(model), torch.get_rng_state()
    graph = capture(model, program.inputs())
    assert equal(before, state(model)), "capture changed the model"
    assert torch.equal(random, torch.get_rng_state()), "capture drew from the caller's generator"
    # the user's own objects, under their own names
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for module in (graph.train, graph.evaluation):
        assert module is not None
        for node in module.graph.find_nodes(op="get_attr"):
            if isinstance(value := attribute(module, node), Tensor) and str(node.target) in own:
                assert value is own[str(node.target)]
    for training in (True, False):
        for rows in (4, 1, 3, 7):
            fresh = program.model().train(training)
            model.load_state_dict(fresh.state_dict())
            if training and rows == 1 and "batch_norm" in program.kinds:
                continue  # refused by BatchNorm itself
            torch.manual_seed(7)
            expected = program.call(fresh, rows)
            torch.manual_seed(7)
            found = run(graph, program.inputs(rows), training=training)
            assert equal(expected, found), f"training={training}, {rows} rows"
            assert equal(list(fresh.buffers()), list(model.buffers())), "buffers after a forward"


@SWEEP
@given(programs())
def test_the_graphs_compute_what_the_model_computes(program: Program) -> None:
    """Train and evaluation graphs are bitwise the original at the example batch and at others, buffers included."""
    check_capture(program)


@pytest.mark.slow
@SLOW
@given(programs())
def test_the_graphs_compute_what_the_model_computes_for_many(program: Program) -> None:
    check_capture(program)


def mlp(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), *extra, nn.Linear(8, 3))


def test_frozen_submodules_stay_frozen() -> None:
    """Trap: a BatchNorm that the user put into .eval() before fine-tuning must not learn new statistics."""
    model = mlp(nn.BatchNorm1d(8), nn.Dropout(0.5))
    model[1].eval()
    graph = capture(model, torch.randn(6, 4))
    x = torch.randn(5, 4)
    torch.manual_seed(0)
    expected = model(x)
    mean = model[1].running_mean.clone()
    torch.manual_seed(0)
    assert torch.equal(run(graph, x, training=True), expected)
    assert torch.equal(model[1].running_mean, mean)
    assert [m.training for m in model] == [True, False, True, True]


def test_a_model_in_evaluation_mode_is_captured_in_training_mode() -> None:
    """A model that happens to be in .eval() when it is compiled is trained nonetheless, and keeps its flag."""
    model = mlp(nn.Dropout(0.5)).eval()
    graph = capture(model, torch.randn(6, 4))
    assert not any(module.training for module in model.modules())
    x = torch.randn(5, 4)
    torch.manual_seed(0)
    trained = run(graph, x, training=True)
    assert not torch.equal(trained, model(x))
    torch.manual_seed(0)
    assert torch.equal(trained, model.train()(x))


class Point(NamedTuple):
    logits: Tensor
    extra: Tensor


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


torch.export.register_dataclass(Answer, serialized_type_name="test_trace.Answer")


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As in transformers: a dict with attributes, registered with pytree under its own type."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


pytree.register_pytree_node(
    ModelOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: ModelOutput(zip(keys, values, strict=True)),
    serialized_type_name="test_trace.ModelOutput",
    flatten_with_keys_fn=lambda o: ([(pytree.MappingKey(k), v) for k, v in o.items()], list(o)),
)


class Wrapped(nn.Module):
    """Returns what `form` makes of the logits and the features."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        h = self.first(x).relu()
        return self.form(self.last(h), h)


FORMS = {
    "tuple": lambda y, h: (y, h),
    "list": lambda y, h: [y, [h]],
    "nested": lambda y, h: {"out": (y, {"deep": [h, y + 1]}), "none": None, "number": 3},
    "named tuple": Point,
    "dataclass": Answer,
    "dataclass with None": lambda y, h: Answer(y),
    "model output": lambda y, h: ModelOutput(logits=y, hidden=h),
    "same twice": lambda y, h: (y, y),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_outputs_come_back_as_their_own_type(form: Any) -> None:
    """Trap 7: ModelOutput comes back as itself, not as a tuple of leaves."""
    model, x = Wrapped(form), torch.randn(5, 4)
    graph = capture(model, torch.randn(6, 4))
    expected, found = model(x), run(graph, x, training=True)
    assert type(found) is type(expected)
    assert equal(expected, found)
    placed = pytree.tree_unflatten([*range(graph.out_spec.num_leaves)], graph.out_spec)
    assert type(placed) is type(expected), "the out-spec alone rebuilds the type"
    assert len(graph.outputs) == graph.out_spec.num_leaves


class Named(nn.Module):
    """Keyword inputs with defaults, one of them no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, bias: Tensor | None = None, power: int = 1, **more: Tensor) -> Tensor:
        y: Tensor = self.layer(x) ** power
        for value in more.values():
            y = y * value
        return y if bias is None else y + bias


def test_inputs_by_name_come_in_any_order() -> None:
    """A dict has no order: a loader that builds its batch the other way round is not refused, nor mixed up."""
    model = Named()
    x, bias = torch.randn(5, 4), torch.randn(5, 3)
    graph = capture(model, {"x": torch.randn(6, 4), "bias": torch.randn(6, 3)})
    for inputs in ({"x": x, "bias": bias}, {"bias": bias, "x": x}):
        first, second = bind(graph, inputs)
        assert first is x
        assert second is bias
        assert torch.equal(run(graph, inputs, training=True), model(x, bias))


@pytest.mark.parametrize("order", [("x", "bias"), ("bias", "x")])
def test_example_inputs_by_name_come_in_any_order(order: tuple[str, str]) -> None:
    """Batch dimensions belong to the input of that name, wherever it stands in the dict and in the signature."""
    shapes = {"x": (6, 4), "bias": (6, 3)}
    graph = annotate(capture(Named(), {name: torch.randn(shapes[name]) for name in order}))
    assert {spec.name: (spec.shape, spec.batch_dim) for spec in graph.inputs} == {k: (v, 0) for k, v in shapes.items()}
    model, x, bias = graph.model, torch.randn(5, 4), torch.randn(5, 3)
    values = dict(zip(order, bind(graph, {"x": x, "bias": bias}), strict=True))
    assert torch.equal(values["x"], x)
    assert torch.equal(values["bias"], bias)
    assert torch.equal(run(graph, {name: values[name] for name in order}, training=True), model(x, bias))


def test_inputs_caught_by_double_star() -> None:
    model = Named()
    graph = capture(model, {"x": torch.randn(6, 4), "gain": torch.randn(6, 3), "other": torch.randn(6, 1)})
    inputs = {"x": torch.randn(2, 4), "gain": torch.randn(2, 3), "other": torch.randn(2, 1)}
    assert torch.equal(run(graph, inputs, training=True), model(**inputs))
    assert "forward" not in vars(model), "nothing is left behind on the user's model"


def test_inputs_that_are_no_tensors_belong_to_the_graph() -> None:
    """None and integers are part of the capture: the same again fits, another value is refused by name."""
    graph = capture(Named(), (torch.randn(6, 4), None, 2))
    x = torch.randn(5, 4)
    assert torch.equal(run(graph, (x, None, 2), training=True), graph.model(x, None, 2))
    assert bind(graph, (x, None, 2))[1:] == [None, 2]
    with pytest.raises(InputError, match="input 'power' is 3, but the model was captured with 2"):
        bind(graph, (x, None, 3))
    with pytest.raises(InputError, match="'bias'"):
        bind(graph, (x, torch.randn(5, 3), 2))


def test_inputs_caught_by_a_star() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, first: Tensor, *rest: Tensor) -> Tensor:
            y: Tensor = self.layer(sum(rest, first))
            return y

    graph = capture(Sum(), tuple(torch.randn(6, 4) for _ in range(3)))
    inputs = tuple(torch.randn(2, 4) for _ in range(3))
    assert torch.equal(run(graph, inputs, training=True), graph.model(*inputs))
    assert [spec.batch_dim for spec in graph.inputs] == [0, 0, 0]


def test_nested_inputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, pair: dict[str, Any]) -> Tensor:
            x: Tensor = self.layer(pair["x"]) * pair["more"][0]
            return x

    graph = capture(Pair(), ({"x": torch.randn(6, 4), "more": [torch.randn(6, 3)]},))
    inputs = ({"x": torch.randn(2, 4), "more": [torch.randn(2, 3)]},)
    assert torch.equal(run(graph, inputs, training=True), graph.model(*inputs))
    assert len(bind(graph, inputs)) == 2


def test_an_example_of_one_row_does_not_fix_the_batch() -> None:
    """Export takes a dimension of 1 for a constant: the example is widened, or a capture by one row served one row."""
    model = mlp(nn.ReLU())
    graph = capture(model, torch.randn(1, 4))
    assert graph.inputs[0].batch_dim == 0
    assert not graph.warnings
    for rows in (1, 2, 9):
        x = torch.randn(rows, 4)
        bind(graph, x)
        assert torch.equal(run(graph, x, training=True), model(x))


class Broadcast(nn.Module):
    """The second input is no part of the batch: one row for all, or a vector."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(4, width)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + side
        return y


@pytest.mark.parametrize("shape", [(1, 3), (3,), (), (1,)])
def test_a_side_input_without_rows_of_its_own(shape: tuple[int, ...]) -> None:
    """One row that broadcasts over the batch is not a batch of one: widening it made shapes that do not fit."""
    model = Broadcast()
    graph = capture(model, (torch.randn(6, 4), torch.randn(shape)))
    assert [spec.batch_dim for spec in graph.inputs] == [0, None]
    assert graph.inputs[1].shape == shape
    for rows in (1, 6, 2):
        inputs = (torch.randn(rows, 4), torch.randn(shape))
        bind(graph, inputs)
        assert torch.equal(run(graph, inputs, training=True), model(*inputs))


def test_a_vector_as_long_as_the_batch_does_not_fix_it() -> None:
    """Dimensions of equal size get one symbol: four weights beside a batch of four fixed the batch to four."""
    model = Broadcast(4)
    graph = capture(model, (torch.randn(4, 4), torch.randn(4)))
    assert graph.inputs[0].batch_dim == 0
    inputs = (torch.randn(7, 4), torch.randn(4))
    bind(graph, inputs)
    assert torch.equal(run(graph, inputs, training=True), model(*inputs))


def test_meta_inputs_compute_nothing() -> None:
    """A shape is enough: 40 million rows, and a model that exists on the meta device only."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 2**20), nn.BatchNorm1d(2**20), nn.ReLU(inplace=True), nn.Linear(2**20, 3))
    graph = capture(model, torch.empty(40_000_000, 4, device="meta"))
    assert graph.evaluation is not None
    assert graph.inputs[0].shape == (40_000_000, 4)


def test_a_real_model_with_meta_inputs_is_captured_over_its_own_parameters() -> None:
    model = mlp(nn.BatchNorm1d(8))
    before = state(model)
    graph = capture(model, torch.empty(6, 4, device="meta"))
    assert equal(before, state(model))
    x = torch.randn(3, 4)
    twin = mlp(nn.BatchNorm1d(8))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(run(graph, x, training=True), twin(x))


class FixedBatch(nn.Module):
    """Uses the number of its rows, by a literal or by int(): Python makes a plain number of it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.view(6 if self.way == "literal" else int(x.shape[0]), 4))
        return y


@pytest.mark.parametrize("way", ["literal", "int"])
def test_a_fixed_batch_size_is_said_and_another_batch_refused(way: str) -> None:
    graph = capture(FixedBatch(way), torch.randn(6, 4))
    assert graph.inputs[0].batch_dim is None
    assert any("'x' is fixed to 6 rows" in note and "x.shape[0]" in note for note in graph.warnings), graph.warnings
    bind(graph, torch.randn(6, 4))
    with pytest.raises(InputError, match=r"5, 4"):
        bind(graph, torch.randn(5, 4))


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.view(len(x), -1)) / len(x)
        return y


def test_len_of_the_batch_stays_free() -> None:
    """Python wants a number of len(), and that fixed the batch of every model with `x.view(len(x), -1)`."""
    model = Counted()
    graph = capture(model, torch.randn(6, 2, 2))
    assert graph.inputs[0].batch_dim == 0 and not graph.warnings
    x = torch.randn(5, 2, 2)
    assert torch.equal(run(graph, x, training=True), model(x))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if y.sum() > 0:  # the line that the message must name
            y = y * 2
        return y


class Item(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        for _ in range(int(x.argmax().item())):  # the line that the message must name
            y = y * 2
        return y


@pytest.mark.parametrize("kind", [Branch, Item])
def test_control_flow_on_data_names_the_users_line_and_the_ways_out(kind: type[nn.Module]) -> None:
    """Trap 11: export answers with a page of graph dump; the user needs file:line, the expression and a way out."""
    source, start = inspect.getsourcelines(kind)
    offset, line = next((i, text) for i, text in enumerate(source) if "the line that" in text)
    with pytest.raises(TraceError) as caught:
        capture(kind(), torch.randn(6, 4))
    message = str(caught.value)
    assert f"{__file__}:{start + offset}" in message
    assert line.strip().split("#")[0].strip() in message
    assert "torch.where" in message
    assert kind.__name__ in message
    assert len(message) < 1500, "no dump"


class Counts(nn.Module):
    """Keeps its count in Python: the graph has the count of the capture."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.layer(x) * self.calls
        return y


def test_state_in_python_is_found() -> None:
    """Trap 5: a capture that silently keeps the count of its own call would train another model."""
    with pytest.raises(TraceError, match="(?s)differs from the model.*Python counters"):
        capture(Counts(), torch.randn(6, 4))


@pytest.mark.parametrize("wrong", [torch.randn(6, 5), torch.randn(6, 4).double()], ids=["shape", "dtype"])
def test_an_error_of_the_model_itself_is_not_blamed_on_the_capture(wrong: Tensor) -> None:
    """Where the model cannot run either, advice about control flow would mislead: its own error passes, with a note."""
    with pytest.raises(RuntimeError, match="mat1") as caught:
        capture(mlp(), wrong)
    assert caught.value.__notes__ == ["raised by Sequential itself, run as it is on the example inputs"]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_modes_are_not_baked_in(around: Any) -> None:
    """A plan made under no_grad() or autocast once gave graphs that trained nothing, or in bfloat16."""
    model = mlp(nn.BatchNorm1d(8), nn.ReLU())
    with around():
        graph = annotate(capture(model, torch.randn(6, 4)))
    x = torch.randn(3, 4)
    found = run(graph, x, training=True)
    assert found.dtype == torch.float32
    assert torch.equal(found, model(x))
    assert found.requires_grad
    assert graph.measures[graph.outputs[0].name].gradient_since is not None
    names = {str(node.target) for node in graph.operations}
    assert not [name for name in names if "set_grad" in name or "autocast" in name or "to." in name]


def test_one_capture_holds_no_grad_of_the_models_own() -> None:
    """no_grad() inside the forward is the model's own choice: it stays."""

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.a(x)
            y: Tensor = self.b(h)
            return y

    model = Teacher()
    graph = capture(model, torch.randn(6, 4))
    x = torch.randn(5, 4)
    run(graph, x, training=True).sum().backward()
    assert model.a.weight.grad is None
    assert model.b.weight.grad is not None


@pytest.fixture(scope="module")
def two_inputs() -> Graph:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.layer(x).masked_fill(mask, 0)
            return y

    return capture(Two(), (torch.randn(6, 4), torch.zeros(6, 3, dtype=torch.bool)))


MASK = torch.zeros(6, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(6, 4),), "captured with 2 positional inputs, but got 1 positional input"),
        ({"x": torch.randn(6, 4), "mask": MASK}, "captured with 2 positional inputs, but got keyword inputs x, mask"),
        ((torch.randn(6, 4).double(), MASK), r"input x \(N, 4\) float32 was captured, but got shape \(6, 4\) float64"),
        ((torch.randn(6, 4, 1), MASK), r"x \(N, 4\) float32 was captured, but got shape \(6, 4, 1\)"),
        ((torch.randn(6, 5), MASK), r"x \(N, 4\) float32 was captured, but got shape \(6, 5\)"),
        ((torch.randn(5, 4), MASK), "'mask' has 6 rows, but 'x' has 5"),
        ((torch.randn(0, 4), MASK[:0]), r"'x' has no rows: shape \(0, 4\)"),
        ((None, MASK), r"input 'x' must be a tensor x \(N, 4\) float32, but is NoneType"),
        (([[1.0] * 4] * 6, MASK), "captured with 2 positional inputs"),
    ],
    ids=["missing", "by name", "dtype", "rank", "size", "rows", "empty", "None", "list"],
)
def test_a_batch_that_does_not_fit_is_refused(two_inputs: Graph, inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bind(two_inputs, inputs)


@pytest.mark.parametrize("rows", [1, 6, 9])
def test_a_batch_that_fits_is_bound_in_order(two_inputs: Graph, rows: int) -> None:
    inputs = (torch.randn(rows, 4), torch.zeros(rows, 3, dtype=torch.bool))
    assert all(a is b for a, b in zip(bind(two_inputs, inputs), inputs, strict=True))


def test_an_example_without_tensors_is_refused() -> None:
    with pytest.raises(InputError, match="holds no tensor"):
        capture(mlp(), (3,))


def test_a_batch_as_wide_as_its_features() -> None:
    """Four rows of four: only the rows are free."""
    graph = annotate(capture(mlp(nn.ReLU()), torch.randn(4, 4)))
    spec = graph.inputs[0]
    assert (spec.batch_dim, str(spec)) == (0, "input_1 (N, 4) float32") or spec.name == "input"
    with pytest.raises(InputError):
        bind(graph, torch.randn(4, 5))
    assert leaves(run(graph, torch.randn(9, 4), training=True))[0].shape == (9, 3)


class Texts(nn.Module):
    """Tokens of any number with learned positions, and a mask of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(9, 8), nn.Parameter(torch.randn(32, 8))
        self.layers, self.last = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 3)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x).tanh()
            if mask is not None:
                x = x * mask[..., None]
        y: Tensor = self.last(x.sum(1) / tokens.shape[1])
        return y


def texts(rows: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randint(9, (rows, length)), (torch.rand(rows, length) < 0.8).float()


@pytest.mark.parametrize(("rows", "length"), [(4, 6), (5, 5), (2, 3)])
def test_the_length_of_sequences_may_be_left_free(rows: int, length: int) -> None:
    """Trap 6: also with as many rows as tokens in the example, the two are free of each other."""
    model = Texts()
    graph = capture(model, texts(rows, length), dynamic=(1,))
    assert [(spec.batch_dim, spec.free_dims) for spec in graph.inputs] == [(0, (1,))] * 2
    assert str(graph.inputs[0]) == "tokens (N, *) int64"
    assert not graph.warnings
    for other in (texts(4, 6), texts(7, 2), texts(1, 9), texts(3, 3)):
        bind(graph, other)
        for training in (True, False):
            assert torch.equal(run(graph, other, training=training), model(*other))


def test_lengths_that_the_model_ties_must_agree() -> None:
    graph = capture(Texts(), texts(4, 6), dynamic=(1,))
    with pytest.raises(InputError, match=r"'mask' has size 4 in dimension 1, but 'tokens' has 5: the model needs"):
        bind(graph, (texts(3, 5)[0], texts(3, 4)[1]))


def test_lengths_that_nothing_ties_are_free_of_each_other() -> None:
    """Two sequences as long as each other in the example, by chance."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            y: Tensor = self.layer(a).sum(1) + self.layer(b).sum(1)
            return y

    model = Both()
    graph = capture(model, (torch.randn(3, 5, 4), torch.randn(3, 5, 4)), dynamic=(1,))
    inputs = (torch.randn(2, 7, 4), torch.randn(2, 3, 4))
    bind(graph, inputs)
    assert torch.equal(run(graph, inputs, training=True), model(*inputs))


def test_a_length_that_the_model_fixes_is_said() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 3))
    graph = capture(model, torch.randn(3, 5, 4), dynamic=(1,))
    assert graph.inputs[0].free_dims == ()
    assert any("fixed to size 5 in dimension 1" in note and "ties it down" in note for note in graph.warnings)
    with pytest.raises(InputError, match="7, 4"):
        bind(graph, torch.randn(3, 7, 4))


def test_a_length_of_one_is_taken_for_a_constant_and_said() -> None:
    graph = capture(Texts(), texts(4, 1)[:1], dynamic=(1,))
    assert any("a size of 1 in the example" in note for note in graph.warnings)


@pytest.mark.parametrize("dim", [0, 2, -1])
def test_a_dimension_that_no_input_has_is_refused(dim: int) -> None:
    with pytest.raises(InputError, match=f"names dimension {dim}"):
        capture(Texts(), texts(4, 6), dynamic=(dim,))


def test_free_lengths_survive_json() -> None:
    spec = capture(Texts(), texts(4, 6)[:1], dynamic=(1,)).inputs[0]
    plan = Plan((StageSpec(0, ("a",), "criterion"),), inputs=(spec,))
    assert Plan.from_json(plan.to_json()).inputs == (spec,)


class LayerDrop(nn.Module):
    """Draws in training, in its own forward, how many of its layers run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm, self.drop, self.none = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Dropout(0.0)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or torch.rand(()) > 0.5:
                x = self.drop(self.norm(layer(x)))
        y: Tensor = self.last(x)
        return y


def test_the_evaluation_mode_may_be_trained() -> None:
    """Trap 11: what only training decides by data is captured as it evaluates, and the loss of that is said."""
    with pytest.raises(TraceError, match='mode="eval"'):
        capture(LayerDrop(), torch.randn(6, 4))
    model = LayerDrop()
    graph = capture(model, torch.randn(6, 4), mode="eval")
    assert any("1 BatchNorm1d, 1 Dropout (" in note for note in graph.warnings), graph.warnings
    assert all(module.training for module in model.modules())
    x = torch.randn(5, 4)
    found = run(graph, x, training=True)
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(found, model.eval()(x))


def test_a_mode_of_another_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be \"train\" or \"eval\", not 'test'"):
        capture(mlp(), torch.randn(6, 4), mode="test")


class Cache:
    """Of keys and values, as transformers returns it: no container that a graph could return."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


@dataclasses.dataclass
class Config:
    use_cache: bool = True


class Cached(nn.Module):
    """Returns its cache unless the configuration says no."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layer, self.config = nn.Linear(4, 3), config

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return ModelOutput(logits=y, cache=Cache(y)) if self.config.use_cache else ModelOutput(logits=y)


def test_caches_are_switched_off_for_the_capture() -> None:
    """Trap 7: use_cache=True, the default of transformers, ends every export; the configuration comes back."""
    configs = [Config(), Config(use_cache=False)]
    for config in configs:
        before = config.use_cache
        graph = capture(nn.Sequential(Cached(config)), torch.randn(6, 4))
        assert config.use_cache == before
        found = run(graph, torch.randn(5, 4), training=True)
        assert isinstance(found, ModelOutput)
        assert list(found) == ["logits"]


@pytest.mark.parametrize("kind", ["int", "loop"])
def test_a_module_that_counts_its_rows_runs_whole(kind: str) -> None:
    """A small block with a number of rows or a loop over rows once fixed the whole model to the example's batch."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if kind == "int":
                return self.layer(x.view(int(x.shape[0]), 4))  # type: ignore[no-any-return]
            y: Tensor = torch.stack([self.layer(row) for row in x])
            return y

    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4), Counting(), nn.Linear(4, 3))
    graph = capture(model, torch.randn(6, 4))
    assert graph.inputs[0].batch_dim == 0
    assert any(note.startswith("2 runs whole") and "number of rows" in note for note in graph.warnings)
    x = torch.randn(3, 4)
    assert torch.equal(run(graph, x, training=True), model(x))
