"""What a captured graph did against what the model did: structure, values, gradients, buffers. Differences are text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

Tensor = torch.Tensor

_FLOOR = 1e-5
"""Of the largest gradient: what a parameter whose gradient is zero in theory (a bias before BatchNorm) may have."""


def output_difference(expected: Any, found: Any) -> str | None:
    """None where both have the same structure, types, shapes and dtypes, and values as close as rounding explains."""
    a, spec = _flatten(expected)
    b, other = _flatten(found)
    if spec != other:
        return f"it returns {_form(found)}, the model {_form(expected)}"
    for (path, x), (_, y) in zip(a, b, strict=True):
        if difference := leaf_difference(x, y):
            return f"output {path or 0}: {difference}"
    return None


def _flatten(output: Any) -> tuple[list[tuple[str, Any]], Any]:
    """(path, leaf) pairs; paths are numbers where a class of the user's was registered without names for its parts."""
    try:
        leaves, spec = pytree.tree_flatten_with_path(output)
        return [(pytree.keystr(path), leaf) for path, leaf in leaves], spec
    except ValueError:
        plain, spec = pytree.tree_flatten(output)
        return [(str(index), leaf) for index, leaf in enumerate(plain)], spec


def leaf_difference(x: Any, y: Any) -> str | None:
    """None where two leaves are alike: tensors in shape, dtype, device and, up to rounding, values."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        try:
            torch.testing.assert_close(y, x, equal_nan=True)
        except AssertionError as error:
            return " ".join(str(error).split())
        return None
    same = type(x) is type(y) and (x is y or bool(x == y) or x != x)
    return None if same else f"{_short(y)} instead of {_short(x)}"


def buffer_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first buffer that has another value afterwards; one that is made or resized in the forward is a cache."""
    for name, x in expected.items():
        y = found.get(name)
        if y is not None and x.shape == y.shape and (difference := leaf_difference(x, y)):
            return f"buffer {name!r} after the forward: {difference}"
    return None


def gradient_errors(expected: Mapping[str, Tensor | None], found: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Relative errors of the gradients that are wrong, by parameter: |found - expected| / |expected|, inf where the
    expected one is zero.

    Compared in norm, parameter by parameter: single elements may cancel to nothing, and another order of additions then
    changes them altogether. Half of the digits of the dtype must be right (float32: 1.4e-3), since rounding grows on
    its way through many layers, while a lost backward, hook or detach changes gradients by their own size.
    """
    differing = {name: (x, found.get(name)) for name, x in expected.items() if not _same(x, found.get(name))}
    largest = max(map(_size, expected.values()), default=0.0) if differing else 0.0  # most models agree to the last bit
    errors = {}
    for name, (x, y) in differing.items():
        some = x if x is not None else y
        assert some is not None
        off, size = _rms(_minus(x, y, some)), _size(x)
        tolerance = 4 * math.sqrt(torch.finfo(some.dtype).eps)
        if not off <= tolerance * size + min(tolerance, _FLOOR) * largest:
            errors[name] = off / size if size else math.inf
    return errors


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.layout == y.layout == torch.strided and x.dtype == y.dtype and torch.equal(x, y)


def _form(output: Any) -> str:
    """How an output nests, without its values."""
    spec = pytree.tree_structure(output)
    if spec.is_leaf():
        return _short(output)
    keys = f" with {', '.join(map(str, spec.context))}" if isinstance(spec.context, Sequence) and spec.context else ""
    inner = ", ".join(str(child.type.__name__) for child in spec.children() if child.type is not None)
    return f"{type(output).__name__} of {spec.num_children}{keys}{f', in it {inner}' if inner else ''}"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    text = repr(value)
    return text if len(text) <= 80 else type(value).__name__


def _minus(x: Tensor | None, y: Tensor | None, some: Tensor) -> Tensor:
    """x - y, zero where both are NaN or the same infinity; no gradient at all counts as zero."""
    a, b = (_dense(t) if t is not None else torch.zeros_like(_dense(some)) for t in (x, y))
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0, a - b)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _size(gradient: Tensor | None) -> float:
    """Of what is finite: one NaN must not hide the others."""
    return _rms(_dense(gradient).nan_to_num(0, 0, 0)) if gradient is not None else 0.0


def _rms(dense: Tensor) -> float:
    return float(torch.linalg.vector_norm(dense, dtype=_wide(dense))) / math.sqrt(max(1, dense.numel()))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
