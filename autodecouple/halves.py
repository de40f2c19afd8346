"""A backward in two halves: the inputs' gradients, for which the stage before waits, and those of the weights.

    whole    lane 0   F0 F1 .. .. .. B0 ..       B0 of lane 1 takes twice as long as is needed to go on
             lane 1   .. F0 B0 B0 F1 B1 B1
    halves   lane 0   F0 F1 .. .. B0 W0 ..       the weights' half (W) is done when nothing else is to do
             lane 1   .. F0 B0 F1 B1 W0 W1

The graph is a way from outputs back to inputs, with branches that end in weights (Qi et al. 2024, section 4.1):

    output <-- mm <-- tanh <-- mm <-- input      where a branch leaves the way is a junction; the gradient that comes
               |               |                 by there in the first half is kept, and in the second half the branch
             weight          weight              goes on from it
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Half = Callable[[], None]
Parents = Mapping[Node, Collection[Node]]
Kept = dict[Node, tuple[torch.Tensor | None, ...]]


@dataclass(frozen=True)
class _Branches:
    """Weights (the nodes that add to their gradients) and all junctions that lead to any of them."""

    weights: frozenset[Node]
    junctions: frozenset[Node]


def backward_inputs(
    outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> Half:
    """Give every input its gradient; what is returned, called once, adds those of all other leaves: the weights.

    outputs: that require a gradient, with their gradients; inputs: leaves
    Twice as much is done as needed only where a weight is used several times on one way.
    """
    roots = [get_gradient_edge(output).node for output in outputs]
    parents = _parents(roots)
    leaves = {get_gradient_edge(x).node for x in inputs if x.requires_grad}
    way = _climb(leaves & parents.keys(), parents)
    branches = _branches(parents, leaves, way)
    pairs = list(zip(roots, outputs, gradients, strict=True))
    kept: Kept = {}
    with ExitStack() as hooks:
        for junction in {junction for group in branches for junction in group.junctions}:
            hooks.callback(junction.register_prehook(_keeper(kept, junction)).remove)
        if now := [(output, gradient) for root, output, gradient in pairs if root in way]:
            torch.autograd.backward(*_columns(now), inputs=list(inputs), retain_graph=True)
    later = [(output, gradient) for root, output, gradient in pairs if root not in way]

    def weights_half() -> None:
        if later:
            torch.autograd.backward(*_columns(later), retain_graph=True)
        for group in branches:
            _follow(group, kept)

    return weights_half


def _follow(group: _Branches, kept: Kept) -> None:
    """Go on from the junctions to the weights. What comes to one junction from another is in what was kept there."""
    pairs = [
        (GradientEdge(junction, index), gradient)
        for junction in group.junctions
        for index, gradient in enumerate(kept.get(junction, ()))
        if gradient is not None
    ]
    with ExitStack() as hooks:
        for junction in group.junctions & kept.keys():
            hooks.callback(junction.register_prehook(lambda _, known=kept[junction]: known).remove)
        if pairs:
            weights = [weight.variable for weight in group.weights]  # type: ignore[attr-defined]
            torch.autograd.backward(*_columns(pairs), inputs=weights, retain_graph=True)


def _keeper(kept: Kept, junction: Node) -> Callable[[Any], None]:
    def keep(gradients: tuple[torch.Tensor | None, ...]) -> None:
        kept[junction] = gradients

    return keep


def _parents(roots: Iterable[Node]) -> dict[Node, set[Node]]:
    """All nodes of the graph, each with those that pass gradients on to it."""
    found: dict[Node, set[Node]] = {root: set() for root in roots}
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            if child not in found:
                found[child] = set()
                waiting.append(child)
            found[child].add(node)
    return found


def _climb(starts: Iterable[Node], parents: Parents, stop: Collection[Node] = ()) -> set[Node]:
    """The nodes that lead to these, and these; up to those where to stop."""
    seen = set(starts)
    waiting = list(seen)
    while waiting:
        node = waiting.pop()
        if node not in stop:
            waiting += [parent for parent in parents[node] if parent not in seen]
            seen.update(parents[node])
    return seen


def _branches(parents: Parents, leaves: Collection[Node], way: set[Node]) -> list[_Branches]:
    """Weights with their junctions; those that share a junction together, so that it is passed once."""
    groups: list[_Branches] = []
    ends = (node for node in parents if not node.next_functions and hasattr(node, "variable"))
    for weight in (node for node in ends if node not in leaves):
        group = _Branches(frozenset([weight]), frozenset(_climb([weight], parents, way) & way))
        if not group.junctions:
            continue
        near = [other for other in groups if other.junctions & group.junctions]
        groups = [other for other in groups if other not in near]
        groups.append(_union([group, *near]))
    return groups


def _union(groups: Sequence[_Branches]) -> _Branches:
    return _Branches(
        frozenset().union(*(group.weights for group in groups)),
        frozenset().union(*(group.junctions for group in groups)),
    )


def _columns(pairs: Sequence[tuple[Any, torch.Tensor]]) -> tuple[list[Any], list[torch.Tensor]]:
    return [first for first, _ in pairs], [second for _, second in pairs]
