"""What all operations cost at a charge, as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autodecouple.passes.measuring.charges import Charge
from autodecouple.passes.measuring.columns import columns

Tie = str
"""How a cut ties the stages beside it: "detached", "coupled" or "overlapping"."""


@dataclass(frozen=True)
class StagePrices:
    """Costs of a stage's operations, (operations,) each.

    returned: of the backward, what gives what was sent to the stage its gradient, where the stage does that apart from
              its weights: beside a cut that overlaps. Before such a cut that way is taken twice: with the own loss, and
              once more with both for the weights
    """

    forward: Tensor
    backward: Tensor
    returned: Tensor

    @property
    def returning(self) -> float:
        """That part as a share of the whole backward."""
        whole = int(self.backward.sum())
        return int(self.returned.sum()) / whole if whole else 0.0


@dataclass(frozen=True)
class Prices:
    """Costs by operation; positions count the operations of the charge's graph.

    forward:  (operations,)
    backward: (3, n) threshold, position, amount, by position: spent in stages that begin at or before the threshold
    """

    forward: Tensor
    backward: Tensor

    @staticmethod
    def of(charge: Charge) -> Prices:
        """Counted once for a graph: each of its plans asks."""
        updates = tuple(charge.updates.items()) if charge.recompute else ()
        known: dict[Any, Prices] = charge.graph.memo.setdefault("operation prices", {})
        if (charge.recompute, updates) not in known:
            known[charge.recompute, updates] = Prices._counted(charge)
        return known[charge.recompute, updates]

    @staticmethod
    def _counted(charge: Charge) -> Prices:
        amounts = [charge.amount(node.name) for node in charge.graph.operations]
        pairs = ((threshold, at, p) for at, (_, found) in enumerate(amounts) for threshold, p in found if p)
        return Prices(torch.tensor([forward for forward, _ in amounts], dtype=torch.int64), columns(pairs, 3))

    def between(self, start: int, stop: int, begin: int) -> tuple[Tensor, Tensor]:
        """(stop - start,) each: forward and backward of the operations from start to stop, in a stage that begins at
        `begin`; -1 asks for every gradient."""
        low, high = (int(row) for row in torch.searchsorted(self.backward[1].contiguous(), torch.tensor([start, stop])))
        threshold, position, amount = self.backward[:, low:high]
        spent = torch.where(threshold >= begin, amount, 0)
        backward = torch.zeros(stop - start, dtype=torch.int64).index_add_(0, position - start, spent)
        return self.forward[start:stop], backward

    @property
    def inward(self) -> Tensor:
        """(n,) which parts of the backward lead on to what is before: all but the weights' gradients."""
        return self.backward[0] < self.backward[1]

    def stage(self, start: int, stop: int, before: Tie, after: Tie) -> StagePrices:
        """Of the operations from start to stop as a stage between two cuts, or the model's ends, which are detached."""
        returns, twice = before != "detached", after == "overlapping"
        forward, backward = self.between(start, stop, -1 if returns and not twice else start)
        returned = torch.zeros_like(backward)
        if returns and "overlapping" in (before, after):
            within = self.inward & (start <= self.backward[1]) & (self.backward[1] < stop)
            returned.index_add_(0, self.backward[1, within] - start, self.backward[2, within])
        return StagePrices(forward, backward + returned if twice else backward, returned)
