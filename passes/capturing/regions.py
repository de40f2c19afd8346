"""Code that ran in another mode of torch becomes plain operations: no_grad and inference_mode, autocast, vmap.

torch.export folds code under `no_grad` or `autocast` into operators whose body is a graph of its own, in which no cut
can lie. Its splitter also loses a `no_grad` that stands inside an `autocast`, and the gradients differ silently, so
that `marked()` keeps it from folding; `inline_regions` then takes the modes out of the flat graph:

    no_grad    what enters is detached: an alias that shares its memory and version, so that writes are seen
    autocast   an operation that it might act on is called through `under_autocast`, whatever surrounds it when it runs
    vmap       stays whole, in one call (see `fold_vmaps`)

Operators whose body is the user's own branch or loop (`torch.cond`, `map`, `scan`, `while_loop`) stay one operation
(see `Branches`); a region within the body is taken out there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._export.passes import replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.utils import _pytree as pytree

from autodecouple.graph import attribute
from autodecouple.passes.capturing.autocast import autocast_of, is_composite, under_autocast
from autodecouple.passes.capturing.branches import Branches
from autodecouple.passes.capturing.surroundings import Setting, held
from autodecouple.passes.capturing.vmaps import BODIES, call_whole, fold_vmaps

aten = torch.ops.aten


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Let torch.export mark in the flat graph where no_grad, inference_mode and autocast begin and end.

    Without it inference_mode would vanish, and a no_grad inside an autocast too.
    """
    settings: list[Setting] = [
        (replace_set_grad_with_hop_pass, "replace_set_grad_with_hop_pass", _keep),
        (replace_autocast_with_hop_pass, "replace_autocast_with_hop_pass", _keep),
        (torch.inference_mode, "__enter__", _enter_inference),
        (torch.inference_mode, "__exit__", _exit_inference),
    ]
    with held(settings):
        yield


def _keep(module: fx.GraphModule, signature: Any) -> tuple[fx.GraphModule, Any]:
    return module, signature


def _enter_inference(region: Any) -> None:
    region._grad_before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(not region.mode)


def _exit_inference(region: Any, *exception: object) -> None:
    torch._C._set_grad_enabled(region._grad_before)


def inline_regions(module: fx.GraphModule) -> None:
    """Take no_grad, autocast and vmap out of an exported graph, nested ones and those in branches and loops too.

    Results, gradients and writes stay those of the model; names, parameters and metadata stay in place.
    """
    _flatten(module, _Mode())


@dataclass(frozen=True)
class _Mode:
    """What surrounds an operation; autocast: (dtype, enabled) by device type, the innermost of each."""

    grad: bool = True
    autocast: Mapping[str, tuple[torch.dtype, bool]] = field(default_factory=dict)

    def within(self, kind: str, dtype: torch.dtype, enabled: bool, cache_enabled: bool | None) -> _Mode:
        others = {k: state for k, state in self.autocast.items() if k != kind}
        return dataclasses.replace(self, autocast={**others, kind: (dtype, enabled)})


def _flatten(module: fx.GraphModule, mode: _Mode) -> None:
    flat = _Flattener(module)
    output = flat.graph.output(flat.visit(module, mode))
    output.meta = dict(module.graph.output_node().meta)
    flat.graph.set_codegen(module.graph._codegen)
    module.graph = flat.graph
    _drop_bodies(module)
    fold_vmaps(module)
    module.recompile()


class _Flattener:
    """Copies a graph operation by operation, and enters what torch.export folded."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}  # by the node of the old graph; a tuple for a folded region
        self.detached: dict[fx.Node, fx.Node] = {}  # aliases made in the no_grad region at hand
        self.free: set[fx.Node] = set()  # new nodes that surely carry no gradient

    def visit(self, source: fx.GraphModule, mode: _Mode) -> Any:
        """Copy the operations of the module's graph, or of a region's; returns what it returns."""
        outside: dict[Any, _Mode] = {}
        for node in source.graph.nodes:
            target = node.target
            if target is torch._C._set_grad_enabled:
                mode = dataclasses.replace(mode, grad=bool(node.args[0]))
            elif target is _enter_autocast:
                outside[node], mode = mode, mode.within(*node.args)
            elif target is _exit_autocast:
                mode = dataclasses.replace(mode, autocast=outside[node.args[0]].autocast)
            elif target in (wrap_with_set_grad_enabled, wrap_with_autocast):
                self._enter(source, node, mode)
            elif node.op != "output" and node not in self.values:
                self.values[node] = self._copy(source, node, mode)
        return fx.node.map_arg(source.graph.output_node().args[0], self._read)

    def _enter(self, source: fx.GraphModule, node: fx.Node, mode: _Mode) -> None:
        num_options = 1 if node.target is wrap_with_set_grad_enabled else 4
        options: Any = node.args[:num_options]
        body_node, *operands = node.args[num_options:]
        mode = dataclasses.replace(mode, grad=options[0]) if num_options == 1 else mode.within(*options)
        assert isinstance(body_node, fx.Node)
        body = attribute(source, body_node)
        for placeholder, operand in zip(body.graph.find_nodes(op="placeholder"), operands, strict=True):
            self.values[placeholder] = fx.node.map_arg(operand, self._read)
        self.values[node] = self.visit(body, mode)

    def _read(self, node: fx.Node) -> Any:
        return self.values[node]

    def _copy(self, source: fx.GraphModule, node: fx.Node, mode: _Mode) -> Any:
        if node.op == "get_attr":
            return self._attribute(source, node)
        if node.target is operator.getitem and isinstance(parts := fx.node.map_arg(node.args[0], self._read), tuple):
            return parts[operator.index(node.args[1])]  # type: ignore[arg-type]
        if isinstance(node.target, HigherOrderOperator):
            self._flatten_bodies(source, node, mode)
        if mode.grad or not _is_operator(node.target):
            return self._with_grad(node, mode)
        return self._without_grad(node, mode)

    def _attribute(self, source: fx.GraphModule, node: fx.Node) -> fx.Node:
        value = attribute(source, node)
        new = self.graph.node_copy(node)
        if source is not self.module:  # a body within a body: it moves to the module
            new.target = f"{new.name}_body"
            setattr(self.module, new.target, value)
        if not getattr(value, "requires_grad", False):
            self.free.add(new)
        return new

    def _flatten_bodies(self, source: fx.GraphModule, node: fx.Node, mode: _Mode) -> None:
        """What the user's own branches and loops hold runs in the mode of the call; operands are detached outside."""
        attributes = [argument for argument in node.all_input_nodes if argument.op == "get_attr"]
        found = [attribute(source, argument) for argument in attributes]
        bodies = tuple(body for body in found if isinstance(body, fx.GraphModule))
        for body in bodies:
            _flatten(body, dataclasses.replace(mode, grad=True))
        node.meta[BODIES] = bodies

    def _with_grad(self, node: fx.Node, mode: _Mode) -> fx.Node:
        new = self._emit(node, mode, self._read)
        if node.op == "placeholder":
            return new
        if _is_operator(node.target):
            self.detached.clear()
        if all(self._is_free(operand) for operand in new.all_input_nodes):
            self.free.add(new)
        elif _is_mutable(node.target):  # any view of what is written may now carry a gradient
            self.free.clear()
        return new

    def _without_grad(self, node: fx.Node, mode: _Mode) -> fx.Node:
        """The operation on detached operands; an operand that it gives back itself goes on with its gradient."""
        detach = functools.partial(self._detach, node)
        same = _written(node) or _unchanged(node)
        if same is None or self._is_free(self._read(same)):
            new = self._emit(node, mode, detach)
            self.free.add(new)
            return new
        if _is_mutable(node.target):
            self._emit(node, mode, detach)
        result: fx.Node = self._read(same)
        return result

    def _is_free(self, node: fx.Node) -> bool:
        leaves = pytree.tree_leaves(node.meta.get("val"))
        floating = any(isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()) for x in leaves)
        return node in self.free or not floating

    def _detach(self, user: fx.Node, node: fx.Node) -> fx.Node:
        value: fx.Node = self._read(node)
        if self._is_free(value) or not isinstance(value.meta["val"], torch.Tensor):
            return value
        if value not in self.detached:
            new = self.graph.create_node("call_function", aten.detach.default, (value,), name=f"{value.name}_detached")
            new.meta = {key: user.meta[key] for key in ("nn_module_stack", "stack_trace") if key in user.meta}
            new.meta["val"] = value.meta["val"]
            self.detached[value] = new
            self.free.add(new)
        return self.detached[value]

    def _emit(self, node: fx.Node, mode: _Mode, read: Callable[[fx.Node], Any]) -> fx.Node:
        new = self.graph.node_copy(node, read)
        operation: Any = node.target
        autocast = autocast_of(node, mode.autocast)
        if autocast is not None:
            new.target, new.args = under_autocast, (*autocast, operation, *new.args)
        elif isinstance(operation, HigherOrderOperator):
            new.target, new.args = call_whole, (self._branches(new), *new.args)
        return new

    def _branches(self, node: fx.Node) -> fx.Node:
        with self.graph.inserting_before(node):
            owner = self.graph.create_node("get_attr", "", name=f"{node.name}_branches")
        owner.target = owner.name
        setattr(self.module, owner.name, Branches(node.target))
        return owner


def _is_operator(target: Any) -> bool:
    """A module that runs whole knows its modes itself."""
    return isinstance(target, (OpOverload, HigherOrderOperator)) and target.namespace != "autodecouple"


def _is_mutable(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _written(node: fx.Node) -> fx.Node | None:
    """The operand into which an operation writes and which is its result."""
    schema: Any = getattr(node.target, "_schema", None)
    results = [result.alias_info for result in schema.returns] if schema is not None else []
    if len(results) != 1 or results[0] is None or not results[0].is_write:
        return None
    given = dict(zip([argument.name for argument in schema.arguments], node.args, strict=False)) | dict(node.kwargs)
    name = next(argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write)
    operand = given.get(name)
    return operand if isinstance(operand, fx.Node) else None


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The operand that an operation gives back as it is, for there is nothing to do: `x.float()` of a float.

    Only composite operators do. The fake values of the capture tell, and what the capture took for the same stays so.
    """
    if not isinstance(node.target, OpOverload) or not is_composite(node.target):
        return None
    made = node.meta.get("val")
    alike = [operand for operand in node.all_input_nodes if _alike(operand.meta.get("val"), made)]
    if not alike:
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    result = None
    with torch.no_grad(), contextlib.suppress(RuntimeError):  # what only the data decide is computed, not given back
        result = node.target(*args, **kwargs)
    return next((operand for operand in alike if operand.meta["val"] is result), None)


def _alike(value: Any, made: Any) -> bool:
    if not isinstance(value, FakeTensor) or not isinstance(made, FakeTensor):
        return False
    return value.dtype == made.dtype and [str(size) for size in value.shape] == [str(size) for size in made.shape]


def _drop_bodies(module: fx.GraphModule) -> None:
    """Remove the folded regions' bodies, which nothing calls any more."""
    for node in list(module.graph.find_nodes(op="get_attr")):
        if not node.users and isinstance(attribute(module, node), fx.GraphModule):
            module.graph.erase_node(node)
            delattr(module, str(node.target))
