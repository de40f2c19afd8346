"""Shapes, FLOPs and bytes of every node, from one run on fake tensors: no memory, no real compute."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
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

from autodecouple.graph import LEAF, Graph, attribute, dtype_from, spec_of
from autodecouple.objectives.gather import gathered_head
from autodecouple.objectives.objective import Objective, Signal, input_of, price_key
from autodecouple.passes.measuring.flops import flop_counter
from autodecouple.passes.measuring.lifetimes import Footprint, Measured
from autodecouple.passes.measuring.profile import PeakMemory, Profile, Profiler, Workspaces, keyed
from autodecouple.passes.measuring.recomputable import mark_recomputed
from autodecouple.plans import TensorSpec

aten = torch.ops.aten


def annotate(graph: Graph) -> Graph:
    """Fill in the measures of every node at the example batch.

    FLOPs follow torch's flop counter (see `flop_counter`), memory what autograd saves; operations that draw random
    numbers count as training runs them, with keyed ones.
    """
    return dataclasses.replace(graph, measures=mark_recomputed(graph, _FakeRun(graph).measures()))


@dataclass(frozen=True)
class HeadCost:
    """Of one head at the example batch: FLOPs of forward and backward, parameters and the memory they take.

    largest_bytes: of its largest parameter
    peak_bytes:    most that loss and backward take beside parameters and features, gradients of both included
    """

    flops: int
    num_parameters: int
    parameter_bytes: int
    largest_bytes: int = 0
    peak_bytes: int = 0


def head_cost(objective: Objective, features: Sequence[TensorSpec], signal: Signal) -> HeadCost:
    """Build the objective's head on fake tensors and count one training step of it; the same is counted once.

    What is bound to a model keeps its prices there, in `prices`, and goes with it.
    """
    prices: dict[Any, HeadCost] | None = getattr(objective, "prices", None)
    if prices is not None:
        key = price_key(objective), *((spec.shape, spec.dtype) for spec in features), signal
        if key not in prices:
            prices[key] = _head_cost.__wrapped__(objective, tuple(features), signal)
        return prices[key]
    if isinstance(objective, Hashable):
        return _head_cost(objective, tuple(features), signal)
    return _head_cost.__wrapped__(objective, tuple(features), signal)


@functools.lru_cache(maxsize=4096)
def _head_cost(objective: Objective, features: tuple[TensorSpec, ...], signal: Signal) -> HeadCost:
    with torch.inference_mode(False), torch.enable_grad(), FakeTensorMode(), torch.random.fork_rng(devices=[]):
        head = gathered_head(objective, features, signal)
        read = [_read(spec) for spec in features]
        compared = [signal] if (entered := input_of(objective)) is None else [entered, signal]
        given = pytree.tree_map(lambda spec: torch.zeros(spec.shape, dtype=dtype_from(spec.dtype)), compared)
        with flop_counter() as counter, Workspaces(), PeakMemory() as memory:  # type: ignore[no-untyped-call]
            loss, _ = head(*read, *given)
            loss.backward()
        parameters = list(head.parameters())
    sizes = [p.numel() * p.element_size() for p in parameters]
    count = sum(p.numel() for p in parameters)
    return HeadCost(counter.get_total_flops(), count, sum(sizes), max(sizes, default=0), memory.peak)


def _read(spec: TensorSpec) -> torch.Tensor:
    made = torch.empty(spec.shape, dtype=dtype_from(spec.dtype))
    return made.requires_grad_(made.is_floating_point() or made.is_complex())


class _FakeRun:
    """One execution of the training graph on fake tensors, keeping what each node did."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.mode = FakeTensorMode()
        self.values: dict[fx.Node, Any] = {}
        self.measured: dict[fx.Node, Measured] = {}
        self.holders: dict[int, list[fx.Node]] = {}  # memory -> nodes whose value lives in it
        self.profiler = Profiler(lambda node, args, kwargs: _call(graph.train, node, args, kwargs))
        self.sizes: dict[int, int] = {}  # of the memory that was met
        self.saved: set[int] = set()  # of it, what the model owns and what autograd has saved
        self.saving: list[torch.Tensor] = []  # what autograd saves for the node that runs
        self.alive: list[torch.Tensor] = []  # and for those before: the identity of freed memory would be used again
        self.batch_symbols = batch_symbols(graph)
        self.rows = graph.num_rows
        self.guessed = False

    def measures(self) -> Mapping[str, Measured]:
        with torch.inference_mode(False), torch.enable_grad(), self.mode, Workspaces():  # type: ignore[no-untyped-call]
            self._enter()
            for position, node in enumerate(self.graph.operations):
                self._run(position, node)
        for node in self.measured.keys() - self._trained():  # nothing comes back to it: no backward
            self.measured[node] = self.measured[node].without_backward()
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
            self._record(node, value, -1, frozenset(), Profile())
            self.saved |= self.measured[node].storages if node.op == "get_attr" else set()

    def _run(self, position: int, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        value = self._value(node, args, kwargs)
        writes = written(node, lambda n: self.measured[n].storages)
        depends = max((self._depends(source, position) for source in node.all_input_nodes), default=-1)
        profile = self.profiler.profile(node, args, kwargs, self._wanted(node, args, kwargs, position))
        self._record(node, value, position, writes, profile, depends)
        self._propagate(writes, position, depends)

    def _value(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The node's result; where its size is known to the data only, one as large as the batch."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.saving.append, _never):
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

    def _record(
        self, node: fx.Node, value: Any, position: int, writes: frozenset[int], profile: Profile, depends: int = -1
    ) -> None:
        self.values[node] = value
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        storages = frozenset(map(storage_of, tensors))
        footprint, newly_saved = self._footprint(tensors, profile)
        carries = any(tensor.requires_grad for tensor in tensors)
        self.measured[node] = Measured(
            position=position,
            value=spec_of(node.name, value, self._batch_dim(node)),
            gradient_since=position if carries else None,
            storages=storages,
            writes=writes,
            forward_flops=profile.forward_flops,
            backward_flops=profile.backward_flops,
            activation_bytes=newly_saved,
            depends=depends,
            footprint=footprint,
        )
        for storage in storages:
            self.holders.setdefault(storage, []).append(node)

    def _footprint(self, tensors: list[torch.Tensor], profile: Profile) -> tuple[Footprint, int]:
        """Of the node that has just run: which memory is new, what autograd keeps, and the bytes newly kept."""
        kept, self.saving = self.saving, []
        self.alive += kept
        met = {storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in (*tensors, *kept)}
        born = tuple((storage, size) for storage, size in met.items() if storage not in self.sizes)
        self.sizes.update(met)
        saved = frozenset(map(storage_of, kept))
        new = saved - self.saved
        self.saved |= new
        footprint = Footprint(born, saved, profile.forward_bytes, profile.backward_bytes)
        return footprint, sum(self.sizes[storage] for storage in new)

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

    def _wanted(self, node: fx.Node, args: Any, kwargs: Any, position: int) -> dict[int, list[int]]:
        """The flat inputs that take a gradient, by the threshold from which they do: the latest-born first."""
        leaves = pytree.tree_leaves((args, kwargs))
        named = fx.node.map_arg((node.args, node.kwargs), lambda n: pytree.tree_map(lambda _: n, self.values[n]))
        wanted: dict[int, list[int]] = {}
        for index, (leaf, source) in enumerate(zip(leaves, pytree.tree_leaves(named), strict=True)):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                wanted.setdefault(self._depends(source, position), []).append(index)
        return dict(sorted(wanted.items(), reverse=True))

    def _batch_dim(self, node: fx.Node) -> int | None:
        """The dimension whose size is exactly the batch's."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        sizes = [str(size) for size in value.shape]
        return next((i for i, size in enumerate(sizes) if size in self.batch_symbols), None)


def batch_symbols(graph: Graph) -> set[str]:
    """What stands for the number of rows: the free sizes of the inputs that have the batch in front."""
    batched = {spec.name for spec in graph.inputs if spec.batch_dim == 0}
    nodes = [node for node in graph.train.graph.find_nodes(op="placeholder") if node.name in batched]
    return {str(node.meta["val"].shape[0]) for node in nodes}


def _call(module: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_function":
        return keyed(node, node.target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return module.get_submodule(str(node.target))(*args, **kwargs)


def _has_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _never(_: Any) -> Any:
    raise AssertionError("no backward of the whole model is run")


def storage_of(tensor: torch.Tensor) -> int:
    """Identity of a tensor's memory: equal for views and in-place results, on fake tensors too."""
    return int(tensor.untyped_storage()._cdata)


_BATCH_NORMS = (aten.batch_norm.default, aten.instance_norm.default)


def written(node: fx.Node, storages: Callable[[fx.Node], Iterable[int]]) -> frozenset[int]:
    """Memory that a node writes into, by its operator's schema."""
    if LEAF in node.meta:
        return frozenset(storage for source in node.meta[LEAF].written(node) for storage in storages(source))
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return frozenset()
    named = {arg.name: arg for arg in schema.arguments}
    given = dict(zip(named, node.args, strict=False)) | dict(node.kwargs)
    mutated = [n for n, arg in named.items() if arg.alias_info is not None and arg.alias_info.is_write]
    if node.target in _BATCH_NORMS and node.args[5] is True:  # their schema keeps silent about the running statistics
        mutated += ["running_mean", "running_var"]
    sources = [leaf for n in mutated for leaf in pytree.tree_leaves(given.get(n)) if isinstance(leaf, fx.Node)]
    return frozenset(storage for source in sources for storage in storages(source))


__all__ = ["HeadCost", "annotate", "batch_symbols", "flop_counter", "head_cost", "storage_of", "written"]
