"""Capture an unmodified model as a flat fx graph, once as it trains and once as it evaluates.

`torch.export(strict=False)` is the way in: it takes 236 of 246 real models where symbolic tracing takes 85, keeps the
user's own parameter objects and in-place operations, and leaves the batch dynamic.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.utils import _pytree as pytree

from autodecouple.errors import InputError, TraceError
from autodecouple.graph import Graph, device_of, dtype_name, is_free, spec_of
from autodecouple.passes import verify
from autodecouple.passes.recurrent import shape_only
from autodecouple.plans import TensorSpec

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def capture(model: nn.Module, example_inputs: Any) -> Graph:
    """Capture `model` in train and evaluation mode, and check both against the original.

    example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs; dimension 0 is the batch.
    Tensors on the meta device do: then nothing is computed, and the check is left out.
    Raises TraceError, with the user's file:line and the ways out, where the model cannot be captured; what the model
    itself raises on the example passes through.
    """
    args, kwargs = as_call(example_inputs)
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise InputError(f"example_inputs holds no tensor: {example_inputs!r}; pass one batch, like (x,)")
    real = not any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves) and not _is_meta(model)
    with _neutral():
        leaves = _widen([_normal(leaf) for leaf in leaves])
    with _neutral(), shape_only(), _mode(model, training=True):
        train, out_spec = _export(model, leaves, in_spec)
    inputs, constants, notes = _describe(train, leaves)
    evaluation: fx.GraphModule | None = None
    try:
        with _neutral(), shape_only(), _mode(model, training=False):
            evaluation, _ = _export(model, leaves, in_spec)
    except TraceError as error:
        notes.append(f"evaluation runs the model itself, on one device: its evaluation mode was not captured ({error})")
    graph = Graph(model, train, evaluation, inputs, constants, in_spec, out_spec, warnings=tuple(notes))
    if real:
        with _neutral():
            verify.matches_original(graph, *pytree.tree_unflatten(leaves, in_spec))
    return graph


def as_call(inputs: Any) -> Inputs:
    """(args, kwargs) of a call, from a tensor, a tuple or list of positional inputs, or a dict of keyword inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def _is_meta(model: nn.Module) -> bool:
    return device_of(model).type == "meta"


def _normal(leaf: Any) -> Any:
    """A tensor that was made in inference mode cannot be trained on; its copy can."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) and leaf.is_inference() else leaf


def _widen(leaves: list[Any]) -> list[Any]:
    """Two rows where the batch has one: export would take a batch of 1 for a constant.

    One row beside a larger batch is not widened: it broadcasts.
    """
    if _num_rows(leaves) != 1:
        return leaves
    return [torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.ndim and len(x) == 1 else x for x in leaves]


def _num_rows(leaves: list[Any]) -> int | None:
    """Rows of the batch: those of the first tensor that has any."""
    return next((len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim), None)


@contextlib.contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the model into one mode for a while; parts that the user froze with .eval() stay frozen in training."""
    before = {module: module.training for module in model.modules()}
    try:
        if not training or not model.training:
            model.train(training)
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


@contextlib.contextmanager
def _neutral() -> Iterator[None]:
    """Export in a neutral state: the caller's autocast and no_grad must not be baked into the graph."""
    with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        for kind in {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _export(model: nn.Module, leaves: list[Any], in_spec: Any) -> tuple[fx.GraphModule, Any]:
    leaves = _fake(leaves, device_of(model))
    args, kwargs = pytree.tree_unflatten(leaves, in_spec)
    dynamic = [{0: Dim.AUTO} if isinstance(leaf, torch.Tensor) and leaf.ndim else None for leaf in leaves]
    failure: Exception | None = None
    try:
        with _spelled_out(model, kwargs) as signature:
            # the form that export wants: names as in the signature, *args and **kwargs under theirs
            shapes, named = pytree.tree_unflatten(dynamic, in_spec)
            by_name = dict(signature.bind(*shapes, **named).arguments)
            program = torch.export.export(model, args, kwargs, dynamic_shapes=by_name, strict=False)
    except Exception as error:
        failure = error
    if failure is not None:
        _try_original(model, args, kwargs)  # not in the handler: its own error stands alone, without torch's in front
        raise _explain(model, failure) from failure
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _drop_checks(module)
    return module, program.call_spec.out_spec


def _fake(leaves: list[Any], device: torch.device) -> list[Any]:
    """Meta tensors become fake tensors of the model's device: export needs a device, and no memory."""
    if device.type == "meta" or not any(isinstance(x, torch.Tensor) and x.is_meta for x in leaves):
        return leaves
    with FakeTensorMode(allow_non_fake_inputs=True):
        return [
            torch.empty(x.shape, dtype=x.dtype, device=device) if isinstance(x, torch.Tensor) else x for x in leaves
        ]


@contextlib.contextmanager
def _spelled_out(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[inspect.Signature]:
    """The forward's signature; keyword inputs that its **kwargs catches become parameters for a while.

    torch 2.13 checks their dynamic shapes once below the name of **kwargs and once beside it: no form passes both.
    """
    signature = inspect.signature(model.forward)
    known = list(signature.parameters.values())
    extra = [name for name in kwargs if name not in signature.parameters]
    if not extra or known[-1].kind is not inspect.Parameter.VAR_KEYWORD or "forward" in vars(model):
        yield signature
        return
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*known[:-1], *added])  # type: ignore[attr-defined]
    object.__setattr__(model, "forward", forward)
    try:
        yield inspect.signature(forward)
    finally:
        object.__delattr__(model, "forward")


def _drop_checks(module: fx.GraphModule) -> None:
    """Remove what only asserts: it bakes devices and sizes and computes nothing."""
    checks = (
        "_assert_tensor_metadata",
        "_assert_scalar",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_assert_async",
    )
    for node in reversed(list(module.graph.nodes)):
        name = getattr(node.target, "_opname", "") or getattr(node.target, "__name__", "")
        if node.op == "call_function" and not node.users and name.split(".")[0] in checks:
            module.graph.erase_node(node)
    module.recompile()


def _describe(train: fx.GraphModule, leaves: list[Any]) -> tuple[tuple[TensorSpec, ...], dict[str, object], list[str]]:
    """Input specs, inputs that are constants, and what to tell the user about them.

    The batch is the dimension 0 that all inputs share which are free and as long as the first of them; what is free
    and of another length (a bank of keys) is kept to the length it has.
    """
    placeholders = train.graph.find_nodes(op="placeholder")
    tensors = [(node, leaf) for node, leaf in zip(placeholders, leaves, strict=True) if isinstance(leaf, torch.Tensor)]
    constants = {
        node.name: leaf for node, leaf in zip(placeholders, leaves, strict=True) if not isinstance(leaf, torch.Tensor)
    }
    free = {node: len(leaf) for node, leaf in tensors if leaf.ndim and is_free(node.meta["val"].shape[0])}
    batch = next(iter(free.values()), None)
    specs = [spec_of(node.name, leaf, 0 if node in free and free[node] == batch else None) for node, leaf in tensors]
    fixed = [(node.name, len(leaf)) for node, leaf in tensors if leaf.ndim and len(leaf) == _num_rows(leaves)]
    notes = [
        f"input {name!r} is fixed to {rows} rows, so a smaller last batch will be refused: the model uses its batch"
        " size as a number. Write x.shape[0] for a literal or len(x), and -1 in x.view(-1, ...)"
        for name, rows in fixed
        if not free
    ]
    return tuple(spec for spec in specs if spec is not None), constants, notes


def _try_original(model: nn.Module, args: Any, kwargs: Any) -> None:
    """What stops the model itself is not the capture's: let it through, with its own type and traceback."""
    with verify.preserved(model), verify.seeded(), torch.no_grad(), verify.own_errors(model):
        model(*args, **kwargs)


def _explain(model: nn.Module, error: Exception) -> TraceError:
    """Say which line of the user's stopped the capture, and what can be done about it."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    place = _user_line(error)
    where = f"\n  at {place}" if place else ""
    return TraceError(
        f"cannot capture {type(model).__name__} as a graph: {type(error).__name__}: {first[:300]}{where}\n"
        "  A graph needs the same operations for every batch. Ways out: replace Python control flow on tensor values"
        " (`if tensor:`, `.item()`, loops over data) by tensor operations such as torch.where; pass options that"
        " decide it as constants; or move that part out of the module, in front of it."
    )


def _user_line(error: BaseException) -> str:
    """The innermost frame outside torch and this package, as file:line with its source."""
    inside = (os.path.dirname(torch.__file__), os.path.dirname(os.path.abspath(__file__)))
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not os.path.abspath(f.filename).startswith(inside)
    ]
    frames = [f for f in frames if not f.filename.startswith("<") and f"autodecouple{os.sep}" not in f.filename]
    if not frames:
        return ""
    frame = frames[-1]
    source = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{frame.filename}:{frame.lineno}: {source}"


def bind(graph: Graph, inputs: Any) -> list[Any]:
    """Flat leaves of a batch in the graph's order; raises InputError where they do not fit the capture."""
    args, kwargs = as_call(inputs)
    _, names = graph.in_spec.children()
    if set(kwargs) == set(names.context):
        kwargs = {name: kwargs[name] for name in names.context}  # the order of a dict carries no meaning
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if spec != graph.in_spec:
        raise InputError(f"the model was captured with {_form(graph.in_spec)}, but got {_form(spec)}")
    placeholders = graph.train.graph.find_nodes(op="placeholder")
    known = {spec.name: spec for spec in graph.inputs}
    for node, leaf in zip(placeholders, leaves, strict=True):
        if node.name in known:
            _check_tensor(known[node.name], leaf)
        elif leaf != graph.constants[node.name]:
            raise InputError(
                f"input {node.name!r} is {leaf!r}, but the model was captured with {graph.constants[node.name]!r}:"
                " inputs that are no tensors are part of the graph; compile again for another value"
            )
    _check_rows(graph, leaves)
    return leaves


def _form(spec: Any) -> str:
    args, kwargs = spec.children()
    parts = [f"{args.num_children} positional input{'s' * (args.num_children != 1)}"] if args.num_children else []
    if kwargs.num_children:
        parts.append(f"keyword inputs {', '.join(map(str, kwargs.context))}")
    return " and ".join(parts) or "no inputs"


def _check_tensor(spec: TensorSpec, leaf: Any) -> None:
    if not isinstance(leaf, torch.Tensor):
        raise InputError(f"input {spec.name!r} must be a tensor {spec}, but is {type(leaf).__name__}")
    shape = tuple(leaf.shape)
    fits = len(shape) == len(spec.shape) and all(
        i == spec.batch_dim or size == expected
        for i, (size, expected) in enumerate(zip(shape, spec.shape, strict=True))
    )
    if not fits or dtype_name(leaf.dtype) != spec.dtype:
        raise InputError(f"input {spec} was captured, but got shape {shape} {dtype_name(leaf.dtype)}")
    if spec.batch_dim is not None and shape[spec.batch_dim] == 0:
        raise InputError(f"input {spec.name!r} has no rows: shape {shape}")


def _check_rows(graph: Graph, leaves: list[Any]) -> None:
    """Inputs that had the same number of rows at capture must have it now."""
    rows: dict[int, tuple[str, int]] = {}
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    for spec, leaf in zip(graph.inputs, tensors, strict=True):
        if spec.batch_dim is None:
            continue
        name, size = rows.setdefault(spec.shape[0], (spec.name, leaf.shape[0]))
        if leaf.shape[0] != size:
            raise InputError(f"input {spec.name!r} has {leaf.shape[0]} rows, but {name!r} has {size}")
