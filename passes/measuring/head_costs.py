"""What the heads of one objective cost at every legal cut."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autodecouple.errors import InputError
from autodecouple.objectives.objective import Objective, Signal, at_cut, price_key, read_at
from autodecouple.passes.candidates import Candidate
from autodecouple.passes.measure import HeadCost, head_cost
from autodecouple.passes.measuring.charges import HeadPrice
from autodecouple.passes.measuring.columns import columns
from autodecouple.passes.measuring.stage_memory import HeadMemory


@dataclass(frozen=True)
class HeadRuns:
    """Heads by end and range of starts: a longer stage may have to read more, so a cut may have several rows.

    end, first, last: (rows,) the cut, rising, and the starts from first to last, as in `StageRuns`
    price:            (rows,)
    memory:           (rows,) each
    """

    end: Tensor
    first: Tensor
    last: Tensor
    price: Tensor
    memory: HeadMemory

    def memory_from(self, start: int, first: int, last: int) -> HeadMemory:
        """(ends,) of the stages from one start to each end from first to last."""
        low, high = (int(row) for row in torch.searchsorted(self.end, torch.tensor([first, last + 1])))
        rows = ((self.first[low:high] <= start) & (start <= self.last[low:high])).nonzero()[:, 0] + low
        memory = torch.zeros(3, last - first + 1, dtype=torch.int64)
        memory[:, self.end[rows] - first] = torch.stack([amount[rows] for amount in self.memory.amounts])
        return HeadMemory(*memory)

    def smallest(self, num_ends: int) -> HeadMemory:
        """(ends,) the least of each at every end, 0 where there is no head."""
        least = [
            torch.zeros(num_ends, dtype=torch.int64).scatter_reduce(0, self.end, amount, "amin", include_self=False)
            for amount in self.memory.amounts
        ]
        return HeadMemory(*least)


class HeadCosts:
    """Asks for each head once: heads that read the same shapes cost the same."""

    def __init__(self, legal: Sequence[Candidate], price: HeadPrice = head_cost) -> None:
        self.legal = legal
        self.starts = [0, *(candidate.position + 1 for candidate in legal)]
        self.price = price
        self._known: dict[Any, dict[Any, HeadCost]] = {}  # by the objective's id and signal
        self._asked: tuple[Any, Any, dict[Any, HeadCost]] = (None, None, {})

    def cost(self, end: int, start: int, objective: Objective, signal: Signal) -> HeadCost:
        """Of the objective's head on what it reads at a legal cut, in a stage that begins at a position."""
        if objective.name == "bp":
            return HeadCost(0, 0, 0)
        cut = self.legal[end].cut
        assert cut is not None
        known, features, which = self._known_of(objective, signal), self.legal[end].features(start), None
        if hasattr(objective, "at"):
            objective, cut = at_cut(objective, dataclasses.replace(cut, features=features))
            which = price_key(objective)
        specs = [cut.spec(name) for name in (*features, *cut.sides)]
        key = which, *[(spec.shape, spec.dtype, spec.batch_dim) for spec in specs]
        if key not in known:
            known[key] = self.price(objective, read_at(dataclasses.replace(cut, features=features)), signal)
        return known[key]

    def _known_of(self, objective: Objective, signal: Signal) -> dict[Any, HeadCost]:
        """The heads counted so far. Every cut asks, mostly for the same as the one before: no need to look it up."""
        if self._asked[0] is not objective or self._asked[1] is not signal:
            self._asked = objective, signal, self._known.setdefault((id(objective), signal), {})
        return self._asked[2]

    def runs(self, objective: Objective, signal: Signal) -> HeadRuns:
        """The heads at every legal cut but those that the objective refuses; its InputError where these are all."""
        refused: list[InputError] = []
        rows = (row for end in range(len(self.legal)) for row in self._rows(end, objective, signal, refused))
        end, first, last, price, *memory = columns(rows, 7)
        if refused and not len(end):
            raise refused[0]
        return HeadRuns(end, first, last, price, HeadMemory(*memory))

    def _rows(
        self, end: int, objective: Objective, signal: Signal, refused: list[InputError]
    ) -> Iterator[tuple[int, ...]]:
        """A head reads more, the earlier its stage begins: at or before each of the thresholds of what it may read."""
        reads, last = self.legal[end].reads, end
        more = {threshold for _, threshold in reads[1:] if threshold >= 0}
        thresholds = sorted(more, reverse=True) if more else ()
        for start, following in zip((2**62, *thresholds), (*thresholds, -1), strict=True):
            first = bisect_right(self.starts, following)
            try:
                cost = self.cost(end, start, objective, signal)
            except InputError as error:
                refused.append(error)
            else:
                if first <= last:
                    yield end, first, last, cost.flops, cost.parameter_bytes, cost.largest_bytes, cost.peak_bytes
            last = min(last, first - 1)
