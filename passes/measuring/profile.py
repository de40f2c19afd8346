"""What one operation costs when it runs alone on fake tensors: FLOPs and working memory, forward and backward."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autodecouple.passes.capturing.autocast import called
from autodecouple.passes.insert import draws
from autodecouple.passes.measuring.flops import flop_counter
from autodecouple.randomness import Randomness, draw_mask, masked

aten = torch.ops.aten
Call = Callable[[fx.Node, Any, Any], Any]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes for as long as its memory lives.

    Fake tensors count as the real ones would; what a kernel takes for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: set[int] = set()

    def forget(self) -> int:
        """Start anew from what is alive: its bytes."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        for key, storage in _storages(out).items():
            if key not in given:  # else a view, or the result of a write
                self._add(key, storage)
        return out

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            weakref.finalize(storage, self._drop, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class Workspaces(TorchDispatchMode):
    """Gives the workspace that the fused LSTM of the CPU keeps for its backward its size: on fake tensors it is empty.

    Per row and step, the gates, states and gradients of oneDNN: 9 H + 6 max(I, H) numbers, found by measuring; right
    within 3 % but for the shortest sequences and single rows (15 %).
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not aten.mkldnn_rnn_layer.default or out[-1].numel():
            return out
        (steps, rows, width), hidden = args[0].shape, out[0].shape[-1]
        size = 4 * rows * (steps + 1) * (9 * hidden + 6 * max(width, hidden))
        return (*out[:-1], out[-1].new_empty(size))


@dataclass(frozen=True)
class Profile:
    """One operation: FLOPs, and bytes at the worst moment.

    forward_bytes:  beside its inputs, its results and what it saves for the backward
    backward_flops: (threshold, amount) pairs as in `Measure`
    backward_bytes: the same: gradients in and out and what it needs in between, beside what it has saved
    """

    forward_flops: int = 0
    forward_bytes: int = 0
    backward_flops: tuple[tuple[int, int], ...] = ()
    backward_bytes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class _Run:
    """One operation with gradients for some of its inputs."""

    forward_flops: int = 0
    forward_bytes: int = 0
    backward_flops: int = 0
    backward_bytes: int = 0


class Profiler:
    """Runs operations alone, on copies of their inputs; equal ones (same shapes, strides and options) once."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._known: dict[Any, _Run] = {}

    def profile(self, node: fx.Node, args: Any, kwargs: Any, wanted: Mapping[int, Sequence[int]]) -> Profile:
        """wanted: the flat inputs that take a gradient, by the threshold from which they do, the latest-born first.

        What cannot run alone costs nothing: an estimate is no reason to fail.
        """
        chosen: list[int] = []
        runs = [_Run()]
        for indices in wanted.values():
            chosen += indices
            runs.append(self._cached(node, args, kwargs, sorted(chosen)))
        last = runs[-1] if wanted else self._cached(node, args, kwargs, [])
        flops = [b.backward_flops - a.backward_flops for a, b in itertools.pairwise(runs)]
        working = [b.backward_bytes - a.backward_bytes for a, b in itertools.pairwise(runs)]
        terms = tuple(zip(wanted, flops, strict=True)) if last.backward_flops else ()
        return Profile(last.forward_flops, last.forward_bytes, terms, tuple(zip(wanted, working, strict=True)))

    def _cached(self, node: fx.Node, args: Any, kwargs: Any, wanted: Sequence[int]) -> _Run:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = (node.target, spec, tuple(wanted), *map(_signature, leaves))
        if key not in self._known:
            try:
                self._known[key] = self._run(node, leaves, spec, wanted)
            except Exception:
                self._known[key] = _Run()
        return self._known[key]

    def _run(self, node: fx.Node, leaves: list[Any], spec: Any, wanted: Sequence[int]) -> _Run:
        fresh = [_fresh(leaf, index in wanted) for index, leaf in enumerate(leaves)]
        # what is written in place must not be a leaf of autograd
        given = [_copied(leaf) for leaf in fresh] if _writes(node) else fresh
        args, kwargs = pytree.tree_unflatten(given, spec)
        with flop_counter() as counter, PeakMemory() as memory:
            result = self._call(node, args, kwargs)
            forward, working = counter.get_total_flops(), memory.peak - memory.now
            ends = [leaf for leaf in pytree.tree_leaves(result) if _has_grad(leaf)]
            if not ends:
                return _Run(forward, working)
            del result, args, kwargs, given
            held = memory.forget()
            try:
                _backward(ends, [fresh[index] for index in wanted])
            except Exception:  # each gradient costs about as much as the result
                return _Run(forward, working, forward * len(wanted), sum(map(_num_bytes, ends)))
            return _Run(forward, working, counter.get_total_flops() - forward, memory.peak - held)


def keyed(node: fx.Node, operation: Any) -> Any:
    """The operation as training runs it: with its random numbers keyed (see `insert_heads`), where that differs."""
    if not draws(node):
        return operation
    drawing, _ = called(node)
    if drawing is not node.target:
        return operation  # under an autocast of its own: measured as the model runs it
    if node.target is aten.dropout.default:
        return lambda x, p, *_, **__: masked(x, p, draw_mask(x, p))
    if node.target is aten.scaled_dot_product_attention.default:
        return lambda query, *args, **kwargs: (
            Randomness(0).attention(node.name, query, *args, **kwargs)
            if query.device.type == "cpu"
            else operation(query, *args, **kwargs)
        )
    return operation


def _storages(value: Any) -> dict[int, torch.UntypedStorage]:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return {int(tensor.untyped_storage()._cdata): tensor.untyped_storage() for tensor in tensors}


def _backward(ends: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
    end = _Ends.apply(*ends)  # type: ignore[no-untyped-call]
    torch.autograd.grad(end, wanted, allow_unused=True)


class _Ends(torch.autograd.Function):
    """Gives every end a gradient that lives no longer than autograd needs it, as in a real backward."""

    @staticmethod
    def forward(ctx: Any, *ends: torch.Tensor) -> torch.Tensor:
        ctx.specs = [(end.shape, end.dtype, end.device) for end in ends]
        return ends[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return tuple(torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.specs)


def _writes(node: fx.Node) -> bool:
    schema = getattr(called(node)[0], "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    known = leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device))
    return (type(leaf), leaf) if known else id(leaf)


def _fresh(leaf: Any, wanted: bool) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device).requires_grad_(wanted)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if _has_grad(leaf) else leaf


def _has_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
