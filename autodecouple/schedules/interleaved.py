"""Interleaved 1F1B: every lane holds several stages far apart, so that work comes to each lane sooner."""

from __future__ import annotations

from dataclasses import dataclass

from autodecouple.plans import Plan
from autodecouple.schedules.actions import Lane
from autodecouple.schedules.rounds import Rounds, in_turn
from autodecouple.schedules.sequential import require_counts


@dataclass(frozen=True)
class Interleaved:
    """1F1B on lanes that hold the stages in turn: stages 0, K, 2K, ... on lane 0 of K (Narayanan et al. 2021).

        lane 0   0F0 0F1 2F0 2F1 ... 2B0 ... 2B1 0B0 0B1 U      V = 2 stages on each of K = 2 lanes, M = 2
        lane 1   ... 1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1 ... U

    Idle share (K-1) / (V M + K-1) of balanced stages, where K divides M. The loss is taken per micro-batch. Counts are
    whole numbers from 1. Raises ScheduleError for counts, and when called on a plan with a detached cut, or whose lanes
    do not hold its stages in turn, equally many each.
    """

    num_micro_batches: int = 4
    queue_depth: int = 2
    barrier: bool = False

    def __post_init__(self) -> None:
        require_counts(self)

    def place(self, plan: Plan) -> Plan:
        """The plan with its stages on its lanes in turn."""
        return in_turn(plan, self)

    def __call__(self, plan: Plan) -> tuple[Lane, ...]:
        rounds = Rounds.of(plan, self)
        return tuple(
            (*rounds.alternate(lane, 2 * (rounds.num_lanes - 1 - lane)), *rounds.updates(lane))
            for lane in range(rounds.num_lanes)
        )
