"""What calls of some modules do in real runs of the model: how large their outputs are, what they draw, write and cost.

The model runs on the example and on a few batches of other sizes, so that it shows which sizes follow which.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autodecouple.passes.capturing.opaque import Made, Sight, Size
from autodecouple.passes.capturing.surroundings import called_instead
from autodecouple.passes.measuring.flops import flop_counter
from autodecouple.passes.verifying.snapshot import preserved, seeded

Tensor = torch.Tensor
Call = tuple[tuple[Any, ...], dict[str, Any]]

CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
"""Values, other than tensors, that may go into a module or come out of it."""


class OpaqueError(Exception):
    """A module cannot stand in a graph as one operation."""


@dataclass(frozen=True)
class _Tensor:
    """One that came out: `source` is the position, among what the module uses and takes, whose memory it shares."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    source: int | None


@dataclass(frozen=True)
class _Seen:
    """One call in one run; `sizes` are those of the tensors that went in, then the integers."""

    in_spec: Any
    sizes: tuple[int, ...]
    constants: tuple[Any, ...]
    outputs: tuple[Any, ...]
    out_spec: Any
    draws: bool
    writes: tuple[int, ...]
    carrying: tuple[int, ...]
    forward_flops: int
    backward_flops: tuple[int, int]


def observe(model: nn.Module, paths: Sequence[str], batches: Sequence[Call]) -> dict[str, tuple[Sight, ...] | str]:
    """For every module what each of its calls does, in order, or why it cannot stand in a graph as one operation.

    batches: the example first. What the model raises on it passes through; other sizes that it refuses are left out.
    """
    runs = [_run(model, paths, batches[0])]
    for batch in batches[1:]:
        with contextlib.suppress(Exception):
            runs.append(_run(model, paths, batch))
    found: dict[str, tuple[Sight, ...] | str] = {}
    for path in paths:
        try:
            found[path] = _sights([run[path] for run in runs])
        except OpaqueError as error:
            found[path] = str(error)
    return found


def uses_of(module: nn.Module) -> list[Tensor]:
    """All that a module holds, each once: parameters, then buffers."""
    return [*module.parameters(), *module.buffers()]


def _run(model: nn.Module, paths: Sequence[str], batch: Call) -> dict[str, list[_Seen | OpaqueError]]:
    seen: dict[str, list[_Seen | OpaqueError]] = {path: [] for path in paths}
    args, kwargs = pytree.tree_map_only(Tensor, _copy, batch)
    with preserved(model), torch.enable_grad(), seeded(), contextlib.ExitStack() as stack:
        for path, calls in seen.items():
            module = model.get_submodule(path)
            stack.enter_context(called_instead(module, functools.partial(_watch, module, calls)))
        model(*args, **kwargs)
    return seen


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _watch(module: nn.Module, calls: list[_Seen | OpaqueError], *args: Any, **kwargs: Any) -> Any:
    """Call the module, and note what it did."""
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        calls.append(OpaqueError("it is called inside a transform of torch.func"))
        return module._call_impl(*args, **kwargs)
    versions, random = [t._version for t in tensors], _random(tensors)
    with flop_counter() as counter:
        result = module._call_impl(*args, **kwargs)
    flops = counter.get_total_flops()
    try:
        calls.append(
            _Seen(
                in_spec=in_spec,
                sizes=sizes_of(leaves),
                constants=tuple(_constant(leaf, "takes") for leaf in leaves if not isinstance(leaf, Tensor)),
                outputs=_outputs([*uses_of(module), *tensors], result),
                out_spec=pytree.tree_structure(result),
                draws=not all(map(torch.equal, random, _random(tensors))),
                writes=tuple(i for i, t in enumerate(tensors) if t._version != versions[i]),
                carrying=tuple(i for i, t in enumerate(tensors) if t.requires_grad),
                forward_flops=flops,
                backward_flops=_backward_flops(module, tensors, result, flops),
            )
        )
    except OpaqueError as error:
        calls.append(error)
    return result


def sizes_of(leaves: Sequence[Any]) -> tuple[int, ...]:
    """What the sizes of outputs may follow: those of the tensors that go in, then the integers."""
    shapes = [size for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape]
    return (*shapes, *(leaf for leaf in leaves if is_number(leaf)))


def is_number(leaf: Any) -> bool:
    """Whether an input may follow the batch: an integer that is no flag."""
    return isinstance(leaf, (int, torch.SymInt)) and not isinstance(leaf, bool)


def _constant(leaf: Any, verb: str) -> Any:
    """None for numbers: they may change."""
    if not isinstance(leaf, CONSTANTS):
        raise OpaqueError(f"it {verb} a {type(leaf).__name__}, and only tensors and plain values can travel")
    return None if is_number(leaf) and verb == "takes" else leaf


def _outputs(sources: Sequence[Tensor], result: Any) -> tuple[Any, ...]:
    memory = {_memory(t): index for index, t in reversed(list(enumerate(sources)))}
    return tuple(
        _made(leaf, memory) if isinstance(leaf, Tensor) else _constant(leaf, "returns")
        for leaf in pytree.tree_leaves(result)
    )


def _made(tensor: Tensor, memory: Mapping[int, int]) -> _Tensor:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        raise OpaqueError(f"it returns a {type(tensor).__name__} of another kind ({tensor.layout})")
    source = memory.get(_memory(tensor)) if tensor.numel() else None
    return _Tensor(tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad, source)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else id(tensor)


def _random(tensors: Sequence[Tensor]) -> list[Tensor]:
    """States of the generators that a call on these tensors may draw from."""
    devices = {t.device for t in tensors if t.is_cuda}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in sorted(devices, key=str))]


def _backward_flops(module: nn.Module, tensors: Sequence[Tensor], result: Any, forward: int) -> tuple[int, int]:
    """FLOPs of the gradients of the module's parameters, and what those of its inputs add.

    Where its hooks would notice, or autograd refuses, each takes as much as the forward.
    """
    ends = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
    own = [p for p in module.parameters() if p.requires_grad]
    inputs = [t for t in tensors if t.requires_grad]
    estimate = (forward * bool(own), forward * bool(inputs))
    if not ends or not forward or any(m._backward_hooks or m._backward_pre_hooks for m in module.modules()):
        return estimate if ends else (0, 0)
    try:
        alone = _flops_of(ends, own)
        return alone, _flops_of(ends, [*own, *inputs]) - alone
    except Exception:
        return estimate


def _flops_of(ends: Sequence[Tensor], wanted: Sequence[Tensor]) -> int:
    if not wanted:
        return 0
    with flop_counter() as counter:
        ones = [torch.ones_like(end) for end in ends]
        torch.autograd.grad(ends, wanted, ones, retain_graph=True, allow_unused=True)
    return int(counter.get_total_flops())


def _sights(runs: Sequence[Sequence[_Seen | OpaqueError]]) -> tuple[Sight, ...]:
    if not runs[0]:
        raise OpaqueError("it is not called in the model's forward")
    if len({len(calls) for calls in runs}) > 1:
        raise OpaqueError("how often it is called depends on the batch")
    return tuple(_sight(calls) for calls in zip(*runs, strict=True))


def _sight(calls: Sequence[_Seen | OpaqueError]) -> Sight:
    """One call, from all runs of it."""
    seen = []
    for call in calls:
        if isinstance(call, OpaqueError):
            raise call
        seen.append(call)
    first, *others = seen
    for other in others:
        if (other.in_spec, other.constants, other.out_spec) != (first.in_spec, first.constants, first.out_spec):
            raise OpaqueError("what it takes or returns, tensors aside, depends on the batch")
    outputs = [_output([call.outputs[i] for call in seen], seen) for i in range(len(first.outputs))]
    return Sight(
        in_spec=first.in_spec,
        outputs=tuple(outputs),
        out_spec=first.out_spec,
        draws=any(call.draws for call in seen),
        writes=tuple(sorted({i for call in seen for i in call.writes})),
        carrying=first.carrying,
        forward_flops=first.forward_flops,
        backward_flops=first.backward_flops,
    )


def _output(values: Sequence[Any], calls: Sequence[_Seen]) -> Any:
    first = values[0]
    if not isinstance(first, _Tensor):
        if any(type(value) is not type(first) or value != first for value in values):
            raise OpaqueError(f"it returns a {type(first).__name__} that depends on the batch")
        return first
    if any(not isinstance(v, _Tensor) or (len(v.shape), v.dtype) != (len(first.shape), first.dtype) for v in values):
        raise OpaqueError("the kind of tensor that it returns depends on the batch")
    shape = tuple(
        size_rule(sizes, [call.sizes for call in calls]) for sizes in zip(*(v.shape for v in values), strict=True)
    )
    return Made(shape, first.dtype, first.device, any(v.requires_grad for v in values), first.source)


def size_rule(values: Sequence[int], known: Sequence[tuple[int, ...]]) -> Size:
    """How a size follows from those that went in, over all runs."""
    if len(set(values)) == 1:
        return Size(offset=values[0])
    columns = list(zip(*known, strict=True)) if len({len(sizes) for sizes in known}) == 1 else []
    if tuple(values) in columns:
        return Size((columns.index(tuple(values)),))
    varying = sorted({column: i for i, column in enumerate(columns) if len(set(column)) > 1}.values())
    for among in (*itertools.combinations(varying, 1), *itertools.combinations(varying, 2)):
        products = [math.prod(sizes[i] for i in among) for sizes in known]
        for rule in _rules(among, values, products):
            if [rule.of(sizes) for sizes in known] == list(values):
                return rule
    raise OpaqueError(f"a size of its output, {values[0]}, depends on the data, not on the sizes of its inputs alone")


def _rules(among: tuple[int, ...], values: Sequence[int], products: Sequence[int]) -> Iterator[Size]:
    """What may explain the first value, and one at another product."""
    v, p = values[0], products[0]
    if v and p:
        yield Size(among, factor=v // p)
        yield Size(among, divisor=p // v or 1)
    yield Size(among, offset=v - p)
    other = next((i for i, product in enumerate(products) if product != p), None)
    if other is not None:
        slope = (values[other] - v) // (products[other] - p)
        yield Size(among, factor=slope, offset=v - slope * p)
