"""Recurrent layers stay one node while a model is captured.

torch.export would trace an LSTM's shapes step by step, which takes minutes for long sequences; its result has a known
shape. Within `shape_only()` the recurrent operators give a tensor of that shape and compute nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

aten = torch.ops.aten
Tensor = torch.Tensor

_KEYS = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)


@contextlib.contextmanager
def shape_only() -> Iterator[None]:
    """Replace the decompositions of the recurrent operators for a while."""
    kernels: dict[Any, Any] = {
        aten.lstm.input: _lstm,
        aten.gru.input: _recurrent,
        aten.rnn_tanh.input: _recurrent,
        aten.rnn_relu.input: _recurrent,
    }
    before = {operator: dict(operator.py_kernels) for operator in kernels}
    try:
        for operator, kernel in kernels.items():
            operator.py_kernels.update(dict.fromkeys(_KEYS, kernel))
            operator._dispatch_cache.clear()
        yield
    finally:
        for operator, saved in before.items():
            operator.py_kernels.clear()
            operator.py_kernels.update(saved)
            operator._dispatch_cache.clear()


def _lstm(x: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(N, T, I) or (T, N, I) -> the same with I replaced, and the last hidden and cell state."""
    link = _link(x, *hx, *params)
    return _sequence(x, hx[0], options) + link, torch.empty_like(hx[0]) + link, torch.empty_like(hx[1]) + link


def _recurrent(x: Tensor, hx: Tensor, params: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    link = _link(x, hx, *params)
    return _sequence(x, hx, options) + link, torch.empty_like(hx) + link


def _sequence(x: Tensor, hidden: Tensor, options: Sequence[Any]) -> Tensor:
    """options: has_biases, num_layers, dropout, train, bidirectional, batch_first."""
    directions = 2 if options[4] else 1
    return x.new_empty((*x.shape[:-1], directions * hidden.shape[-1]))


def _link(*sources: Tensor) -> Tensor:
    """A zero that needs a gradient if a source does."""
    return sum((s.reshape(-1)[:1].sum() * 0 for s in sources if s.requires_grad), sources[0].new_zeros(()))
