"""The objective with the model that its heads are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autodecouple.graph import Graph
from autodecouple.objectives.downstream import Downstream
from autodecouple.passes.downstream.chain import Chain, Segment
from autodecouple.passes.downstream.head import build_head, make_criterion
from autodecouple.passes.downstream.needs import Needs, find_needs
from autodecouple.passes.downstream.route import Route, choose_route
from autodecouple.passes.measuring.blocks import block_of, signature
from autodecouple.plans import Cut, TensorSpec


@dataclass(frozen=True, eq=False)
class BoundDownstream:
    """`Downstream` for one captured model: an objective that knows the cut.

    most_flops: that a head may take; criterion: the task's loss
    """

    objective: Downstream
    graph: Graph
    chain: Chain
    most_flops: float | None
    criterion: Callable[[Any, Any], Tensor] | None = None

    name: ClassVar[str] = Downstream.name
    encodes: ClassVar[bool] = False
    needs_classes: ClassVar[bool] = False
    takes_any_target: ClassVar[bool] = True

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """Raises InputError: heads belong to cuts, `at(cut).joint_head(...)`."""
        return self.objective.head(features, signal)

    def at(self, cut: Cut) -> AtCut:
        route = choose_route(self.chain, self.objective, self.graph.measures[cut.after].position, self.most_flops)
        return AtCut(self, cut, route)

    def works_like(self, segment: Segment) -> str | None:
        """Equal for segments that do the same work."""
        works: dict[Segment, str | None] = self.graph.memo.setdefault("works", {})
        if segment not in works:
            block = block_of(self.graph.operations[segment.start : segment.stop])
            specs = [self.graph.measures[node.name].value for node in block.inputs]
            forms = [(spec.shape, spec.dtype) if spec is not None else None for spec in specs]
            works[segment] = signature(self.graph, block, forms)
        return works[segment]


@dataclass
class AtCut:
    """The objective at one cut; not hashable, so that no cache of prices keeps the model alive."""

    bound: BoundDownstream
    cut: Cut
    route: Route
    name: ClassVar[str] = Downstream.name
    encodes: ClassVar[bool] = False

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for heads that cost the same, given features of the same shapes."""
        segments, graph = self.route.segments, id(self.bound.graph)
        works = [self.bound.works_like(segment) for segment in segments]
        if segments and None not in works:
            joined = [a.stop == b.start for a, b in pairwise(segments)]
            return graph, *works, *joined, *self._needs.guessed
        return graph, self.cut.after, *segments

    @property
    def prices(self) -> dict[Any, Any]:
        """What heads cost, kept with the captured model."""
        prices: dict[Any, Any] = self.bound.graph.memo.setdefault("prices", {})
        return prices

    @property
    def sides(self) -> tuple[str, ...]:
        """What the head reads beside the features, by name."""
        return tuple(node.name for node in self._needs.sides)

    @cached_property
    def _needs(self) -> Needs:
        return find_needs(self.bound.graph, self.cut, self.route)

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        return self.joint_head([features], signal)

    def joint_head(self, features: Sequence[TensorSpec], signal: TensorSpec) -> nn.Module:
        """The head as it is priced: with a loss that runs on anything."""
        return self._build(_stand_in)

    def task_head(self) -> nn.Module:
        """The head as it trains, with the task's loss."""
        return self._build(self.bound.criterion)

    def _build(self, criterion: Callable[[Any, Any], Tensor] | None) -> nn.Module:
        graph, weights = self.bound.graph, self.bound.objective.weights
        return build_head(graph, self.cut, self.route, self._needs, weights, make_criterion(graph, criterion))


def _stand_in(output: Any, target: Any) -> Tensor:
    """A loss with the memory of cross-entropy, of whatever the model returns."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    terms = [leaf.float().reshape(leaf.shape[0] if leaf.ndim else 1, -1).log_softmax(1).mean() for leaf in leaves]
    return torch.stack(terms).sum()
