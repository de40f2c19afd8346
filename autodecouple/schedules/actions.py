"""The words a schedule is written in, and the one rule of what waits for what.

    2F0   stage 2, FORWARD of micro-batch 0        2L   stage 2, LOSS of the whole batch
    2B0   stage 2, BACKWARD of micro-batch 0       2U   stage 2, UPDATE of its parameters
    2W0   stage 2, gradients of its WEIGHTs by micro-batch 0, where 2B0 leaves them for later

LOSS stands alone because batch-wise losses (SupCon, DeInfoReg) need the features of the whole batch. It includes the
head's own backward, down to the gradient of the features; BACKWARD carries that through the stage: to its inputs and
weights, or, of a micro-batch that has a WEIGHT in the lanes, to its inputs only, for which the stage before waits.
Where a cut overlaps, the stage before it has a WEIGHT, of its own loss and of the next stage's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from autodecouple.errors import ScheduleError
from autodecouple.plans import Plan


class Op(StrEnum):
    FORWARD = "F"
    LOSS = "L"
    BACKWARD = "B"
    WEIGHT = "W"
    UPDATE = "U"


@dataclass(frozen=True, slots=True)
class Action:
    """A unit of work; `micro_batch` None means the whole batch, all micro-batches together."""

    stage: int
    op: Op
    micro_batch: int | None = None

    @staticmethod
    def parse(text: str) -> Action:
        """Read the printed form: `Action.parse("2F0")`."""
        match = re.fullmatch(r"(\d+)([FLBWU])(\d*)", text)
        if match is None:
            raise ScheduleError(f"{text!r} is not an action; actions look like 2F0, 2L, 2B0, 2W0, 2U")
        stage, op, micro_batch = match.groups()
        return Action(int(stage), Op(op), int(micro_batch) if micro_batch else None)

    def overlaps(self, other: Action) -> bool:
        """Same stage and op, and a micro-batch in common."""
        return (self.stage, self.op) == (other.stage, other.op) and (
            self.micro_batch is None or other.micro_batch is None or self.micro_batch == other.micro_batch
        )

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{'' if self.micro_batch is None else self.micro_batch}"


Lane = tuple[Action, ...]
"""One worker's order within one batch; the next batch runs the same order."""


class Schedule(Protocol):
    """A rule that makes lanes.

    num_micro_batches: slices that a batch goes forward and backward in
    queue_depth:       batches that a stage may be ahead of the next one's forward
    barrier:           a batch starts only when every stage has been updated on the one before
    """

    @property
    def num_micro_batches(self) -> int: ...
    @property
    def queue_depth(self) -> int: ...
    @property
    def barrier(self) -> bool: ...

    def __call__(self, plan: Plan) -> tuple[Lane, ...]: ...


def dependencies(action: Action, plan: Plan) -> tuple[Action, ...]:
    """What must be done, in the same batch, before `action` may start.

    A dependency is met when every action of the program that overlaps it is done: 2U waits for 2B, that is for all of
    2B0, 2B1, ...; 2B1 waits for 2L1, that is for 2L where the loss is taken over the whole batch.

        detached cut:  kF -> kL -> kB -> kU          coupled cut:  kF -> k+1F -> ... -> k+1B -> kB -> kU
                        +-> k+1F                                   (no loss, and no head, on stage k)

        cut that overlaps:  kF -> kL -> kB ----------------+-> kW -> kU      one stage's wait, and no chain of them:
                             +-> k+1F -> k+1L -> k+1B -----+                 k+1B does not wait for k+2
    """
    stage, micro_batch = action.stage, action.micro_batch
    match action.op:
        case Op.FORWARD:
            return (Action(stage - 1, Op.FORWARD, micro_batch),) if stage > 0 else ()
        case Op.LOSS:
            source = plan.signal_source(stage)
            signal = () if source is None else (Action(source, Op.LOSS, micro_batch),)
            return (Action(stage, Op.FORWARD, micro_batch), *signal)
        case Op.BACKWARD if plan.coupled_after(stage):
            return (Action(stage, Op.FORWARD, micro_batch), Action(stage + 1, Op.BACKWARD, micro_batch))
        case Op.BACKWARD:
            return (Action(stage, Op.LOSS, micro_batch),)
        case Op.WEIGHT if plan.overlaps_after(stage):
            return (Action(stage, Op.BACKWARD, micro_batch), Action(stage + 1, Op.BACKWARD, micro_batch))
        case Op.WEIGHT:
            return (Action(stage, Op.BACKWARD, micro_batch),)
        case Op.UPDATE:
            return (Action(stage, Op.BACKWARD), Action(stage, Op.WEIGHT))


def dependencies_across(action: Action, plan: Plan, schedule: Schedule) -> tuple[tuple[Action, int], ...]:
    """What must be done in earlier batches before `action` may start: pairs (action, how many batches ago).

    The whole rule of streaming: a stage's forward waits for its own update of the batch before, and for nothing else
    but room in the queue to the next stage.

        stage 0   F0 L0 B0 U0 F1 L1 B1 U1 F2 ...
        stage 1      F0 L0 B0 U0 F1 L1 B1 U1 ...      kF(t) after kU(t-1), and after k+1F(t - queue_depth)
    """
    if action.op is not Op.FORWARD:
        return ()
    updated = range(len(plan.stages)) if schedule.barrier else (action.stage,)
    waits = [(Action(stage, Op.UPDATE), 1) for stage in updated]
    if action.stage + 1 < len(plan.stages):
        waits.append((Action(action.stage + 1, Op.FORWARD), schedule.queue_depth))
    return tuple(waits)


def expand(requirement: Action, actions: Iterable[Action]) -> tuple[Action, ...]:
    """The actions whose completion meets a requirement."""
    return tuple(action for action in actions if action.overlaps(requirement))
