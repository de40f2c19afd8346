"""Self-verification: a capture that is not the model is found and named, and the check leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
import re
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from graph_strategies import Program, programs, touch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from stage_builder import build
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from autodecouple.errors import TraceError
from autodecouple.graph import Graph, operations
from autodecouple.passes import verify
from autodecouple.passes.insert import ROLE, STAGE
from autodecouple.passes.verifying.compare import gradient_errors, output_difference

SWEEP = settings(max_examples=5, suppress_health_check=list(HealthCheck))
SLOW = settings(max_examples=50, suppress_health_check=list(HealthCheck))
X = torch.linspace(-1, 1, 24).view(6, 4)


def exported(model: nn.Module, *args: Any, **kwargs: Any) -> Graph:
    """What torch.export makes of a model as it is: right or wrong."""
    modules = []
    for training in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model.train(training), args, kwargs, strict=False)
        modules.append(program.module(check_guards=False))
        for node in [n for n in modules[-1].graph.nodes if "_assert" in str(n.target)]:
            modules[-1].graph.erase_node(node)
        modules[-1].recompile()
    model.train()
    _, in_spec = pytree.tree_flatten((args, kwargs))
    return Graph(model, modules[0], modules[1], (), {}, in_spec, program.call_spec.out_spec)


def check(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    args = args or (X,)
    return verify.matches_original(exported(model, *args, **kwargs), args, kwargs)


def refusal(model: nn.Module, *args: Any) -> str:
    with pytest.raises(TraceError) as caught:
        check(model, *args)
    return str(caught.value)


def edited(model: nn.Module, edit: Callable[[fx.Graph], None], *args: Any) -> Graph:
    """A capture whose training graph was changed by hand."""
    graph = exported(model, *(args or (X,)))
    edit(graph.train.graph)
    graph.train.recompile()
    return graph


def insert_after(graph: fx.Graph, node: fx.Node, operation: Any, *more: Any) -> None:
    with graph.inserting_after(node):
        new = graph.call_function(operation, (node, *more))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def scale(graph: fx.Graph, node: fx.Node) -> None:
    insert_after(graph, node, torch.ops.aten.mul.Tensor, 1.5)


def nodes(graph: fx.Graph, part: str) -> list[fx.Node]:
    return [node for node in operations(graph) if part in str(node.target)]


class Chain(nn.Module):
    """Layers one after the other; the shared one is called three times."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.middle = nn.Sequential(*middle)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x))
        for _ in range(3):
            x = self.shared(x).tanh()
        y: Tensor = self.last(x)
        return y


# --- a right capture is accepted, and nothing is left behind ----------------------------------------------------------


def memory(model: nn.Module) -> list[Any]:
    """All that a model and the process remember and the check touches."""
    tensors = [*model.parameters(), *model.buffers()]
    return [
        *[(id(t), t.detach().clone(), t.requires_grad) for t in tensors],
        *[(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        *[(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        torch.get_rng_state(),
        str(random.getstate()),
        str(np.random.get_state()[1].tolist()),  # type: ignore[index]
    ]


def same(a: Any, b: Any) -> bool:
    x, y = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(x) == len(y) and all(
        torch.equal(u, v) if isinstance(u, Tensor) else u == v for u, v in zip(x, y, strict=True)
    )


def call(program: Program) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = program.inputs()
    return ((), inputs) if isinstance(inputs, dict) else (inputs, {})


def check_right(program: Program, has_gradients: bool) -> None:
    model = program.model()
    args, kwargs = call(program)
    graph = exported(model, *args, **kwargs)
    if has_gradients:
        touch(program.call(model)).backward()
    before, inputs = memory(model), copy.deepcopy((args, kwargs))
    assert verify.matches_original(graph, args, kwargs) == ()
    assert same(memory(model), before)
    assert same((args, kwargs), inputs)


@SWEEP
@given(programs(), st.booleans())
def test_a_right_capture_agrees_and_everything_comes_back(program: Program, has_gradients: bool) -> None:
    check_right(program, has_gradients)


@pytest.mark.slow
@SLOW
@given(programs(), st.booleans())
def test_many_right_captures_agree_and_everything_comes_back(program: Program, has_gradients: bool) -> None:
    check_right(program, has_gradients)


class Messy(nn.Module):
    """Changes all that a forward can change."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.layer, self.fails = nn.Linear(4, 3), fails
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.calls, self.seen, self.kept = 0, [1], torch.zeros(2)
        self.last: Any = None
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.calls += 1
        self.seen.append(self.calls)
        self.kept.add_(1)
        self.last = x
        self.layer.eval()
        self.layer.weight.requires_grad_(False)
        torch.rand(1, generator=self.generator), random.random(), np.random.rand()
        with torch.no_grad():
            self.layer.bias += 1
        x.mul_(2)
        if self.fails:
            raise ValueError("as asked")
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_that_changes_everything_changes_nothing(fails: bool) -> None:
    """The check runs the model a few times; the user must not notice, not even when the model raises."""
    graph = exported(Chain(), X)
    model = Messy(fails)
    model.layer.bias.grad = torch.ones(3)
    before, buffers, attributes = memory(model), dict(model._buffers), dict(vars(model))
    state, x = model.generator.get_state(), X.clone()
    with pytest.raises(ValueError if fails else TraceError) as caught:
        verify.matches_original(dataclasses.replace(graph, model=model), (x,), {})
    if fails:
        assert caught.value.__notes__ == ["raised by Messy itself, run as it is on the example inputs"]
    assert same(memory(model), before)
    assert all(model._buffers[name] is buffer for name, buffer in buffers.items())
    assert vars(model).keys() == attributes.keys()
    assert (model.calls, model.seen, model.last) == (0, [1], None)
    assert torch.equal(model.kept, torch.zeros(2))
    assert torch.equal(state, model.generator.get_state())
    assert torch.equal(x, X)


def test_an_optimizer_in_backward_does_not_step() -> None:
    """Hooks on finished gradients update parameters while backward runs: the check trained the model by two steps."""
    model = Chain()
    steps = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: steps.append(p))
    graph = exported(model, X)
    verify.matches_original(graph, (X,), {})
    assert not steps
    model(X).sum().backward()
    assert len(steps) == len(list(model.parameters())), "and the hooks are back"


def test_gradients_of_the_inputs_stay_the_users() -> None:
    x = X.clone().requires_grad_()
    x.grad = torch.ones_like(x)
    check(Chain(), x)
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_model_that_autograd_refuses_is_checked_without_gradients() -> None:
    """It writes into what its own backward needs; in stages, which copy what is written later, it may train yet."""

    class Model(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x).exp()
            y.detach().mul_(2)
            return y

    (note,) = check(Model())
    assert "backprop through the whole model is refused by autograd" in note and "inplace operation" in note


def test_an_error_in_the_models_own_backward_passes_through() -> None:
    class Model(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = Refusing.apply(super().forward(x))
            return y

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise ZeroDivisionError("refused")

    with pytest.raises(ZeroDivisionError, match="refused") as caught:
        check(Model())
    assert caught.value.__notes__ == ["raised by Model itself, run as it is on the example inputs"]


class Checkpointed(Chain):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda h: self.shared(h).relu(), self.first(x), use_reentrant=self.reentrant)
        y: Tensor = self.last(h)
        return y


def test_a_checkpoint_agrees() -> None:
    assert check(Checkpointed(reentrant=False)) == ()


def test_a_reentrant_checkpoint_is_found() -> None:
    """torch.export inlines it with the no_grad inside: all in front of the last layer stopped training. It refuses
    torch.autograd.grad, too, so the check runs a whole backward."""
    message = refusal(Checkpointed(reentrant=True))
    assert "off by 100%" in message
    assert "CheckpointFunction" in message
    assert "use_reentrant=False" in message


def test_a_model_without_an_evaluation_graph_or_gradients_agrees() -> None:
    graph = dataclasses.replace(exported(Chain().requires_grad_(False), X), evaluation=None)
    assert verify.matches_original(graph, (X,), {}) == ()


def test_a_training_graph_of_evaluation_mode_is_compared_in_evaluation_mode() -> None:
    graph = exported(Chain(nn.BatchNorm1d(8), nn.Dropout(0.5)), X)
    graph = dataclasses.replace(graph, train=graph.evaluation)
    assert verify.matches_original(graph, (X,), {}, training=False) == ()
    with pytest.raises(TraceError, match="in training mode"):
        verify.matches_original(graph, (X,), {})


def test_a_graph_may_call_the_users_own_modules() -> None:
    """A module that cannot be traced stands whole in the graph, with its Python and its state."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(8, 8), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return Straight.apply(self.layer(x)) * self.calls if self.training else x

    model = Chain(Odd())

    def forward(graph: fx.Graph, x: fx.Node) -> None:
        for name in ("first", "middle.0", "shared", "tanh", "shared", "tanh", "shared", "tanh", "last"):
            x = graph.call_method("tanh", (x,)) if name == "tanh" else graph.call_module(name, (x,))
        graph.output(x)

    graph = fx.Graph()
    forward(graph, graph.placeholder("x"))
    module = fx.GraphModule(model, graph)
    spec = pytree.tree_structure(((X,), {}))
    whole = Graph(model, module, module, (), {}, spec, pytree.tree_structure(X))
    assert verify.matches_original(whole, (X,), {}) == ()


# --- outputs, and the module where they go wrong ----------------------------------------------------------------------


def module_ends(graph: fx.Graph) -> list[tuple[fx.Node, str]]:
    """The last node of each call of an innermost module, where it makes a floating point tensor."""
    ends: dict[str, tuple[fx.Node, str]] = {}
    for node in operations(graph):
        for key, (path, _) in list((node.meta.get("nn_module_stack") or {}).items())[-1:]:
            ends[key] = (node, path)
    return [(n, p) for n, p in ends.values() if p and getattr(n.meta["val"], "dtype", None) == torch.float32]


def outputs(graph: Graph, module: nn.Module, program: Program) -> Any:
    graph.model.load_state_dict(program.model().state_dict())
    torch.manual_seed(0)
    return [leaf.detach() for leaf in pytree.tree_leaves(program.call(module)) if isinstance(leaf, Tensor)]


def check_module(program: Program, pick: int) -> None:
    args, kwargs = call(program)
    graph = exported(program.model(), *args, **kwargs)
    ends = module_ends(graph.train.graph)
    assume(ends)
    node, path = ends[pick % len(ends)]
    right = outputs(graph, graph.train, program)
    scale(graph.train.graph, node)
    graph.train.recompile()
    wrong = outputs(graph, graph.train, program)
    assume(not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(right, wrong, strict=True)))
    with pytest.raises(TraceError, match="in training mode") as caught:
        verify.matches_original(graph, args, kwargs)
    assert f"The first module whose output differs is {path!r}" in str(caught.value)


@SWEEP
@given(programs(min_steps=4), st.integers(0, 100))
def test_whatever_module_computes_something_else_is_named(program: Program, pick: int) -> None:
    """Any module's result times 1.5: if the outputs change at all, that module is named, not one that follows it."""
    check_module(program, pick)


@pytest.mark.slow
@SLOW
@given(programs(min_steps=4), st.integers(0, 100))
def test_whatever_module_computes_something_else_is_named_for_many(program: Program, pick: int) -> None:
    check_module(program, pick)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_call_of_a_module_is_named(number: int) -> None:
    """A module that is called several times is compared call by call."""
    graph = edited(Chain(), lambda g: scale(g, nodes(g, "linear")[1 + number]))
    with pytest.raises(TraceError, match=rf"is 'shared' \(Linear, call {number + 1} of 3\), by 0\.\d"):
        verify.matches_original(graph, (X,), {})


def test_a_module_is_not_blamed_for_what_is_written_after_it() -> None:
    """ReLU(inplace=True) writes into the output of the layer before it, which was right when it was returned."""
    model = Chain(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Identity(), nn.Linear(8, 8))
    graph = edited(model, lambda g: scale(g, nodes(g, "relu_")[0]))
    with pytest.raises(TraceError, match=r"differs is 'middle\.1' \(ReLU\)"):
        verify.matches_original(graph, (X,), {})


def test_outside_of_all_modules_none_is_named() -> None:
    graph = edited(Chain(), lambda g: scale(g, nodes(g, "tanh")[-1]))
    with pytest.raises(TraceError, match=r"differs is 'last'"):
        verify.matches_original(graph, (X,), {})
    graph = edited(Chain(), lambda g: scale(g, nodes(g, "linear")[-1]))
    for node in graph.train.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    with pytest.raises(TraceError) as caught:
        verify.matches_original(graph, (X,), {})
    assert "first module" not in str(caught.value)


def test_the_evaluation_graph_is_compared_too() -> None:
    graph = exported(Chain(nn.Dropout(0.5)), X)
    graph = dataclasses.replace(graph, evaluation=graph.train)
    with pytest.raises(TraceError, match="in evaluation mode .* differs from the model"):
        verify.matches_original(graph, (X,), {})


def test_a_graph_that_fails_where_the_model_does_not_is_refused() -> None:
    def fail(graph: fx.Graph) -> None:
        insert_after(graph, nodes(graph, "tanh")[0], torch.ops.aten.view.default, [5, 5])

    with pytest.raises(TraceError, match="in training mode the captured graph fails .* RuntimeError: shape"):
        verify.matches_original(edited(Chain(), fail), (X,), {})


Pair = namedtuple("Pair", "a b")
ALIKE: list[Any] = [
    None,
    3,
    float("nan"),
    "text",
    X,
    torch.tensor([float("nan"), float("inf")]),
    torch.tensor([1 + 2j]),
    torch.tensor([True, False]),
    (X, None, {"a": [X, 2]}),
    Pair(X, None),
    OrderedDict(a=X),
]
UNLIKE: list[tuple[Any, Any, str]] = [
    (X, X + 1e-3, "not close"),
    (X, X.double(), "dtype"),
    (X, X[:, :2], "shape"),
    (X, None, "None instead of a tensor"),
    (None, X, "instead of None"),
    ((X, 2), (X, 3), r"output \[1\]: 3 instead of 2"),
    ((X, 2), (X, 2.0), "2.0 instead of 2"),
    ((X, None), (X,), r"it returns tuple of 1.*, the model tuple of 2"),
    (Pair(X, X), (X, X), "tuple of 2, the model Pair"),
    ({"a": X}, OrderedDict(a=X), "OrderedDict of 1 with a.*the model dict"),
    ({"a": X}, {"b": X}, "with b.*with a"),
    ([X, (X, X)], [X, [X, X]], "in it list, the model list of 2.*in it tuple"),
    (torch.tensor([1 + 2j]), torch.tensor([1 + 3j]), "not close"),
    (torch.tensor([1, 2]), torch.tensor([1, 3]), "not equal"),
    (torch.tensor([float("nan"), 0.0]), torch.tensor([0.0, float("nan")]), "not close"),
]


@pytest.mark.parametrize("value", ALIKE, ids=repr)
def test_an_output_is_like_itself(value: Any) -> None:
    assert output_difference(value, copy.deepcopy(value)) is None


@pytest.mark.parametrize(("expected", "found", "words"), UNLIKE, ids=[words for *_, words in UNLIKE])
def test_outputs_that_differ_are_told_apart(expected: Any, found: Any, words: str) -> None:
    assert re.search(words, output_difference(expected, found) or ""), output_difference(expected, found)


# --- gradients --------------------------------------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    """Rounds, and lets the gradient straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Reversed(torch.autograd.Function):
    """Domain adaptation: the identity, with the gradient's sign turned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class Doubled(torch.autograd.Function):
    """Its backward is that of what its forward computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


class Apply(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x)
        return y


@pytest.mark.parametrize("function", [Straight, Reversed])
def test_a_lost_backward_is_found(function: Any) -> None:
    """torch.export inlines the forward of an autograd.Function and drops its backward: equal outputs, other training.
    The parameter named is the last in front of the function."""
    message = refusal(Chain(Apply(function.apply)))
    assert "the gradient of 'first." in message
    assert "(in 'first', Linear)" in message
    assert f"runs Python ({function.__name__})" in message
    assert "detach()" in message


def test_a_function_with_the_true_backward_agrees() -> None:
    assert check(Chain(Apply(Doubled.apply))) == ()


def test_the_way_out_that_the_error_names_works() -> None:
    assert check(Chain(Apply(lambda x: x + (x.round() - x).detach()))) == ()


def test_a_backward_hook_of_a_module_is_found() -> None:
    model = Chain(nn.Tanh())
    model.middle[0].register_full_backward_hook(lambda module, inputs, outputs: tuple(-g for g in inputs))
    assert "the gradient of 'first." in refusal(model)


def test_a_backward_hook_of_a_tensor_is_found() -> None:
    def hooked(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 3)
        return x

    assert "the gradient of 'first." in refusal(Chain(Apply(hooked)))


def test_a_hook_on_a_parameter_is_kept() -> None:
    """It lives on the user's own tensor, which the graph uses as well."""
    model = Chain()
    model.first.weight.register_hook(lambda gradient: gradient * 3)
    assert check(model) == ()


def test_complex_outputs_have_gradients() -> None:
    class Model(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(super().forward(x))

    assert check(Model()) == ()
    graph = edited(Model(), lambda g: insert_after(g, nodes(g, "tanh")[-1], torch.ops.aten.detach.default))
    with pytest.raises(TraceError, match=r"the gradient of 'shared\.\w+'.*off by 100% of its norm, as are those of 3"):
        verify.matches_original(graph, (X,), {})


def check_detach(program: Program, pick: int) -> None:
    args, kwargs = call(program)
    graph = exported(program.model(), *args, **kwargs)
    floating = [n for n in operations(graph.train.graph) if getattr(n.meta["val"], "dtype", None) == torch.float32]
    assume(floating)
    right = gradients(graph.train, program, graph)
    insert_after(graph.train.graph, floating[pick % len(floating)], torch.ops.aten.detach.default)
    graph.train.recompile()
    try:
        wrong = gradients(graph.train, program, graph)
    except RuntimeError:
        assume(False)
    largest = max(g.abs().max() for g in right.values())
    changed = [n for n, g in right.items() if float((g - wrong[n]).norm()) > 0.1 * float(g.norm()) + 0.01 * largest]
    assume(changed)
    with pytest.raises(TraceError, match="in training mode .* the gradient of"):
        verify.matches_original(graph, args, kwargs)


@SWEEP
@given(programs(min_steps=4), st.integers(0, 100))
def test_a_gradient_that_stops_anywhere_is_found(program: Program, pick: int) -> None:
    """A detach changes no output. Where plain autograd says that it changes a gradient, it is found."""
    check_detach(program, pick)


@pytest.mark.slow
@SLOW
@given(programs(min_steps=4), st.integers(0, 100))
def test_a_gradient_that_stops_anywhere_is_found_for_many(program: Program, pick: int) -> None:
    check_detach(program, pick)


def gradients(module: nn.Module, program: Program, graph: Graph) -> dict[str, Tensor]:
    graph.model.load_state_dict(program.model().state_dict())
    graph.model.zero_grad()
    torch.manual_seed(0)
    loss = touch(program.call(module))
    if loss.requires_grad:
        loss.backward()
    found = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in graph.model.named_parameters()}
    graph.model.zero_grad()
    return found


G = torch.linspace(-1, 1, 1000)
NOISE = torch.randn(1000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        (G, False),
        (G + 1e-4 * NOISE, False),  # another order of additions, through many layers
        (G + 1e-2 * NOISE, True),
        (-G, True),
        (G * 1.01, True),
        (torch.cat([G[:999], -G[999:]]), True),  # one element of a thousand
        (None, True),
        (torch.full_like(G, float("nan")), True),
        (torch.cat([G[:999], torch.tensor([float("inf")])]), True),
    ],
)
def test_gradients_agree_in_norm(found: Tensor | None, wrong: bool) -> None:
    assert bool(gradient_errors({"p": G}, {"p": found})) == wrong
    assert bool(gradient_errors({"p": found}, {"p": G})) == wrong


def test_noise_where_the_gradient_is_zero_in_theory_is_no_difference() -> None:
    """The bias before a BatchNorm: its gradient is what rounding leaves, another thing each time."""
    expected = {"weight": G, "bias": 1e-7 * NOISE}
    assert not gradient_errors(expected, {"weight": G, "bias": -1e-7 * NOISE})
    assert not gradient_errors(expected, {"weight": G, "bias": None})
    assert gradient_errors(expected, {"weight": G, "bias": 1e-3 * NOISE}).keys() == {"bias"}


def test_small_gradients_are_compared_at_their_own_size() -> None:
    """The first layers of a deep net without normalisation: ten thousand times smaller, and as important."""
    assert gradient_errors({"first": G / 10000, "last": G}, {"first": -G / 10000, "last": G}).keys() == {"first"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_other_dtypes_lose_half_of_their_digits(dtype: torch.dtype) -> None:
    g = G.to(dtype)
    tolerance = torch.finfo(dtype).eps ** 0.5
    assert not gradient_errors({"p": g}, {"p": (g * (1 + tolerance)).to(dtype)})
    assert gradient_errors({"p": g}, {"p": -g})


def test_gradients_that_are_nan_in_both_hide_nothing() -> None:
    dead = torch.cat([G, torch.tensor([float("nan")])])
    assert not gradient_errors({"p": dead, "q": G}, {"p": dead.clone(), "q": G})
    assert gradient_errors({"p": dead, "q": G}, {"p": -dead, "q": G}).keys() == {"p"}
    assert gradient_errors({"p": dead, "q": G}, {"p": dead, "q": -G}).keys() == {"q"}


def test_sparse_gradients_are_compared() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.embedding(x).sum(1)

    tokens = torch.tensor([[1, 2], [2, 3]])
    assert check(Model(), tokens) == ()
    graph = edited(Model(), lambda g: insert_after(g, nodes(g, "sum")[0], torch.ops.aten.detach.default), tokens)
    with pytest.raises(TraceError, match=r"the gradient of 'embedding\.weight'"):
        verify.matches_original(graph, (tokens,), {})


# --- state ------------------------------------------------------------------------------------------------------------


class Counts(nn.Module):
    """Counts its calls in Python; `use` makes of the count what its output depends on."""

    def __init__(self, use: Callable[[int], float]) -> None:
        super().__init__()
        self.layer, self.use, self.calls = nn.Linear(4, 3), use, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.layer(x) * self.use(self.calls)
        return y


@pytest.mark.parametrize("late", [1, 2, 3])
def test_a_python_counter_that_shows_later_is_found(late: int) -> None:
    """A warm-up that counts calls: the first batch is right, and the graph would repeat it for ever."""
    message = refusal(Counts(lambda calls: 1.0 if calls <= late else 2.0))
    assert f"at batch {late + 1}, not before" in message
    assert "The forward changes calls" in message
    assert "register_buffer" in message


def test_a_python_counter_that_does_not_matter_is_said() -> None:
    (note,) = check(nn.Sequential(nn.Linear(4, 4), Counts(lambda calls: 1.0)))
    assert "the forward of Sequential changes 1.calls, and the stages do not" in note


@pytest.mark.parametrize(
    ("draw", "source"),
    [
        (random.random, "Python's random"),
        (np.random.rand, "numpy.random"),
    ],
)
def test_random_numbers_of_other_libraries_are_found(draw: Callable[[], float], source: str) -> None:
    """Layer drop by random.random(): the graph would drop the same layers for ever, or none."""
    assert f"The forward changes {source}" in refusal(Chain(Apply(lambda x: x * (1 + float(draw())))))


def test_random_numbers_that_decide_nothing_are_said() -> None:
    """`random.random() < self.layerdrop` with a layerdrop of 0."""
    (note,) = check(Chain(Apply(lambda x: x if random.random() >= 0 else x * 2)))
    assert "Python's random" in note


def test_a_model_that_differs_from_itself_is_not_blamed_on_the_capture() -> None:
    """A clock, a generator of its own: the same inputs and random state give another output each time."""
    ticks = itertools.count(1)
    message = refusal(Chain(Apply(lambda x: x * next(ticks))))
    assert "The model differs from itself when it is run twice" in message


def test_a_graph_that_differs_from_itself_like_its_model_is_said() -> None:
    """Operations that are not deterministic, in both: nothing is known to be wrong, and nothing can be checked."""
    ticks = itertools.count(1)

    def ticking(x: Tensor) -> Tensor:
        return x * next(ticks)

    graph = edited(Chain(Apply(ticking)), lambda g: insert_after(g, nodes(g, "linear")[0], ticking))
    graph = dataclasses.replace(graph, evaluation=None)
    (note,) = verify.matches_original(graph, (X,), {})
    assert "could not be checked" in note


class Statistics(nn.Module):
    """Buffers of all kinds: written in place, put anew, by BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        y: Tensor = self.norm(x)
        return y


def test_buffers_of_all_kinds_agree() -> None:
    assert check(Statistics()) == ()


@pytest.mark.parametrize(
    ("part", "name"), [("add_.Tensor", "count"), ("copy_", "mean"), ("batch_norm", "norm.running_mean")]
)
def test_a_buffer_that_only_the_model_updates_is_named(part: str, name: str) -> None:
    def forget(graph: fx.Graph) -> None:
        for node in nodes(graph, part):
            if part == "batch_norm":
                node.update_arg(3, None), node.update_arg(4, None)
            elif node.args[0].target == name:  # type: ignore[union-attr]
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)

    graph = edited(Statistics(), forget)
    with pytest.raises(TraceError, match=f"in training mode .* buffer '{name}' after the forward"):
        verify.matches_original(graph, (X,), {})


# --- after the other passes -------------------------------------------------------------------------------------------

DEEP = [layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.ReLU())]


@SWEEP
@given(programs(), st.integers(2, 4))
def test_what_the_passes_make_holds(program: Program, n_stages: int) -> None:
    built = build(program.model(), program.inputs(), n_stages)
    verify.plan_fits(built.graph, built.plan)
    verify.heads_fit(built.module, built.graph, built.plan)
    verify.stages_fit(built.codes, built.plan)


def deep() -> Any:
    return build(nn.Sequential(*copy.deepcopy(DEEP), nn.Linear(8, 3)), torch.randn(4, 8), 3)


@pytest.mark.parametrize("how", ["left out", "twice", "another order", "a parameter on both sides"])
def test_a_plan_that_is_not_the_graph_is_refused(how: str) -> None:
    built = deep()
    stages = list(built.plan.stages)
    first, second = stages[0].nodes, stages[1].nodes
    if how == "left out":
        stages[0] = dataclasses.replace(stages[0], nodes=first[:-1])
    elif how == "twice":
        stages[1] = dataclasses.replace(stages[1], nodes=(first[-1], *second))
    elif how == "another order":
        stages[1] = dataclasses.replace(stages[1], nodes=(*second[1:], second[0]))
    else:
        weight = next(n for n in built.graph.train.graph.find_nodes(op="get_attr") if n.target == "0.weight")
        user = next(n for n in built.graph.operations if n.name in second and len(n.all_input_nodes) == 3)
        user.replace_input_with(user.all_input_nodes[1], weight)
    graph = dataclasses.replace(built.graph)  # a graph keeps what it has worked out
    with pytest.raises(AssertionError):
        verify.plan_fits(graph, dataclasses.replace(built.plan, stages=tuple(stages)))


def test_a_cut_that_does_not_detach_is_refused() -> None:
    built = deep()
    (cut,) = [n for n in built.module.graph.nodes if n.target is torch.ops.aten.detach.default][:1]
    cut.target = torch.ops.aten.alias.default
    with pytest.raises(AssertionError, match="carries a gradient across the cut"):
        verify.heads_fit(built.module, built.graph, built.plan)


def test_a_value_that_goes_round_the_detach_is_refused() -> None:
    built = deep()
    (cut,) = [n for n in built.module.graph.nodes if n.target is torch.ops.aten.detach.default][:1]
    (source,) = cut.all_input_nodes
    user = next(n for n in cut.users if n.meta[STAGE] == 1)
    user.replace_input_with(cut, source)
    with pytest.raises(AssertionError, match=f"'{source.name}' carries a gradient across the cut"):
        verify.heads_fit(built.module, built.graph, built.plan)


def test_an_edge_to_an_earlier_stage_is_refused() -> None:
    built = deep()
    node = next(n for n in operations(built.module.graph) if n.meta[STAGE] == 1 and ROLE not in n.meta)
    node.meta[STAGE] = 2
    with pytest.raises(AssertionError, match="in stage 1 reads"):
        verify.heads_fit(built.module, built.graph, built.plan)
