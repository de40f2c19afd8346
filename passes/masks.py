"""Which of the tensors that cross says what tokens count."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from autodecouple.plans import TensorSpec

aten = torch.ops.aten


def find_mask(features: TensorSpec, others: Iterable[tuple[fx.Node, TensorSpec | None]]) -> tuple[str | None, str]:
    """Among what crosses beside token features (N, T, D): which tensor says what tokens count, and how.

    Meanings: "additive" (0 where a token counts, -inf elsewhere), "keep" (True where it counts), "ignore" (True where
    it is padding). A bool tensor whose meaning neither its name nor its origin tells is left alone.
    """
    if len(features.shape) != 3 or features.batch_dim not in (0, 1):
        return None, "keep"
    rows, tokens = features.shape[features.batch_dim], features.shape[1 - features.batch_dim]
    found: dict[str, str] = {}
    shapes = (rows, tokens), (rows, 1, 1, tokens), (rows, tokens, 1)
    for node, spec in others:
        if spec is not None and spec.batch_dim == 0 and spec.shape in shapes:
            found.setdefault(_meaning(node, spec), node.name)
    for meaning in ("additive", "keep", "ignore"):
        if meaning in found:
            return found[meaning], meaning
    return None, "keep"


def _meaning(node: fx.Node, spec: TensorSpec) -> str:
    if "float" in spec.dtype:
        fills = ("masked_fill", "where")
        return "additive" if any(fill in str(node.target) for fill in fills) or "mask" in node.name else ""
    if node.target is aten.eq.Scalar:
        return "ignore"  # tokens == padding index
    if node.target in (aten.ne.Scalar, aten.gt.Scalar):
        return "keep"
    if "pad" in node.name:
        return "ignore"
    return "keep" if "mask" in node.name else ""
