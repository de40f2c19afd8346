"""The task loss on the last stage's output, as the head of the last stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autodecouple.errors import InputError


class Criterion(nn.Module):
    """Puts the flat outputs back into the model's own structure and compares them with the target.

    criterion: callable (output, target) -> scalar; None is cross-entropy on the logits, that is on the output itself
               or on its entry `logits`, or else its only floating point tensor: (N, C) with a target (N,), (N, T, V)
               with tokens (N, T), (N, C, H, W) with (N, H, W)
    constants: the flat outputs, by position, that the model does not compute: None, numbers, ...
    """

    def __init__(
        self,
        criterion: Callable[[Any, Any], torch.Tensor] | None,
        out_spec: Any,
        constants: Mapping[int, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.own = criterion is not None
        self.criterion: Callable[[Any, Any], torch.Tensor] = (
            criterion if criterion is not None else nn.CrossEntropyLoss()
        )
        self.out_spec = out_spec
        self.constants = dict(constants)

    def forward(self, *outputs_and_target: Any) -> tuple[torch.Tensor, Any]:
        *computed, target = outputs_and_target
        return self.compare(self.unflatten(computed), target), target

    def unflatten(self, computed: Iterable[Any]) -> Any:
        """The model's output in its own structure, from the tensors that it computes."""
        found, count = iter(computed), self.out_spec.num_leaves
        leaves = [self.constants[i] if i in self.constants else next(found) for i in range(count)]
        return pytree.tree_unflatten(leaves, self.out_spec)

    def compare(self, output: Any, target: Any) -> torch.Tensor:
        """The loss; raises InputError if that is no scalar."""
        loss = self.criterion(output, target) if self.own else self.criterion(_classes_second(output, target), target)
        if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
            raise InputError(f"the criterion must return a scalar tensor, but returned {_describe(loss)}")
        return loss


def _classes_second(output: Any, target: Any) -> torch.Tensor:
    """The logits as cross-entropy wants them: classes in dimension 1, also of tokens (N, T, V)."""
    logits = logits_of(output)
    tokens = isinstance(target, torch.Tensor) and target.ndim == 2 and target.shape == logits.shape[:2]
    return logits.transpose(1, 2) if tokens and logits.ndim == 3 else logits


def logits_of(output: Any) -> torch.Tensor:
    """The output itself, its entry `logits`, or its only floating point tensor; else an InputError."""
    named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(named, torch.Tensor):
        return named
    floats = [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if len(floats) != 1:
        raise InputError(
            f"the model returns {len(floats)} floating point tensors and none is called logits: pass"
            " criterion=lambda output, target: ... that says which to compare"
        )
    return floats[0]


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
