"""Which blocks the head at a cut has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from autodecouple.graph import Graph
from autodecouple.objectives.downstream import Downstream, sampled
from autodecouple.passes.downstream.chain import Chain, Segment
from autodecouple.passes.downstream.selection import Block, select


@dataclass(frozen=True)
class Route:
    """The segments that a head runs one after the other, the output layers last.

    Without any, all that follows the cut: it lies behind the last place that one tensor leads to.
    """

    segments: tuple[Segment, ...]

    @property
    def blocks(self) -> tuple[Segment, ...]:
        return self.segments[:-1]

    @property
    def joints(self) -> dict[fx.Node, fx.Node | None]:
        """What enters a segment, and what it is made of: what left the segment before, or the features (None).

        Segments that follow each other in the model need none, and neither does one that begins at the cut.
        """
        found: dict[fx.Node, fx.Node | None] = {}
        for before, segment in zip((None, *self.segments), self.segments, strict=False):
            if segment.entry is not None and (before is None or before.stop != segment.start):
                found[segment.entry] = before.leaving if before is not None else None
        return found

    @property
    def flops(self) -> int:
        """Of a training step, without adapters."""
        return sum(segment.flops for segment in self.segments)


def choose_route(chain: Chain, objective: Downstream, position: int, most_flops: float | None) -> Route:
    """The route from a cut after a position.

    A cut within a block begins with the rest of it, which counts as a block if it has half the FLOPs of one. Of what
    narrowing asks for, blocks are left out until the route keeps the limit or has one block; then the first of the
    output layers are. If that does not do either, they are all there.
    """
    tails, behind, rest = chain.tails_behind(position), chain.behind(position), chain.rest(position)
    if not tails:
        return Route(())
    first = () if rest is None else (rest,)
    counted = sum(2 * segment.flops >= chain.largest for segment in first)
    passed = 1 - len(behind) / max(1, len(chain.blocks))
    most = objective.count(passed, len(behind) + counted)
    least = min(1, most)
    choices = [(count, tails[0]) for count in range(most, least - 1, -1)] + [(least, tail) for tail in tails[1:]]
    start = chain.crossing(position) if rest is None else rest.leaving
    choose = _Choice(chain, start, behind, objective.sampling)
    routes = [Route((*first, *choose(count - counted, tail), tail)) for count, tail in choices]
    fitting = [route for route in routes if most_flops is None or route.flops <= most_flops]
    return fitting[0] if fitting else routes[most - least]


@dataclass(frozen=True)
class _Choice:
    """Chooses among the blocks behind a cut; start: the tensor that enters the first one."""

    chain: Chain
    start: fx.Node | None
    behind: Sequence[Segment]
    sampling: str

    def __call__(self, count: int, tail: Segment) -> list[Segment]:
        indices = sampled(count, len(self.behind))
        if self.sampling == "fitting" and 0 < count < len(self.behind):
            form = self.chain.form
            blocks = [Block(form(block.entry), form(block.leaving)) for block in self.behind]
            indices = select(form(self.start), blocks, form(tail.entry), indices)
        return [self.behind[index] for index in indices]


def total_flops(graph: Graph) -> int:
    """Of a training step of the whole model."""
    measures = (graph.measures[node.name] for node in graph.operations)
    return sum(m.forward_flops + sum(cost for _, cost in m.backward_flops) for m in measures)
