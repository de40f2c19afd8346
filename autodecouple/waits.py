"""How long stages take for a batch where some wait for others."""

from __future__ import annotations

from autodecouple.plans import Plan


def periods(plan: Plan) -> tuple[float, ...]:
    """From one batch of each stage to its next, in what `Plan.costs` count, streaming over a lane for every stage.

    Mostly the stage's own cost. One that overlaps the next trains its weights with that one's loss, too, and waits:

        stage k     F L B . . . W U F L B . . . W U        F + (F L B of the next, or its own L B) + W U
        stage k+1     . F L B . . . W U F L B              and so beside any cut that couples a stage to such a one

    Where no cut overlaps, coupled stages count as if they did not wait: how much they do is up to the schedule.
    """
    if not any(cut.overlaps for cut in plan.cuts):
        return plan.costs
    works = [_work(plan, stage) for stage in range(len(plan.stages))]
    found: list[float] = []
    answer = 0.0  # of the stage behind: from the begin of its forward to the gradient that it sends back
    for stage in reversed(range(len(plan.stages))):
        forward, loss, backward, weights = works[stage]
        behind, answer = answer, forward + loss + backward
        if plan.coupled_after(stage):
            answer += behind
            found.append(answer + weights)
        elif plan.overlaps_after(stage):
            found.append(forward + max(loss + backward, behind) + weights)
        else:
            found.append(answer + weights)
    return tuple(reversed(found))


def _work(plan: Plan, index: int) -> tuple[float, float, float, float]:
    """Forward, loss, backward and what follows it: weights where they wait, and the update."""
    stage = plan.stages[index]
    if plan.is_timed:
        forward, loss, backward = stage.forward_seconds or 0.0, stage.head_seconds or 0.0, stage.backward_seconds or 0.0
    else:
        forward, loss, backward = (
            flops / stage.speed for flops in (stage.forward_flops, stage.head_flops, stage.backward_flops)
        )
    later = (1 - stage.returning) * backward if plan.splits_backward(index) else 0.0
    update = stage.update_seconds if plan.is_timed else 0.0
    return forward, loss, backward - later, later + update
