"""One batch on its way through the stages in evaluation mode, with what their heads say."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autodecouple.objectives.criterion import logits_of
from autodecouple.passes.capturing.bind import bind
from autodecouple.passes.divide import NO_ROWS, Piece, output_values
from autodecouple.passes.inference import to_device
from autodecouple.pipeline import Pipeline, rows_of
from autodecouple.plans import Cut
from autodecouple.states import evaluating


class Walk:
    """Runs piece after piece, without gradients; between two of them scores can be read, and rows can leave.

    num_rows: of the batch, as long as none has left
    """

    def __init__(self, pipeline: Pipeline, pieces: Sequence[Piece], inputs: Any) -> None:
        assert pipeline.graph.evaluation is not None
        self.pipeline = pipeline
        self.pieces = pieces
        self.stage = -1
        leaves = bind(pipeline.graph, inputs)
        self.num_rows = rows_of(pipeline.graph, leaves)
        names = [node.name for node in pipeline.graph.evaluation.graph.find_nodes(op="placeholder")]
        self.values = dict(zip(names, leaves, strict=True))

    @property
    def piece(self) -> Piece:
        """The one that has just run."""
        return self.pieces[self.stage]

    def advance(self) -> None:
        """Run the next piece, on its stage's device."""
        if self.stage >= 0:
            self.values = {name: self.values[name] for name in self.piece.sends}
        self.stage += 1
        device = self.pipeline.stages[self.stage].device
        self.values = pytree.tree_map(lambda value: to_device(value, device), self.values)
        with torch.no_grad():
            made = self.piece.body(self.num_rows, *(self.values[name] for name in self.piece.inputs))
        self.values |= zip(self.piece.outputs, made, strict=True)

    def keep(self, rows: Tensor) -> None:
        """Let all rows but these (R,) leave; what was sent must have rows."""
        self.num_rows = len(rows)
        for name, dims in self.piece.sends.items():
            self.values[name] = pytree.tree_map(lambda value, dim: _select(value, dim, rows), self.values[name], dims)

    def scores(self) -> Tensor:
        """Of the exit behind the piece that has just run: (N, C), (N, T, C) or (N, C, H, W)."""
        if self.stage == len(self.pieces) - 1:
            return logits_of(self._output())
        plan, way = self.pipeline.plan, way_back(self.pipeline, self.stage)
        heads: list[Any] = [self.pipeline.codes[stage].head for stage in way]
        with torch.no_grad(), contextlib.ExitStack() as modes:
            for head in heads:
                modes.enter_context(evaluating(head))
            features, mask = self._read(plan.cuts[self.stage])
            found: Tensor = heads[0].predict(*features, **mask)
            for stage, head in zip(way, heads, strict=True):
                if plan.cuts[stage].encodes:
                    found = head.decode(found.to(self.pipeline.stages[stage].device))
        return found.movedim(-1, 1) if found.ndim > 3 else found

    def _read(self, cut: Cut) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Features and mask as the head at a cut takes them."""
        assert self.piece.features is not None
        features = [self.values[name] for name in self.piece.features]
        if self.piece.mask is None:
            return features, {}
        compare = {"additive": torch.ge, "keep": torch.ne, "ignore": torch.eq}[cut.mask_meaning]
        return features, {"mask": compare(self.values[self.piece.mask].flatten(1), 0)}

    def _output(self) -> Any:
        """The model's own, in its own structure."""
        values, leaves = self.values, output_values(self.pipeline.graph)
        found = [values[leaf.name] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        return pytree.tree_unflatten(found, self.pipeline.graph.evaluation_spec)


def way_back(pipeline: Pipeline, stage: int) -> list[int]:
    """The stages whose heads lead from a stage's features to scores: itself, then those that its signal came from."""
    found, at = [stage], pipeline.plan.signal_source(stage)
    while at is not None:
        found.append(at)
        at = pipeline.plan.signal_source(at)
    return found


def _select(value: Any, dim: int, rows: Tensor) -> Any:
    return value if dim == NO_ROWS else value.index_select(dim, rows.to(value.device))
