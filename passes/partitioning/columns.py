"""The fastest choice of stages for any costs, one start of stages after the other: no table of all stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from autodecouple.passes.partitioning.runs import FORBIDDEN


class Columns(Protocol):
    """What stages cost that begin at one place.

    preference: what each legal cut costs among plans that are equally fast
    """

    @property
    def num_stages(self) -> int: ...

    @property
    def preference(self) -> Sequence[int]: ...

    def column(self, start: int, bound: int) -> Tensor:
        """(stages, ends) costs of every stage number from this start to each end from there on.

        Ends behind the last stage that costs at most `bound` may be left out; FORBIDDEN where a stage is not allowed.
        """


def minimise_slowest(columns: Columns, bound: int = FORBIDDEN - 1) -> tuple[int, ...] | None:
    """The cuts of the best plan, None if there is none whose stages cost at most `bound`; O(K C^2) time.

    Without a way to say where the best start lies, every start is tried. Two rounds, as in `runs`.
    """
    num_ends = len(columns.preference) + 1
    nothing = torch.zeros(num_ends, dtype=torch.int64)
    slowest, _ = _solve(columns, lambda start: columns.column(start, bound), torch.maximum, nothing)
    if slowest > bound:
        return None

    def allowed(start: int) -> Tensor:
        return torch.where(columns.column(start, slowest) <= slowest, 0, FORBIDDEN)

    preference = torch.tensor([*columns.preference, 0], dtype=torch.int64)
    return _solve(columns, allowed, torch.add, preference)[1]


def _solve(
    columns: Columns,
    column: Callable[[int], Tensor],
    join: Callable[[Tensor, Tensor], Tensor],
    end_cost: Tensor,
) -> tuple[int, tuple[int, ...]]:
    """(value, cuts) of the best way through the stages, `join` joining what came before with the stage itself."""
    best = torch.full((columns.num_stages, len(end_cost)), FORBIDDEN, dtype=torch.int64)
    choice = torch.zeros_like(best)
    for start in range(len(end_cost)):
        before = torch.full((columns.num_stages,), FORBIDDEN, dtype=torch.int64)
        if start == 0:
            before[0] = 0
        else:
            before[1:] = best[:-1, start - 1]  # a stage from start b follows one that ended at cut b-1
        if int(before.min()) < FORBIDDEN:
            costs = column(start)
            here = slice(start, start + costs.shape[1])
            value = (join(before[:, None], costs) + end_cost[here]).clamp(max=FORBIDDEN)
            choice[:, here][value < best[:, here]] = start
            torch.minimum(best[:, here], value, out=best[:, here])
    return int(best[-1, -1]), _trace(choice)


def _trace(choice: Tensor) -> tuple[int, ...]:
    end, cuts = choice.shape[1] - 1, []
    for starts in reversed(choice[1:]):
        end = int(starts[end]) - 1
        cuts.append(end)
    return tuple(reversed(cuts))
