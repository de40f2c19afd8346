"""Downstream: every stage is trained by what follows it, in small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from autodecouple.errors import InputError
from autodecouple.objectives.heads import check_choice, check_positive
from autodecouple.plans import TensorSpec


@dataclass(frozen=True)
class Downstream:
    """The task's own loss, on the model's own output layers, behind a few blocks like those that follow the cut.

        stage --+-- adapter --> block 5' --> adapter --> block 9' --> output layers' --> criterion
                +-- detach --> block 3 --> block 4 --> block 5 --> ... --> block 9 --> output layers

    The compiler makes the head out of the captured model: copies, with weights of their own, of some of the blocks
    behind the cut; then of all that stands behind the last block. Where shapes differ an adapter pools or repeats
    positions and maps channels linearly. Nothing is asked of the target but that the criterion takes it: classes, dense
    labels, tokens, numbers.

    blocks:   of a head behind the model's beginning; of a later one fewer, max(1, round(blocks (1 - r) + r)) with r
              half the share of the model's blocks in front of the cut, and never more than follow
    budget:   most FLOPs of a head, as a share of an average stage's, or of a quarter of the model where there are more
              than four stages; blocks are left out until it is kept or one is left. None: no limit
    weights:  "copied": as the model's own are. With all blocks the stages then train as backprop trains the model,
              step by step: every head stays what follows its cut. "fresh": rows and columns of the model's weights in
              random order, so that their scale and orthogonality are kept
    sampling: "fitting": of as many blocks, those after which the fewest adapters are needed, so that resolution and
              channels change by the blocks that do that in the model, and of such those nearest to equal distances;
              "even": at equal distances, whatever adapters that takes

    Source: AugLocal (ICLR 2024), which makes such heads by hand, for networks of residual blocks. Why these defaults:
    see benchmarks/accuracy. With fresh weights no head learns what the next stage is about to, and later stages lag:
    the four of a Transformer on IMDB reached 67 %, with copied ones and larger heads 76 % (backprop: 76 %).
    """

    name: ClassVar[str] = "downstream"
    encodes: ClassVar[bool] = False
    needs_classes: ClassVar[bool] = False
    needs_graph: ClassVar[bool] = True

    blocks: int = 2
    budget: float | None = 2.0
    weights: str = "copied"
    sampling: str = "fitting"

    def __post_init__(self) -> None:
        check_positive(blocks=self.blocks, budget=self.budget)
        check_choice("weights", self.weights, ("fresh", "copied"))
        check_choice("sampling", self.sampling, ("fitting", "even"))

    def count(self, position: float, remaining: int) -> int:
        """How many blocks a head has: position is the share of the model's blocks in front of the cut."""
        narrowing = position / 2
        return min(remaining, max(1, round(self.blocks * (1 - narrowing) + narrowing)))

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """Raises InputError: without the captured model there is nothing to make the head of."""
        raise InputError(
            "the heads of 'downstream' are made of the captured model: let compile(loss=\"downstream\") make them"
        )


def sampled(count: int, remaining: int) -> tuple[int, ...]:
    """Which of the remaining blocks a head of `count` has: at equal distances, the last one among them."""
    return tuple(-(-(index + 1) * remaining // count) - 1 for index in range(count))
