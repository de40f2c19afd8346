"""A captured model: an fx.GraphModule per mode, over the user's own parameters, with its measured nodes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from autodecouple.errors import InputError
from autodecouple.plans import TensorSpec

LEAF = "autodecouple_leaf"
"""Key in the meta of a node that calls a whole module: its `passes.capturing.leaves.Leaf`."""


@dataclass(frozen=True)
class Measure:
    """What the fake run of one node showed; positions count the graph's operations from 0.

    value:           its tensor (or number), None for tuples and None
    gradient_since:  position from which it carries a gradient, None if never
    storages:        identities of the memory it lives in; views and in-place results share them
    writes:          identities of the memory that it writes into
    forward_flops:   of the operation
    backward_flops:  pairs (threshold, FLOPs): spent when the stage begins at or before `threshold`, since only then
                     does an input of the node need a gradient
    activation_bytes: new memory that the backward may need
    depends:         the last position, up to this one, from which a trainable parameter's gradient path leads to its
                     value; -1 if none
    in_loss:         whether a gradient of the model's outputs comes back to it
    recomputed:      whether later stages compute it again instead of being sent it
    """

    position: int
    value: TensorSpec | None
    gradient_since: int | None
    storages: frozenset[int]
    writes: frozenset[int]
    forward_flops: int = 0
    backward_flops: tuple[tuple[int, int], ...] = ()
    activation_bytes: int = 0
    depends: int = -1
    in_loss: bool = True
    recomputed: bool = False

    def carries_gradient(self, position: int) -> bool:
        return self.gradient_since is not None and self.gradient_since <= position


@dataclass(frozen=True)
class Graph:
    """The model as captured.

    model:      the user's own module
    train:      its training-mode graph; get_attr nodes lead to the user's own parameters and buffers
    evaluation: its evaluation-mode graph, None where only the training mode could be captured
    inputs:     the tensors that enter, in the order of the graph's placeholders, at the example batch
    constants:  inputs that are no tensors; the capture holds for these values only
    in_spec:    how (args, kwargs) nest
    out_spec:   how the output nests; evaluation_spec: how that of the evaluation mode does, where it was captured
    measures:   filled in by `passes.measure`, by node name
    target:     what the example is compared with, where that is known
    """

    model: nn.Module
    train: fx.GraphModule
    evaluation: fx.GraphModule | None
    inputs: tuple[TensorSpec, ...]
    constants: Mapping[str, object]
    in_spec: Any
    out_spec: Any
    measures: Mapping[str, Measure] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    target: TensorSpec | None = None
    evaluation_spec: Any = None

    @functools.cached_property
    def operations(self) -> list[fx.Node]:
        """The nodes that compute, in execution order; their index is their position."""
        return operations(self.train.graph)

    @functools.cached_property
    def positions(self) -> Mapping[fx.Node, int]:
        return {node: position for position, node in enumerate(self.operations)}

    @functools.cached_property
    def paths(self) -> list[tuple[str, ...]]:
        """By operations, the names of the modules, outermost first, in whose forward they ran."""
        return [module_path(node) for node in self.operations]

    @functools.cached_property
    def measured(self) -> Mapping[fx.Node, Measure]:
        """The measures by the nodes themselves."""
        return {node: self.measures[node.name] for node in self.train.graph.nodes if node.op != "output"}

    @functools.cached_property
    def writers(self) -> Mapping[int, list[int]]:
        """Positions of the operations that write into each storage which is written into, in order."""
        writers: dict[int, list[int]] = {}
        for position, node in enumerate(self.operations):
            for storage in self.measures[node.name].writes:
                writers.setdefault(storage, []).append(position)
        return writers

    @property
    def device(self) -> torch.device:
        """Where the model's parameters lie at capture."""
        return device_of(self.model)

    @functools.cached_property
    def outputs(self) -> tuple[Any, ...]:
        """The flat leaves of the output node."""
        return output_leaves(self.train.graph)

    @property
    def logits(self) -> TensorSpec | None:
        """The first floating point output with rows of classes, None if there is none."""
        for leaf in self.outputs:
            spec = self.measures[leaf.name].value if isinstance(leaf, fx.Node) else None
            if spec is not None and len(spec.shape) >= 2 and spec.batch_dim == 0 and "float" in spec.dtype:
                return spec
        return None

    @property
    def smallest_batch(self) -> int:
        """Rows that a training step needs: 2 where a BatchNorm would see one value per channel in a single row."""
        return 2 if any(map(self._normalises_rows, self.operations)) else 1

    def _normalises_rows(self, node: fx.Node) -> bool:
        if node.target is not torch.ops.aten.batch_norm.default or node.args[5] is not True:
            return False
        source = node.args[0]
        spec = self.measures[source.name].value if isinstance(source, fx.Node) else None
        return spec is not None and all(size == 1 for size in spec.shape[2:])

    @property
    def num_rows(self) -> int:
        """Rows of the example batch."""
        return next((s.shape[s.batch_dim] for s in self.inputs if s.batch_dim is not None), 1)

    @functools.cached_property
    def signal(self) -> TensorSpec:
        """What heads compare with: the example target, or else class indices as the logits suggest.

        Logits (N, C) mean one class per row, (N, T, V) one per token, (N, C, H, W) one per position.
        """
        logits = self.logits
        if logits is None:
            return self.target or TensorSpec("target", (self.num_rows,), "int64", 0)
        classes_at = 1 if len(logits.shape) > 3 else len(logits.shape) - 1
        shape = tuple(size for dim, size in enumerate(logits.shape) if dim != classes_at)
        guess = TensorSpec("target", shape, "int64", 0, logits.shape[classes_at])
        if self.target is None or (self.target.dtype == "int64" and len(self.target.shape) == len(shape)):
            return guess
        return self.target

    @functools.cached_property
    def memo(self) -> dict[Any, Any]:
        """What passes have found out about this capture, for the next plan of it."""
        return {}

    def parameter_uses(self) -> Mapping[str, list[int]]:
        """Positions at which each trainable parameter is used, by its name in the model."""
        return self._uses

    @functools.cached_property
    def _uses(self) -> Mapping[str, list[int]]:
        uses: dict[str, list[int]] = {}
        for node, value in self.owned.items():
            if isinstance(value, nn.Parameter) and value.requires_grad:
                at = [self.positions[user] for user in node.users if user in self.positions]
                uses.setdefault(self.names[node], []).extend(at)
        return uses

    @functools.cached_property
    def first_uses(self) -> Mapping[str, int]:
        """The first of these positions, of the parameters that are used."""
        return {name: min(uses) for name, uses in self._uses.items() if uses}

    @functools.cached_property
    def names(self) -> Mapping[fx.Node, str]:
        """The name that stands for the tensor of each get_attr node: the first of those that a tied one has here."""
        first: dict[int, str] = {}
        return {node: first.setdefault(id(value), str(node.target)) for node, value in self.owned.items()}

    @functools.cached_property
    def owned(self) -> Mapping[fx.Node, Any]:
        """The parameters, buffers and constants by the get_attr nodes that name them."""
        homes: dict[str, Any] = {"": self.train}

        def found(path: str) -> Any:
            if path not in homes:
                outer, _, name = path.rpartition(".")
                homes[path] = getattr(found(outer), name)
            return homes[path]

        return {node: found(str(node.target)) for node in self.train.graph.find_nodes(op="get_attr")}

    @functools.cached_property
    def trained(self) -> frozenset[str]:
        """Names of the trainable parameters to which a gradient of the outputs comes back."""
        return frozenset(name for node, name in self.names.items() if self.measures[node.name].in_loss)


def operations(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


def output_leaves(graph: fx.Graph) -> tuple[Any, ...]:
    """What the output node returns, as a flat tuple."""
    (value,) = graph.output_node().args
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def attribute(module: nn.Module, node: fx.Node) -> Any:
    """The parameter, buffer or constant that a get_attr node names."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def device_of(module: nn.Module) -> torch.device:
    tensors: Iterable[torch.Tensor] = (*module.parameters(), *module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def module_path(node: fx.Node) -> tuple[str, ...]:
    """The names of the modules, outermost first, in whose forward the node ran; () where unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple([name for name, _ in stack.values() if not name.startswith("_")])


def module_classes(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """(name, class name) of the modules, outermost first, in whose forward the node ran."""
    stack = node.meta.get("nn_module_stack") or {}
    kinds = ((name, kind if isinstance(kind, str) else kind.__name__) for name, kind in stack.values())
    return tuple((name, kind.rpartition(".")[2]) for name, kind in kinds if not name.startswith("_"))


def is_free(size: object) -> bool:
    """Whether a size of the capture may change; one that was found to be constant may still be a SymInt."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def spec_of(name: str, value: object, batch_dim: int | None) -> TensorSpec | None:
    """The spec of a tensor or number, None for anything else."""
    if isinstance(value, torch.Tensor):
        return TensorSpec(name, tuple(int(s) for s in value.shape), dtype_name(value.dtype), batch_dim)
    if isinstance(value, (int, float)):
        return TensorSpec(name, (), "int" if isinstance(value, int) else "float", None)
    return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_from(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{name!r} is not a torch dtype; write float32, int64, bool, ...")
    return dtype
