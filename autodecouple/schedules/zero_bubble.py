"""Zero bubble: a backward goes on to the stage before at once, and the weights' gradients fill the gaps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Lane, Op
from autodecouple.schedules.rounds import Rounds, in_turn
from autodecouple.schedules.sequential import require_counts


@dataclass(frozen=True)
class ZeroBubble:
    """Interleaved 1F1B with each backward in two: inputs (B) first, weights (W) when there is time (Qi et al. 2024).

        lane 0   F0 F1 .. B0 W0 F2 B1 W1 B2 W2 U      ZB-H1 of the paper: lane k is up to k weights behind
        lane 1   .. F0 B0 F1 B1 W0 F2 B2 W1 W2 U      F, B and W take equally long here; idle (K-1) / (3M + K-1)

    A lane may hold one stage, or several in turn. The loss is taken per micro-batch. Where activations are computed
    again (`recompute`) a backward is not split, and W takes no time. Counts are whole numbers from 1. Raises
    ScheduleError for counts, and when called on a plan with a detached cut, or whose lanes do not hold its stages in
    turn, equally many each.
    """

    num_micro_batches: int = 4
    queue_depth: int = 2
    barrier: bool = False
    splits_backward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_counts(self)

    def place(self, plan: Plan) -> Plan:
        """The plan with its stages on its lanes in turn."""
        return in_turn(plan, self)

    def __call__(self, plan: Plan) -> tuple[Lane, ...]:
        rounds = Rounds.of(plan, self)
        return tuple(
            (*_with_weights(rounds.alternate(lane, rounds.num_lanes - 1 - lane), lane), *rounds.updates(lane))
            for lane in range(rounds.num_lanes)
        )


def _with_weights(actions: Iterable[Action], most: int) -> Iterator[Action]:
    """After each backward the oldest weights that wait, as long as more than `most` do; in the end all others."""
    waiting: deque[Action] = deque()
    for action in actions:
        yield action
        if action.op is Op.BACKWARD:
            waiting.append(Action(action.stage, Op.WEIGHT, action.micro_batch))
            if len(waiting) > most:
                yield waiting.popleft()
    yield from waiting
