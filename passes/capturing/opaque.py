"""An operator that stands for a whole module where nothing can run: during export and on fake tensors.

`torch.ops.autodecouple.leaf(uses, inputs, sizes, key)` gives tensors as they were seen to come out of one call of the
module: `uses` are its parameters and buffers, `sizes` its integer inputs, `key` says which call. It never computes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Size:
    """How a size of an output follows from the sizes of the inputs: product * factor // divisor + offset.

    among: positions of the sizes that are multiplied; none for a constant
    """

    among: tuple[int, ...] = ()
    factor: int = 1
    divisor: int = 1
    offset: int = 0

    def of(self, sizes: Sequence[Any]) -> Any:
        if not self.among:
            return self.offset
        value = math.prod(sizes[i] for i in self.among)
        value = value * self.factor if self.factor != 1 else value
        value = value // self.divisor if self.divisor != 1 else value
        return value + self.offset if self.offset else value


@dataclass(frozen=True)
class Made:
    """A tensor that comes out of a module.

    source: index of the input tensor whose memory it shares, None for memory of its own
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    source: int | None = None


@dataclass(frozen=True, eq=False)
class Sight:
    """What one call of a module was seen to do, as far as a graph must know it.

    in_spec:  how its (args, kwargs) nest
    outputs:  the flat leaves of what it returned: Made for tensors, the value itself for constants
    out_spec: how they nest
    draws:    whether it drew from torch's default generator
    writes:   indices of the input tensors that it wrote into
    carrying: of those that carried a gradient
    forward_flops, backward_flops: at the example batch; the backward's for its parameters, and for its inputs
    key:      its number, unique in the process
    """

    in_spec: Any
    outputs: tuple[Any, ...]
    out_spec: Any
    draws: bool = False
    writes: tuple[int, ...] = ()
    carrying: tuple[int, ...] = ()
    forward_flops: int = 0
    backward_flops: tuple[int, int] = (0, 0)
    key: int = dataclasses.field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        _sights[self.key] = self

    @property
    def made(self) -> list[Made]:
        return [leaf for leaf in self.outputs if isinstance(leaf, Made)]


_sights: weakref.WeakValueDictionary[int, Sight] = weakref.WeakValueDictionary()

_library = torch.library.Library("autodecouple", "DEF")
_library.define("leaf(Tensor[] uses, Tensor[] inputs, SymInt[] sizes, int key) -> Tensor[]")
_library.define("leaf_backward(Tensor[] wanted, bool own, bool inputs, int key) -> Tensor[]")

leaf = torch.ops.autodecouple.leaf.default


def _leaf(uses: Sequence[Tensor], inputs: Sequence[Tensor], sizes: Sequence[Any], key: int) -> list[Tensor]:
    known = [*(size for tensor in inputs for size in tensor.shape), *sizes]
    made = [(m, [size.of(known) for size in m.shape]) for m in _sights[key].made]
    return [torch.empty(shape, dtype=m.dtype, device=m.device) for m, shape in made]


def _leaf_backward(wanted: Sequence[Tensor], own: bool, inputs: bool, key: int) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in wanted]


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    uses, tensors, sizes, ctx.key = inputs
    ctx.num_sizes = len(sizes)
    ctx.groups = (list(uses), list(tensors))
    ctx.mark_non_differentiable(*(t for t, m in zip(output, _sights[ctx.key].made, strict=True) if not m.requires_grad))


def _gradients(ctx: Any, grads: Any) -> Any:
    """Gradients of whatever needs one, from one operator whose FLOPs are known."""
    needs = [
        [need and tensor.is_floating_point() for need, tensor in zip(needed, group, strict=True)]
        for needed, group in zip(ctx.needs_input_grad[:2], ctx.groups, strict=True)
    ]
    wanted = [t for need, group in zip(needs, ctx.groups, strict=True) for n, t in zip(need, group, strict=True) if n]
    made = iter(torch.ops.autodecouple.leaf_backward(wanted, any(needs[0]), any(needs[1]), ctx.key))
    uses, inputs = ([next(made) if n else None for n in need] for need in needs)
    return uses, inputs, [None] * ctx.num_sizes, None


torch.library.register_fake("autodecouple::leaf", _leaf, lib=_library)
torch.library.register_fake("autodecouple::leaf_backward", _leaf_backward, lib=_library)
torch.library.register_autograd("autodecouple::leaf", _gradients, setup_context=_remember, lib=_library)
torch.fx.node.has_side_effect(leaf)  # a module whose result nobody uses may still count its calls


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """For torch's FLOP counter: what the calls were seen to cost."""

    def forward(uses: Any, inputs: Any, sizes: Any, key: int, **_: Any) -> int:
        return _sights[key].forward_flops

    def backward(wanted: Any, own: bool, inputs: bool, key: int, **_: Any) -> int:
        of_own, of_inputs = _sights[key].backward_flops
        return of_own * own + of_inputs * inputs

    return {torch.ops.autodecouple.leaf: forward, torch.ops.autodecouple.leaf_backward: backward}
