"""Shapes, FLOPs and bytes of every node, from one run on fake tensors: no memory, no real compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from autodecouple.graph import Graph, Measure, attribute, dtype_from, spec_of
from autodecouple.objectives.objective import Objective
from autodecouple.plans import TensorSpec

aten = torch.ops.aten


def annotate(graph: Graph) -> Graph:
    """Fill in the measures of every node at the example batch.

    FLOPs follow torch's flop counter (a multiply-add is two), extended to the fused attention and recurrent kernels
    of the CPU, which it counts as nothing.
    """
    return dataclasses.replace(graph, measures=_FakeRun(graph).measures())


@dataclass(frozen=True)
class HeadCost:
    """Of one head at the example batch: FLOPs of forward and backward, parameters and the memory they take."""

    flops: int
    num_parameters: int
    parameter_bytes: int


def head_cost(objective: Objective, features: TensorSpec, signal: TensorSpec) -> HeadCost:
    """Build the objective's head on fake tensors and count one training step of it."""
    with torch.inference_mode(False), torch.enable_grad(), FakeTensorMode(), torch.random.fork_rng(devices=[]):
        head = objective.head(features, signal)
        h = torch.empty(features.shape, dtype=dtype_from(features.dtype), requires_grad=True)
        target = torch.zeros(signal.shape, dtype=dtype_from(signal.dtype))
        with flop_counter() as counter:
            loss, _ = head(h, target)
            loss.backward()
        parameters = list(head.parameters())
    return HeadCost(
        counter.get_total_flops(),
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.element_size() for p in parameters),
    )


def flop_counter() -> FlopCounterMode:
    """torch's counter, with formulas for the kernels that it does not know."""
    return FlopCounterMode(display=False, custom_mapping=_formulas())


def _formulas() -> dict[Any, Callable[..., int]]:
    def attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    def attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_backward_flop_count(grad, q, k, v))

    def recurrent(x: Any, w_input: Any, w_hidden: Any, *args: Any, **kwargs: Any) -> int:
        # every step of every row multiplies once with both weight matrices
        return int(2 * x[0] * x[1] * (w_input[0] * w_input[1] + w_hidden[0] * w_hidden[1]))

    def recurrent_backward(*args: Any, **kwargs: Any) -> int:
        return 2 * recurrent(*args)

    return {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        aten.mkldnn_rnn_layer: recurrent,
        aten.mkldnn_rnn_layer_backward: recurrent_backward,
    }


class _FakeRun:
    """One execution of the training graph on fake tensors, keeping what each node did."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.mode = FakeTensorMode()
        self.values: dict[fx.Node, Any] = {}
        self.measured: dict[fx.Node, Measure] = {}
        self.holders: dict[int, list[fx.Node]] = {}  # memory -> nodes whose value lives in it
        self.backward_cache: dict[Any, int] = {}
        self.batch_symbols = _batch_symbols(graph)
        self.rows = graph.num_rows
        self.guessed = False

    def measures(self) -> Mapping[str, Measure]:
        with torch.inference_mode(False), torch.enable_grad(), self.mode, flop_counter() as self.counter:
            self._enter()
            for position, node in enumerate(self.graph.operations):
                self._run(position, node)
        for node in self.measured.keys() - self._trained():  # nothing comes back to it: no backward
            self.measured[node] = dataclasses.replace(self.measured[node], in_loss=False, backward_flops=())
        return {node.name: measure for node, measure in self.measured.items()}

    def _trained(self) -> set[fx.Node]:
        """The nodes to which a gradient of the outputs comes back."""
        found = {leaf for leaf in self.graph.outputs if isinstance(leaf, fx.Node) and self._carries(leaf)}
        memory = {storage for node in found for storage in self.measured[node].storages}
        for node in reversed(self.graph.operations):
            measure = self.measured[node]
            if not (node in found or measure.writes & memory):
                continue
            found.add(node)
            sources = [source for source in node.all_input_nodes if self._carries(source, measure.position)]
            found.update(sources)
            memory |= {storage for source in sources for storage in self.measured[source].storages}
        return {node for node in found if self._carries(node)}

    def _carries(self, node: fx.Node, position: int = 2**62) -> bool:
        return self.measured[node].carries_gradient(position)

    def _enter(self) -> None:
        specs = {spec.name: spec for spec in self.graph.inputs}
        for node in self.graph.train.graph.nodes:
            if node.op == "placeholder" and node.name in specs:
                spec = specs[node.name]
                value: Any = torch.empty(spec.shape, dtype=dtype_from(spec.dtype), device=self.graph.device)
            elif node.op == "placeholder":
                value = self.graph.constants[node.name]
            elif node.op == "get_attr":
                value = attribute(self.graph.train, node)
                value = self.mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            else:
                continue
            # a parameter's `depends` is set where it is used: it has no position of its own
            self._record(node, value, -1, frozenset())

    def _run(self, position: int, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        before = self.counter.get_total_flops()
        value = self._value(node, args, kwargs)
        flops = self.counter.get_total_flops() - before
        writes = written(node, lambda n: self.measured[n].storages)
        depends = max((self._depends(source, position) for source in node.all_input_nodes), default=-1)
        self._record(node, value, position, writes, forward_flops=flops, depends=depends)
        if flops:
            terms = self._backward(node, args, kwargs, position)
            self.measured[node] = dataclasses.replace(self.measured[node], backward_flops=terms)
        self._propagate(writes, position, depends)

    def _value(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The node's result; where its size is known to the data only, one as large as the batch."""
        try:
            return _call(self.graph.train, node, args, kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            self.guessed = True
        except Exception:  # sizes that were guessed need not fit each other: a FLOP less, but never a failure
            if not self.guessed:
                raise
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _has_grad(leaf)]
        link = sum((leaf.reshape(-1)[:1].sum() * 0 for leaf in inputs), torch.zeros(()))
        return pytree.tree_map(lambda leaf: self._guess(leaf, link), node.meta["val"])

    def _guess(self, leaf: Any, link: torch.Tensor) -> Any:
        """A value of the capture with numbers for its free sizes; `link` gives it its gradient."""
        if isinstance(leaf, torch.SymInt):
            symbols = dict.fromkeys(leaf.node.expr.free_symbols, self.rows)
            return int(leaf.node.expr.subs(symbols))
        if not isinstance(leaf, torch.Tensor):
            return leaf
        sizes = [self._guess(size, link) for size in leaf.shape]
        made = torch.empty(sizes, dtype=leaf.dtype, device=self.graph.device)
        return made + link.to(made) if link.requires_grad and made.is_floating_point() else made

    def _depends(self, source: fx.Node, position: int) -> int:
        if not self._carries(source, position):
            return -1
        return position if source.op == "get_attr" else self.measured[source].depends

    def _record(self, node: fx.Node, value: Any, position: int, writes: frozenset[int], **more: Any) -> None:
        self.values[node] = value
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        storages = frozenset(map(storage_of, tensors))
        fresh = [s for s in storages if s not in self.holders]
        new_bytes = sum(
            {storage_of(t): t.untyped_storage().nbytes() for t in tensors if storage_of(t) in fresh}.values()
        )
        carries = any(tensor.requires_grad for tensor in tensors)
        self.measured[node] = Measure(
            position=position,
            value=spec_of(node.name, value, self._batch_dim(node)),
            gradient_since=position if carries else None,
            storages=storages,
            writes=writes,
            activation_bytes=new_bytes if carries and position >= 0 else 0,
            **more,
        )
        for storage in storages:
            self.holders.setdefault(storage, []).append(node)

    def _propagate(self, writes: frozenset[int], position: int, depends: int) -> None:
        """A write gives every view of that memory a gradient, and the writer's parameters."""
        for node in {holder for storage in writes for holder in self.holders.get(storage, ())}:
            measure = self.measured[node]
            tensors = [leaf for leaf in pytree.tree_leaves(self.values[node]) if isinstance(leaf, torch.Tensor)]
            since = measure.gradient_since
            if since is None and any(tensor.requires_grad for tensor in tensors):
                since = position
            self.measured[node] = dataclasses.replace(
                measure, gradient_since=since, depends=max(measure.depends, depends) if node.op != "get_attr" else -1
            )

    def _backward(self, node: fx.Node, args: Any, kwargs: Any, position: int) -> tuple[tuple[int, int], ...]:
        """(threshold, FLOPs) pairs: what each further input gradient adds, the latest-born input first."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        nodes = pytree.tree_leaves((node.args, node.kwargs), is_leaf=lambda x: isinstance(x, fx.Node))
        wanted: dict[int, list[int]] = {}
        for index, (leaf, source) in enumerate(zip(leaves, nodes, strict=True)):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                wanted.setdefault(self._depends(source, position), []).append(index)
        terms: list[tuple[int, int]] = []
        chosen: list[int] = []
        for threshold in sorted(wanted, reverse=True):
            chosen += wanted[threshold]
            spent = sum(flops for _, flops in terms)
            terms.append((threshold, self._backward_flops(node, leaves, spec, tuple(sorted(chosen))) - spent))
        return tuple(terms)

    def _backward_flops(self, node: fx.Node, leaves: list[Any], spec: Any, wanted: tuple[int, ...]) -> int:
        """Run the node once more with only the `wanted` inputs requiring gradients, and count its backward."""
        key = (node.target, wanted, tuple(_signature(leaf) for leaf in leaves))
        if key not in self.backward_cache:
            fresh = [_detached(leaf, index in wanted) for index, leaf in enumerate(leaves)]
            args, kwargs = pytree.tree_unflatten(fresh, spec)
            outputs = [o for o in pytree.tree_leaves(_call(self.graph.train, node, args, kwargs)) if _has_grad(o)]
            before = self.counter.get_total_flops()
            torch.autograd.grad(
                outputs, [fresh[i] for i in wanted], [torch.ones_like(o) for o in outputs], allow_unused=True
            )
            self.backward_cache[key] = self.counter.get_total_flops() - before
        return self.backward_cache[key]

    def _batch_dim(self, node: fx.Node) -> int | None:
        """The dimension whose size is exactly the batch's."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        sizes = [str(size) for size in value.shape]
        return next((i for i, size in enumerate(sizes) if size in self.batch_symbols), None)


def _batch_symbols(graph: Graph) -> set[str]:
    """What stands for the number of rows: the free sizes of the inputs that have the batch in front."""
    batched = {spec.name for spec in graph.inputs if spec.batch_dim == 0}
    nodes = [node for node in graph.train.graph.find_nodes(op="placeholder") if node.name in batched]
    return {str(node.meta["val"].shape[0]) for node in nodes}


def _call(module: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_function":
        assert callable(node.target)
        return node.target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return module.get_submodule(str(node.target))(*args, **kwargs)


def _signature(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf)


def _detached(leaf: Any, wanted: bool) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(wanted)


def _has_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def storage_of(tensor: torch.Tensor) -> int:
    """Identity of a tensor's memory: equal for views and in-place results, on fake tensors too."""
    return int(tensor.untyped_storage()._cdata)


_BATCH_NORMS = (aten.batch_norm.default, aten.instance_norm.default)


def written(node: fx.Node, storages: Callable[[fx.Node], Iterable[int]]) -> frozenset[int]:
    """Memory that a node writes into, by its operator's schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return frozenset()
    named = {arg.name: arg for arg in schema.arguments}
    given = dict(zip(named, node.args, strict=False)) | dict(node.kwargs)
    mutated = [n for n, arg in named.items() if arg.alias_info is not None and arg.alias_info.is_write]
    if node.target in _BATCH_NORMS:  # their schema keeps silent about the running statistics
        mutated += ["running_mean", "running_var"]
    sources = [leaf for n in mutated for leaf in pytree.tree_leaves(given.get(n)) if isinstance(leaf, fx.Node)]
    return frozenset(storage for source in sources for storage in storages(source))


__all__ = ["HeadCost", "annotate", "flop_counter", "head_cost", "storage_of", "written"]
