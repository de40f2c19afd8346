"""An operation that the model called under autocast is called under the same autocast, wherever it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from autodecouple.passes.capturing.vmaps import call_whole

Autocast = tuple[torch.device | str, torch.dtype, bool]
"""Device, dtype and whether enabled; a torch.device is that of the operation, and follows its stage."""


def under_autocast(
    device: torch.device | str, dtype: torch.dtype, enabled: bool, operation: Any, /, *args: Any, **kwargs: Any
) -> Any:
    """Call an operation as the model called it: under this autocast, whatever surrounds the caller.

    operation: an operator, or the name of a method of the first argument. Casts are made anew for each call: the
    gradients of a weight that is used twice in one region meet in the weight's own type, not in the region's.
    """
    kind = device.type if isinstance(device, torch.device) else device
    with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
        if isinstance(operation, str):
            return getattr(args[0], operation)(*args[1:], **kwargs)
        return operation(*args, **kwargs)


def called(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """What a node calls, and its positional arguments; `under_autocast` and `call_whole` are looked through.

    An operator, the name of a method or module, or the node of what stays whole.
    """
    if node.target is under_autocast:
        return node.args[3], node.args[4:]
    return (node.args[0], node.args[1:]) if node.target is call_whole else (node.target, node.args)


def call_method(node: fx.Node, method: str, args: Sequence[Any]) -> None:
    """Let a node call a method of the first argument instead, under the autocast that it has."""
    if node.target is under_autocast:
        node.args = (*node.args[:3], method, *args)
    else:
        node.op, node.target, node.args = "call_method", method, tuple(args)


def autocast_of(node: fx.Node, regions: Mapping[str, tuple[torch.dtype, bool]]) -> Autocast | None:
    """The autocast under which an operation must be called, None where none acts on it.

    regions: (dtype, enabled) of the innermost autocast of each device type. One for another device type than the
    operands' waits, by its name, for the stage to be placed there.
    """
    if not regions or not _may_cast(node.target):
        return None
    values = pytree.tree_leaves([operand.meta.get("val") for operand in node.all_input_nodes])
    kinds = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    for kind, (dtype, enabled) in regions.items():
        if kind in kinds:
            return torch.device(kind), dtype, enabled
    return next(((kind, dtype, True) for kind, (dtype, enabled) in regions.items() if enabled), None)


UNTOUCHED = frozenset(("batch_norm", "instance_norm", "dropout", "feature_dropout", "alpha_dropout"))
"""Composite operators whose parts no autocast acts on, and which other passes must recognise."""


def _may_cast(target: Any) -> bool:
    """Whether an autocast, on a processor or GPU, may act on an operator: by a kernel of its own, or on a part."""
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    name = target.name()
    if any(torch._C._dispatch_has_kernel_for_dispatch_key(name, f"Autocast{kind}") for kind in ("CPU", "CUDA")):
        return True
    views = any(result.alias_info is not None for result in target._schema.returns)
    return is_composite(target) and not views and target._opname not in UNTOUCHED


def is_composite(target: OpOverload) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd"))
