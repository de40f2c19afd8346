"""Choose the cuts: the exact optimum over the legal ones, by dynamic programming.

The slowest stage sets the pace of a stream, so its cost is minimised first. Among the plans that reach that optimum the
one is taken that cuts at module boundaries and moves the fewest bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autodecouple.errors import CutError, PartitionError
from autodecouple.graph import Graph
from autodecouple.objectives.objective import Objective
from autodecouple.passes.candidates import Candidate
from autodecouple.passes.measuring.stage_costs import FORBIDDEN, StageCosts
from autodecouple.plans import Plan


def choose_cuts(
    graph: Graph,
    candidates: Sequence[Candidate],
    n_stages: int,
    objectives: Sequence[Objective],
    *,
    cut_at: Sequence[str] = (),
    memory_limit: int | None = None,
    classifier: str | None = None,
    recompute: bool = False,
) -> Plan:
    """The plan whose slowest stage is cheapest: FLOPs of forward, backward and head of a training step.

    objectives:   one per hidden stage; "bp" couples the stage to the next
    cut_at:       nodes or modules after which to cut; () leaves all cuts to the optimum
    memory_limit: bytes that a stage may take, parameters, gradients, optimizer state and activations together
    classifier:   node of one more cut, behind all others; what follows it is one more stage
    recompute:    stages run their forward again for their backward instead of keeping their activations
    Raises PartitionError where no such plan exists, naming the maximum and the legal cuts; CutError for a cut_at where
    none is legal, naming the nearest legal ones.
    """
    check_n_stages(n_stages)
    legal = [candidate for candidate in candidates if candidate.cut is not None]
    costs = StageCosts(graph, legal, recompute)
    count = n_stages + (classifier is not None)
    _check_possible(count, candidates, costs.most_stages(), graph.warnings)
    bodies = [costs.table(stage, objectives, memory_limit) for stage in range(count)]
    if classifier is not None:
        last = [candidate.node for candidate in legal].index(classifier)
        bodies[-2][torch.arange(len(bodies[-2])) != last] = FORBIDDEN
        cut_at = [*cut_at, classifier] if cut_at else ()
    problem = Problem(tuple(bodies), tuple(_preference(candidate) for candidate in legal))
    chosen = explicit_cuts(cut_at, count, candidates) if cut_at else minimise_slowest(problem)
    if chosen is None or problem.cost(chosen) >= FORBIDDEN:
        raise PartitionError(_impossible(count, memory_limit, legal, chosen))
    return costs.plan(chosen, objectives)


def find_classifier(graph: Graph, candidates: Sequence[Candidate], name: bool | str) -> str:
    """The cut before the classifier: the last legal one before the parameters of the last top-level module.

    name: a node or module after which the classifier begins; True looks for it
    """
    if isinstance(name, str):
        position = _find(name, candidates)
        return next(candidate.node for candidate in candidates if candidate.position == position)
    first: dict[str, int] = {}
    for parameter, uses in graph.parameter_uses().items():
        if uses:
            top = parameter.split(".")[0]
            first[top] = min(first.get(top, min(uses)), *uses)
    begin = max(first.values(), default=0)
    before = [candidate for candidate in candidates if candidate.cut is not None and candidate.position < begin]
    if not before:
        raise PartitionError("no legal cut lies before the last module: name one, detach_classifier='module'")
    return before[-1].node


@dataclass(frozen=True)
class Problem:
    """The cost of every possible stage, as integers, so that the optimum is exact.

    body[k][e, b]: cost of stage k from start b to end e, at least FORBIDDEN where it is not allowed. Start 0 is the
                   model's beginning, start i the place after legal cut i-1; end i is legal cut i, the last end the
                   model's end.
    preference:    what each legal cut costs among plans that are equally fast
    """

    body: tuple[torch.Tensor, ...]
    preference: tuple[int, ...]

    def cost(self, cuts: Sequence[int]) -> int:
        """Cost of the slowest stage with these legal cuts."""
        starts, ends = [0, *(cut + 1 for cut in cuts)], [*cuts, len(self.preference)]
        return max(int(body[end, start]) for body, start, end in zip(self.body, starts, ends, strict=True))


def minimise_slowest(problem: Problem) -> tuple[int, ...] | None:
    """Indices of the legal cuts of the best plan, None if no plan is allowed; O(K C^2) for K stages and C cuts.

    best[k][e] = min over b of max(best[k-1][b-1], body[k][e, b])      first round: the slowest stage
    best[k][e] = min over b of best[k-1][b-1] + preference[e]          second round: over plans no slower than that
    """
    slowest, cuts = _solve(problem.body, torch.maximum, torch.zeros(len(problem.preference) + 1, dtype=torch.int64))
    if slowest >= FORBIDDEN:
        return None
    allowed = tuple(torch.where(body <= slowest, 0, FORBIDDEN) for body in problem.body)
    _, cuts = _solve(allowed, torch.add, torch.tensor([*problem.preference, 0], dtype=torch.int64))
    return cuts


def _solve(body: Sequence[torch.Tensor], join: object, end_cost: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """(value, cuts) of the best way through the stages, `join` joining what came before with the stage itself."""
    assert callable(join)
    best = (body[0][:, 0] + end_cost).clamp(max=FORBIDDEN)
    choices: list[torch.Tensor] = []
    for stage in body[1:]:
        before = torch.full_like(best, FORBIDDEN)
        before[1:] = best[:-1]  # a stage from start b follows one that ended at cut b-1
        best, choice = join(before, stage).min(dim=1)
        best = (best + end_cost).clamp(max=FORBIDDEN)
        choices.append(choice)
    end, cuts = len(best) - 1, []
    for choice in reversed(choices):
        end = int(choice[end]) - 1
        cuts.append(end)
    return int(best[-1]), tuple(reversed(cuts))


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


def _impossible(
    n_stages: int, memory_limit: int | None, legal: Sequence[Candidate], chosen: tuple[int, ...] | None
) -> str:
    which = "the cuts asked for" if chosen is not None else "any choice of the legal cuts"
    if memory_limit is not None:
        return (
            f"with {which}, a stage of {n_stages} needs more than memory_limit={memory_limit} bytes or trains nothing;"
            f" raise the limit, or take more stages or a smaller batch. Legal cuts: {_describe(legal)}"
        )
    return f"with {which}, a stage of {n_stages} would have no trainable parameter. Legal cuts: {_describe(legal)}"


def _preference(candidate: Candidate) -> int:
    """Few tensors that carry a gradient first; then module boundaries, the outermost best; then few bytes."""
    assert candidate.cut is not None
    depth = candidate.module.count(".") + 1 if candidate.module else 16
    order = len(candidate.cut.carrying) * 16 + min(depth, 16)
    return order * 2**40 + min(candidate.cut.num_bytes, 2**40 - 1)  # the sum over all cuts stays below FORBIDDEN
