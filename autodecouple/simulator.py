"""What a schedule would take: lanes, dependencies and costs in, a timeline out."""

from __future__ import annotations

from dataclasses import dataclass

from autodecouple.cost import Cost
from autodecouple.errors import InputError
from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Op, Schedule, dependencies_across
from autodecouple.schedules.program import Program
from autodecouple.timeline import Span, Timeline


def run(plan: Plan, schedule: Schedule, cost: Cost, batches: int) -> Timeline:
    """The timeline of a stream of batches, in the seconds of `cost`, from second 0.

    Each lane runs its actions in order, batch after batch, each as soon as its lane is free and what it waits for is
    done. Raises ScheduleError for lanes that cannot run, InputError for less than one batch.
    """
    if batches < 1:
        raise InputError(f"batches={batches!r}: simulate one batch or more")
    program = Program(plan, schedule)
    steps = tuple(_step(action, program, cost) for action in program.actions)
    free = [0.0] * len(program.lanes)
    stops: list[dict[Action, float]] = []
    spans: list[Span] = []
    # No event queue is needed: batch by batch, and within one in the program's order, all that a step waits for comes
    # before it, so every start is known when its turn comes.
    for batch in range(batches):
        met = _met_across(steps, program, stops)
        done: dict[Action, float] = {}
        for step in steps:
            arrivals = (done[action] + delay for action, delay in step.waits)
            start = max(free[step.lane], *arrivals, *(met[pair] for pair in step.across), 0.0)
            done[step.action] = free[step.lane] = start + step.seconds
            spans.append(Span(step.lane, step.action, batch, start, done[step.action]))
        stops.append(done)
    title = f"{type(schedule).__name__}, {batches} batch{'es' * (batches > 1)}, predicted"
    return Timeline(tuple(sorted(spans, key=lambda span: span.start)), len(program.lanes), title)


@dataclass(frozen=True, slots=True)
class _Step:
    """An action with all that every batch repeats: waits are (action, seconds from its stop till it counts here)."""

    action: Action
    lane: int
    seconds: float
    waits: tuple[tuple[Action, float], ...]
    across: tuple[tuple[Action, int], ...]


def _step(action: Action, program: Program, cost: Cost) -> _Step:
    return _Step(
        action,
        program.lane_of[action],
        cost.seconds(action),
        tuple((other, _delay(other, action, program, cost)) for other in program.waits[action]),
        dependencies_across(action, program.plan, program.schedule),
    )


def _delay(source: Action, target: Action, program: Program, cost: Cost) -> float:
    """Seconds that activations (forward) or gradients (backward) travel; a head's signal travels with them."""
    travels = target.op in (Op.FORWARD, Op.BACKWARD, Op.WEIGHT) and source.stage != target.stage
    if not travels or program.lane_of[source] == program.lane_of[target]:
        return 0.0
    return cost.transfer(min(source.stage, target.stage))


def _met_across(
    steps: tuple[_Step, ...], program: Program, stops: list[dict[Action, float]]
) -> dict[tuple[Action, int], float]:
    """When each wait for an earlier batch is over; one for a batch before the first is over from the start."""
    batch = len(stops)
    return {
        (needed, ago): max((stops[batch - ago][action] for action in program.expand(needed)), default=0.0)
        if ago <= batch
        else 0.0
        for needed, ago in {pair for step in steps for pair in step.across}
    }
