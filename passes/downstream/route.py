"""Which blocks the head at a cut has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from autodecouple.graph import Graph
from autodecouple.objectives.downstream import Downstream, sampled
from autodecouple.passes.downstream.chain import Chain, Segment


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

        Segments that follow each other in the model need none.
        """
        pairs = zip((None, *self.segments), self.segments, strict=False)
        return {b.entry: a.leaving if a is not None else None for a, b in pairs if a is None or a.stop != b.start}

    @property
    def flops(self) -> int:
        """Of a training step, without adapters."""
        return sum(segment.flops for segment in self.segments)


def choose_route(chain: Chain, objective: Downstream, position: int, most_flops: float | None) -> Route:
    """The route from a cut after a position.

    Of what narrowing asks for, blocks are left out until the route keeps the limit or has one block; then the first of
    the output layers are. If that does not do either, they are all there.
    """
    tails, behind = chain.tails_behind(position), chain.behind(position)
    if not tails:
        return Route(())
    passed = 1 - len(behind) / max(1, len(chain.blocks))
    most = objective.count(passed, len(behind))
    routes = [_route(behind, tails[0], count) for count in range(most, min(1, most) - 1, -1)]
    routes += [_route(behind, tail, min(1, most)) for tail in tails[1:]]
    fitting = [route for route in routes if most_flops is None or route.flops <= most_flops]
    return fitting[0] if fitting else _route(behind, tails[0], min(1, most))


def _route(behind: tuple[Segment, ...], tail: Segment, count: int) -> Route:
    return Route((*(behind[index] for index in sampled(count, len(behind))), tail))


def total_flops(graph: Graph) -> int:
    """Of a training step of the whole model."""
    measures = (graph.measures[node.name] for node in graph.operations)
    return sum(m.forward_flops + sum(cost for _, cost in m.backward_flops) for m in measures)
