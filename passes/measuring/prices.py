"""What all operations cost at a charge, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autodecouple.passes.measuring.charges import Charge
from autodecouple.passes.measuring.columns import columns


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
