"""Answers beside the model's own: of the stages' heads, of several at once, and inference that ends early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autodecouple.errors import InputError
from autodecouple.objectives.heads import widen
from autodecouple.passes.divide import Piece
from autodecouple.walk import Walk, way_back

if TYPE_CHECKING:
    from autodecouple.decoupled import Decoupled


@dataclass(frozen=True)
class Adaptive:
    """What adaptive inference found: scores (N, C), and the stage (N,) int64 at whose exit each row left."""

    scores: Tensor
    stages: Tensor


class Exits:
    """The exits of a compiled model, by stage: classifiers beside it, and at the last stage the model's own output.

    Early Exit and DeInfoReg have a classifier at every stage. Of Associated Learning the exit is the bridge of the
    stage, then the decoders back to the first: at its last stage the inference of the paper, before it the shortcut.
    SupCon has none. Everything here is in evaluation mode and without gradients, of the weights as they are after all
    batches so far; inputs are a tensor, a tuple of positional inputs or a dict of keyword inputs. Scores are (N, C),
    (N, T, C) or (N, C, H, W), at the positions that the stage has.
    """

    def __init__(self, decoupled: Decoupled) -> None:
        self._decoupled = decoupled

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that have an exit; the last one always has."""
        if self._decoupled._pieces is None:
            return ()
        return tuple(stage for stage in range(len(self._decoupled.stages)) if self._why_not(stage) is None)

    def predict(self, inputs: Any, stage: int) -> Tensor:
        """The scores at one exit; what lies behind its stage is not computed.

        Raises InputError for a stage without an exit, saying why it has none.
        """
        self._check([stage])
        walk = self._walk(inputs)
        for _ in range(stage + 1):
            walk.advance()
        return walk.scores()

    def all(self, inputs: Any) -> dict[int, Tensor]:
        """The scores at every exit, by stage."""
        walk, stages, found = self._walk(inputs), self.stages, {}
        for stage in range(len(walk.pieces)):
            walk.advance()
            if stage in stages:
                found[stage] = walk.scores()
        return found

    def ensemble(self, inputs: Any, stages: Sequence[int] | None = None) -> Tensor:
        """Logarithms of the mean of the probabilities at these exits; None is all of them."""
        found = self.all(inputs)
        chosen = tuple(found if stages is None else stages)
        self._check(chosen)
        if not chosen:
            raise InputError(f"stages is empty; name at least one of the exits {', '.join(map(str, found))}")
        scores = [found[stage].to(found[chosen[-1]].device) for stage in chosen]
        if len({tuple(each.shape) for each in scores}) > 1:
            raise InputError(
                f"the exits give scores {', '.join(str(tuple(s.shape)) for s in scores)}: no mean of these"
            )
        logs = torch.stack([each.log_softmax(-1 if each.ndim == 3 else 1) for each in scores])
        return logs.logsumexp(0) - math.log(len(scores))

    def adaptive(self, inputs: Any, *, threshold: float = 0.8, patience: int = 1) -> Adaptive:
        """Inference that ends, for every row by itself, where successive exits agree; done rows are not computed on.

        Two exits agree on a row when they give the same class and the cosine of their scores is above `threshold`. A
        row leaves after `patience` agreements in a row, at the latest with the model's own output. A batch gives what
        its rows alone would. Rows stay, and are computed on for nothing, where what crosses a cut has no rows of its
        own. Waits for the device at every exit.

        Source: DeInfoReg, whose released code takes the classes of the whole batch together, so that it holds for one
        row only. Raises InputError where an exit gives no scores (N, C).
        """
        if not -1 <= threshold <= 1 or patience < 1:
            raise InputError(f"threshold={threshold!r} must lie within -1 and 1, patience={patience!r} be 1 or more")
        walk, stages = self._walk(inputs), self.stages
        chooser = _Chooser(walk.num_rows, threshold, patience)
        for stage in range(len(walk.pieces)):
            walk.advance()
            if stage not in stages:
                continue
            scores = walk.scores()
            if scores.ndim != 2:
                given = tuple(scores.shape)
                raise InputError(f"the exit of stage {stage} gives scores {given}, not (N, C): rows cannot leave alone")
            chooser.see(stage, scores, is_last=stage == len(walk.pieces) - 1)
            if chooser.is_done:
                break
            if walk.piece.rows_may_leave:
                walk.keep(chooser.stay())
        return chooser.result()

    # ---------------------------------------------------------------- which, and how

    @property
    def _pieces(self) -> tuple[Piece, ...]:
        """The evaluation mode in pieces; raises InputError where there is none."""
        pieces = self._decoupled._pieces
        if pieces is None:
            raise InputError(
                "the model's evaluation mode could not be captured, or not be cut where the training mode is: there is"
                " no inference beside decoupled(x)"
            )
        return pieces

    def _walk(self, inputs: Any) -> Walk:
        self._decoupled._gather()
        return Walk(self._decoupled._compiled, self._pieces, inputs)

    def _check(self, stages: Sequence[int]) -> None:
        count, has = len(self._pieces), ", ".join(map(str, self.stages))
        for stage in stages:
            if not isinstance(stage, int) or not 0 <= stage < count:
                raise InputError(f"there is no stage {stage!r}; exits are at the stages {has}")
            if why := self._why_not(stage):
                raise InputError(f"stage {stage} has no exit, since {why}; exits are at the stages {has}")

    def _why_not(self, stage: int) -> str | None:
        """Why a stage has no exit, None if it has one."""
        pipeline = self._decoupled._compiled
        if stage == len(pipeline.plan.cuts):
            return None
        for encoder in way_back(pipeline, stage):
            if not getattr(pipeline.codes[encoder].head, "predicts", False):
                return f"its loss {pipeline.plan.stages[encoder].objective!r} has no classifier"
        if self._pieces[stage].features is None:
            return "the evaluation mode computes something else than what its head reads"
        return None


class _Chooser:
    """Takes every row's scores at the exit where it leaves.

    rows:   (R,) the rows of the batch that are still computed on; is_open: (R,) those of them that have not left
    streak: (R,) how often successive exits have agreed
    """

    def __init__(self, num_rows: int, threshold: float, patience: int) -> None:
        self.threshold = threshold
        self.patience = patience
        self.rows = torch.arange(num_rows)
        self.is_open = torch.ones(num_rows, dtype=torch.bool)
        self.streak = torch.zeros(num_rows, dtype=torch.int64)
        self.before: Tensor | None = None
        self.scores: Tensor | None = None
        self.stages = torch.full((num_rows,), -1)

    def see(self, stage: int, scores: Tensor, is_last: bool) -> None:
        """Let rows leave with these scores (R, C), one for each row that is still computed on."""
        scores = widen(scores)
        if self.scores is None or self.before is None:
            self.scores = scores.new_zeros(len(self.stages), scores.shape[1])
        else:
            self.streak = torch.where(self._agree(self.before, scores).cpu(), self.streak + 1, 0)
        leaving = self.is_open & (is_last | (self.streak >= self.patience))
        self.scores = self.scores.to(scores.device)
        self.scores[self.rows[leaving]] = scores[leaving]
        self.stages[self.rows[leaving]] = stage
        self.is_open = self.is_open & ~leaving
        self.before = scores

    def _agree(self, before: Tensor, scores: Tensor) -> Tensor:
        before = before.to(scores.device)
        return (before.argmax(1) == scores.argmax(1)) & (F.cosine_similarity(before, scores) > self.threshold)

    @property
    def is_done(self) -> bool:
        return not bool(self.is_open.any())

    def stay(self) -> Tensor:
        """(S,) which of the rows go on; the others are forgotten."""
        stay = self.is_open.nonzero()[:, 0]
        self.rows, self.streak, self.is_open = self.rows[stay], self.streak[stay], self.is_open[stay]
        self.before = self.before[stay] if self.before is not None else None
        return stay

    def result(self) -> Adaptive:
        assert self.scores is not None
        return Adaptive(self.scores, self.stages)
