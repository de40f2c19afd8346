"""Operators whose body is the user's own branch or loop: `torch.cond`, `map`, `scan`, `while_loop`.

Each stays one operation, and runs as the plain Python that it stands for: torch's own kernels trace the body at every
call, which two threads cannot do at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._higher_order_ops.cond import cond_op
from torch._higher_order_ops.map import map_impl
from torch._higher_order_ops.scan import scan_op
from torch._higher_order_ops.while_loop import while_loop_op

Body = Callable[..., Sequence[Any]]


class Branches(nn.Module):
    """Runs such an operator on its arguments, the bodies among them; any other operator as it is."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, *args: Any) -> Any:
        return _RUN.get(self.operation, self.operation)(*args)

    def extra_repr(self) -> str:
        return str(self.operation)


class _Linked(torch.autograd.Function):
    """A value to whose backward every operand belongs: those that the branch does not use get zeros, as in torch."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *operands: Tensor) -> Tensor:
        ctx.forms = [(operand.shape, operand.dtype, operand.device) for operand in operands]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.forms)


def _cond(predicate: Any, yes: Body, no: Body, operands: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(predicate, Tensor) and detect_fake_mode(predicate) is not None:  # it has no value: both branches run
        return tuple(_either(predicate, a, b) for a, b in zip(yes(*operands), no(*operands), strict=True))
    trained = [operand for operand in operands if isinstance(operand, Tensor) and operand.requires_grad]
    return tuple(_link(value, trained) for value in (yes if predicate else no)(*operands))


def _either(predicate: Tensor, a: Any, b: Any) -> Any:
    return torch.where(predicate, a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a


def _link(value: Any, operands: Sequence[Tensor]) -> Any:
    if not operands or not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return _Linked.apply(value, *operands)  # type: ignore[no-untyped-call]


def _map(body: Body, inputs: Sequence[Tensor], operands: Sequence[Any]) -> tuple[Any, ...]:
    rows = [body(*(x[i] for x in inputs), *operands) for i in range(len(inputs[0]))]
    return tuple(torch.stack(results) for results in zip(*rows, strict=True))


def _scan(body: Body, first: Sequence[Any], inputs: Sequence[Tensor], operands: Sequence[Any]) -> tuple[Any, ...]:
    carried, rows = list(first), []
    for i in range(len(inputs[0])):
        results = list(body(*carried, *(x[i] for x in inputs), *operands))
        carried, made = results[: len(first)], results[len(first) :]
        rows.append(made)
    return (*carried, *(torch.stack(results) for results in zip(*rows, strict=True)))


def _while(condition: Any, body: Body, carried: Sequence[Any], operands: Sequence[Any]) -> tuple[Any, ...]:
    if detect_fake_mode([*carried, *operands]) is not None:  # nobody knows how often: once
        return tuple(body(*carried, *operands))
    while _truth(condition(*carried, *operands)):
        carried = body(*carried, *operands)
    return tuple(carried)


def _truth(value: Any) -> bool:
    return bool(value[0] if isinstance(value, (tuple, list)) else value)


_RUN: dict[Any, Callable[..., Any]] = {cond_op: _cond, map_impl: _map, scan_op: _scan, while_loop_op: _while}
