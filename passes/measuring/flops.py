"""torch's FLOP counter, with formulas for the kernels that it does not know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from autodecouple.passes.capturing import opaque

aten = torch.ops.aten


def flop_counter() -> FlopCounterMode:
    """torch's counter (a multiply-add is two), extended to the fused attention and recurrent kernels of the CPU."""
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    counter.mod_tracker = _Whole()  # type: ignore[assignment]
    return counter


class _Whole(contextlib.AbstractContextManager[None]):
    """Counts all as one, where torch's tracker hooks every module to count it apart: no total needs that, and a module
    whose backward calls its parts again, without gradients for their inputs, fails under those hooks."""

    parents = frozenset({"Global"})

    def __exit__(self, *error: object) -> None:
        return None


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
        **opaque.flop_formulas(),
    }
