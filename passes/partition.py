"""Choose the cuts: the exact optimum over the legal ones, by the dynamic programmes of `partitioning`.

The slowest stage sets the pace of a stream, so its cost is minimised first. Among the plans that reach that optimum the
one is taken that cuts at module boundaries and moves the fewest bytes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from autodecouple.errors import CutError, PartitionError
from autodecouple.graph import Graph
from autodecouple.objectives.objective import Objective
from autodecouple.passes.candidates import Candidate
from autodecouple.passes.collecting import uncollected
from autodecouple.passes.measuring.charges import Charge, slowness
from autodecouple.passes.measuring.stage_costs import StageCosts
from autodecouple.passes.partitioning.limited import Limited, minimise_within
from autodecouple.passes.partitioning.runs import FORBIDDEN, StageRuns, minimise_slowest
from autodecouple.plans import Plan


@uncollected()
def choose_cuts(
    graph: Graph,
    candidates: Sequence[Candidate],
    n_stages: int,
    objectives: Sequence[Objective],
    *,
    cut_at: Sequence[str] = (),
    memory_limit: int | None = None,
    classifier: Sequence[str] = (),
    charges: Sequence[Charge] = (),
) -> Plan:
    """The plan whose slowest stage is cheapest: forward, backward and head of a training step.

    objectives:   one per hidden stage; "bp" couples the stage to the next
    cut_at:       nodes or modules after which to cut; () leaves all cuts to the optimum
    memory_limit: bytes that a stage may take, parameters, gradients, optimizer state and activations together
    classifier:   nodes where one more cut may lie, behind all others: at the last that the head can read. What follows
                  it is one more stage
    charges:      what each stage costs where it will run, one per stage; () charges FLOPs everywhere
    Raises PartitionError where no such plan exists, naming the maximum and the legal cuts; CutError for a cut_at where
    none is legal, naming the nearest legal ones.
    """
    check_n_stages(n_stages)
    legal = [candidate for candidate in candidates if candidate.cut is not None]
    count = n_stages + bool(classifier)
    charges = charges or (Charge(graph),) * count
    costs = StageCosts(graph, legal, Charge(graph, recompute=charges[0].recompute))
    _check_possible(count, candidates, costs.most_stages(), graph.warnings)
    limits = [charge.limit(memory_limit) for charge in charges]
    stages = _charged(costs, charges, objectives)
    if classifier:
        last = _last_read(stages[-2], [end for end, candidate in enumerate(legal) if candidate.node in classifier])
        costs.head(count - 2, last, last, objectives)  # one that refuses even this cut says why
        stages[-2] = stages[-2].where(stages[-2].end == last)
        cut_at = [*cut_at, legal[last].node] if cut_at else ()
    if cut_at:
        chosen = explicit_cuts(cut_at, count, candidates)
        plan = _checked(costs, stages, chosen, objectives)
    else:
        plan = _best(costs, stages, objectives, limits)
    if plan is None or not _fits(plan, limits):
        given = [dataclasses.replace(charge, reserved_bytes=0).limit(memory_limit) for charge in charges]
        raise PartitionError(_impossible(count, given, legal, explicit=bool(cut_at)))
    return plan


def _last_read(stage: StageRuns, ends: Sequence[int]) -> int:
    """The last of some cuts at which the stage's head can read what crosses; the last of all where it can at none."""
    readable = set(stage.end.tolist())
    return max((end for end in ends if end in readable), default=max(ends))


def _charged(costs: StageCosts, charges: Sequence[Charge], objectives: Sequence[Objective]) -> list[StageRuns]:
    """What every stage may be, each at its own charge; equal ones are one object."""
    known = {costs.charge.prices: costs}
    for charge in charges:
        if charge.prices not in known:
            known[charge.prices] = StageCosts(costs.graph, costs.legal, charge)
    runs = [known[charge.prices].runs(stage, objectives) for stage, charge in enumerate(charges)]
    dearest = max(1, *(stage.dearest for stage in runs))
    factors = slowness([charge.speed for charge in charges], (FORBIDDEN - 1) // dearest)
    slowed = {(id(r), factor): r.slowed(factor) for r, factor in zip(runs, factors, strict=True)}
    return [slowed[id(r), factor] for r, factor in zip(runs, factors, strict=True)]


def _checked(
    costs: StageCosts, stages: Sequence[StageRuns], chosen: Sequence[int], objectives: Sequence[Objective]
) -> Plan | None:
    """The plan with these cuts, None if one of its stages is not allowed."""
    begins, ends = [0, *(end + 1 for end in chosen)], [*chosen, len(costs.legal)]
    allowed = all(runs.holds(*stage) for runs, *stage in zip(stages, begins, ends, strict=True))
    if not allowed:
        for index, (begin, end) in enumerate(zip(begins, chosen, strict=False)):
            costs.head(index, end, begin, objectives)  # one that refuses its cut says why
    return costs.plan(chosen, objectives) if allowed else None


def _best(
    costs: StageCosts, stages: Sequence[StageRuns], objectives: Sequence[Objective], limits: Sequence[int | None]
) -> Plan | None:
    """The best plan, None if there is none. The one without limits is the best with them, too, if it fits.

    limits: bytes that each stage may take, None for no limit
    """
    preference = [_preference(candidate) for candidate in costs.legal]
    found = minimise_slowest(stages, preference)
    if found is None:
        return None
    plan = costs.plan(found[1], objectives)
    if _fits(plan, limits):
        return plan
    within = minimise_within(Limited(costs, stages, objectives, preference, limits))
    return None if within is None else costs.plan(within, objectives)


def _fits(plan: Plan, limits: Sequence[int | None]) -> bool:
    return all(limit is None or s.memory_bytes <= limit for s, limit in zip(plan.stages, limits, strict=True))


def find_classifier(graph: Graph, candidates: Sequence[Candidate], name: bool | str) -> tuple[str, ...]:
    """Where the classifier may begin: before the parameters of the last top-level module, behind all others.

    A head may ask for more than the last of these places has: InfoNCE for positions, which a pooling takes away.

    name: a node or module after which the classifier begins; True looks for it
    """
    if isinstance(name, str):
        position = _find(name, candidates)
        return (next(candidate.node for candidate in candidates if candidate.position == position),)
    first: dict[str, int] = {}
    for parameter, uses in graph.parameter_uses().items():
        if uses:
            top = parameter.split(".")[0]
            first[top] = min(first.get(top, min(uses)), *uses)
    begin = max(first.values(), default=0)
    before = [candidate for candidate in candidates if candidate.cut is not None and candidate.position < begin]
    if not before:
        raise PartitionError("no legal cut lies before the last module: name one, detach_classifier='module'")
    others = (at for found in graph.parameter_uses().values() for at in found if at <= before[-1].position)
    last = max(others, default=-1)
    return tuple(candidate.node for candidate in before if candidate.position >= last)


def explicit_cuts(cut_at: Sequence[str], n_stages: int, candidates: Sequence[Candidate]) -> tuple[int, ...]:
    """Indices, among the legal cuts, of the user's: nodes or modules by name, in execution order."""
    if len(cut_at) != n_stages - 1:
        raise PartitionError(
            f"{n_stages} stages need {n_stages - 1} cuts, but cut_at has {len(cut_at)}: {list(cut_at)}"
        )
    positions = [_find(name, candidates) for name in cut_at]
    if positions != sorted(set(positions)):
        raise CutError(f"cut_at must name different places in execution order, but is {list(cut_at)}")
    legal = [candidate.position for candidate in candidates if candidate.cut is not None]
    return tuple(legal.index(position) for position in positions)


def _find(name: str, candidates: Sequence[Candidate]) -> int:
    """Position of the legal cut after a node or module; raises CutError naming the nearest legal ones."""
    places = [c for c in candidates if name in (c.node, c.module)] or [c for c in candidates if name in c.ended]
    legal = [candidate for candidate in candidates if candidate.cut is not None]
    if not places:
        raise CutError(f"there is no place {name!r} to cut at; the legal cuts: {_describe(legal)}")
    place = places[-1]
    if place.cut is None and place.twin is not None:
        place = next(c for c in candidates if c.node == place.twin)
    if place.cut is None:
        nearest = sorted(legal, key=lambda c: abs(c.position - place.position))[:2]
        raise CutError(f"cannot cut after {name!r}: {place.reason}; nearest legal cuts: {_describe(nearest)}")
    return place.position


def check_n_stages(n_stages: object) -> None:
    if isinstance(n_stages, bool) or not isinstance(n_stages, int) or n_stages < 1:
        raise PartitionError(f"n_stages must be a positive integer, not {n_stages!r}")


def _check_possible(n_stages: int, candidates: Sequence[Candidate], most: int, notes: Sequence[str]) -> None:
    if most == 0:
        raise PartitionError("the model's forward uses no trainable parameter: there is nothing to train")
    if n_stages > most:
        legal = [candidate for candidate in candidates if candidate.cut is not None]
        reasons = Counter(c.reason for c in candidates if c.cut is None and c.twin is None)
        elsewhere = f" Elsewhere, mostly: {reasons.most_common(1)[0][0]}." if reasons else ""
        raise PartitionError(
            f"n_stages={n_stages}, but the legal cuts allow at most {most} stages with something to train each. Legal"
            f" cuts: {_describe(legal)}.{elsewhere} `autodecouple cuts` says why at every place."
            + "".join(f"\n  note: {note}" for note in notes)  # such as what runs whole
        )


def _describe(candidates: Sequence[Candidate], limit: int = 40) -> str:
    names = [f"{c.node!r} (end of {c.module})" if c.module else repr(c.node) for c in candidates]
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more or "none"


def _impossible(n_stages: int, limits: Sequence[int | None], legal: Sequence[Candidate], *, explicit: bool) -> str:
    which = "the cuts asked for" if explicit else "any choice of the legal cuts"
    if known := sorted({limit for limit in limits if limit is not None}):
        named = " or ".join(f"memory_limit={limit}" for limit in known)
        return (
            f"with {which}, a stage of {n_stages} needs more than {named} bytes or trains nothing;"
            f" raise the limit, or take more stages or a smaller batch. Legal cuts: {_describe(legal)}"
        )
    return f"with {which}, a stage of {n_stages} would have no trainable parameter. Legal cuts: {_describe(legal)}"


def _preference(candidate: Candidate) -> int:
    """Few tensors that carry a gradient first; then module boundaries, the outermost best; then few bytes."""
    assert candidate.cut is not None
    depth = candidate.module.count(".") + 1 if candidate.module else 16
    order = len(candidate.cut.carrying) * 16 + min(depth, 16)
    return order * 2**40 + min(candidate.cut.num_bytes, 2**40 - 1)  # the sum over all cuts stays below FORBIDDEN
