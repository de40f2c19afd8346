"""Give objectives the captured model that they need, and choose where the choice was left open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from autodecouple.graph import Graph
from autodecouple.objectives import OBJECTIVES, Auto, Downstream, LoCo, Objective
from autodecouple.passes.candidates import Candidate
from autodecouple.passes.downstream.bound import BoundDownstream
from autodecouple.passes.downstream.chain import Chain, find_chain
from autodecouple.passes.downstream.route import choose_route, total_flops

Criterion = Callable[[Any, Any], Tensor] | None

CLASSIFIERS = ("dgl", "early_exit")
"""Objectives that classify at every stage, the better one first."""

MOST_PARTS = 4
"""More stages than these do not make heads smaller: what a head must do stays the same."""


def equip(
    objectives: Sequence[Objective],
    graph: Graph,
    candidates: Sequence[Candidate],
    n_stages: int,
    criterion: Criterion = None,
) -> tuple[tuple[Objective, ...], tuple[str, ...]]:
    """The objectives, those that need the model bound to it, and what to tell the user of that.

    Equal ones stay one, bound ones stay as they are. criterion: the task's loss, None for cross-entropy
    """
    offer = _Offer(graph, candidates, n_stages, criterion)
    known: dict[Objective, Objective] = {}
    for objective in objectives:
        if getattr(objective, "needs_graph", False) and objective not in known:
            known[objective] = offer.bound(objective)
    found = tuple(known[o] if getattr(o, "needs_graph", False) else o for o in objectives)
    return found, tuple(offer.notes)


@dataclass
class _Offer:
    """What a model offers to make heads of."""

    graph: Graph
    candidates: Sequence[Candidate]
    n_stages: int
    criterion: Criterion
    notes: list[str] = field(default_factory=list)

    def bound(self, objective: Objective) -> Objective:
        if isinstance(objective, LoCo):
            return replace(objective, local=self.bound(objective.local))
        if isinstance(objective, Downstream):
            if not self.chain.blocks:
                self.notes.append(f"'downstream': {self._found}")
            return self._downstream(objective)
        assert isinstance(objective, Auto), objective
        return self._chosen(objective)

    def _chosen(self, auto: Auto) -> Objective:
        share, signal = self._share(auto.budget), self.graph.signal
        has_classes = signal.dtype == "int64" and (self.criterion is None or self.graph.target is not None)
        if has_classes and signal.num_classes is not None and self._classifies_texts:
            self.notes.append("loss='auto' is 'early_exit', since the model gives a text one label")
            return OBJECTIVES["early_exit"]()
        if share <= auto.budget or not has_classes:
            why = f"heads take about {share:.0%} of a stage" if has_classes else "it takes whatever the criterion does"
            self.notes.append(f"loss='auto' is 'downstream', since {why}; {self._found}")
            return self._downstream(Downstream(budget=auto.budget))
        name = "supcon" if signal.num_classes is None else next(n for n in CLASSIFIERS if n in OBJECTIVES)
        why = f"heads of 'downstream' would take {share:.0%} of a stage, more than the budget of {auto.budget:.0%}"
        self.notes.append(f"loss='auto' is {name!r}, since {why}")
        return OBJECTIVES[name]()

    def _downstream(self, objective: Downstream) -> BoundDownstream:
        most = None if objective.budget is None else objective.budget * self._average
        return BoundDownstream(objective, self.graph, self.chain, most, self.criterion)

    @property
    def _classifies_texts(self) -> bool:
        """Whether token indices (N, T) enter and every row has one label."""
        tokens = [spec for spec in self.graph.inputs if spec.dtype.startswith("int") and len(spec.shape) == 2]
        return bool(tokens) and len(self.graph.signal.shape) == 1

    @cached_property
    def chain(self) -> Chain:
        memo = self.graph.memo
        if "chain" not in memo:
            memo["chain"] = find_chain(self.graph, self.candidates)
        chain: Chain = memo["chain"]
        return chain

    @cached_property
    def _average(self) -> float:
        """FLOPs of a stage, heads apart; of one of four where there are more."""
        return total_flops(self.graph) / min(self.n_stages, MOST_PARTS)

    def _share(self, budget: float) -> float:
        """FLOPs of the head in the middle of the blocks, as a share of an average stage's."""
        if not self.chain.tails or not self._average:
            return float("inf")
        middle = [block.start for block in self.chain.blocks][len(self.chain.blocks) // 2 :]
        position = (middle[0] if middle else self.chain.tails[0].start) - 1
        route = choose_route(self.chain, Downstream(), position, budget * self._average)
        return route.flops / self._average

    @property
    def _found(self) -> str:
        """What heads are made of."""
        blocks, tails = self.chain.blocks, self.chain.tails
        if not tails:
            return "no place was found that one tensor leads to: a head is a copy of all that follows its cut"
        layers = f"the output layers from {tails[0].name!r} on"
        if not blocks:
            return f"no blocks were found: heads are {layers}"
        return f"heads are made of {len(blocks)} blocks, {blocks[0].name!r} to {blocks[-1].name!r}, and {layers}"
