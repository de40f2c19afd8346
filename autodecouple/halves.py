"""A backward in two halves: the inputs' gradients, for which the stage before waits, and those of the weights.

    plain    lane 0   F0 F1 .. .. .. B0 ..        B0 of lane 1 takes twice as long as is needed to go on
             lane 1      F0 B0    F1 B1
    halves   lane 0   F0 F1 .. .. B0 W0 ..        the weights' half (W) is done when nothing else is to do
             lane 1      F0 B0 F1 B1 W0 W1

How torch.distributed.pipelining splits a graph (Qi et al. 2024): where a weight's branch joins the way from the inputs to
the outputs, the gradient that comes by is kept, and the branch goes on from it later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node

Half = Callable[[], None]


def backward_inputs(
    outputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[nn.Parameter],
) -> Half:
    """Give every input its gradient, as `.grad`; what is returned adds those of the weights, once, whenever it is called.

    outputs: of one graph, with their gradients; inputs: leaves. An output that no input leads to is left for later as
    a whole.
    """
    leaves = {node for node in map(_root, inputs) if node is not None}
    pairs = list(zip(outputs, gradients, strict=True))
    later = [pair for pair in pairs if not _leads_to(_root(pair[0]), leaves)]
    now = [(_detachable(output), gradient) for output, gradient in pairs if _leads_to(_root(output), leaves)]
    groups = _inputs_half(now, inputs, weights)

    def weights_half() -> None:
        if later:  # first, and it keeps its graph: both halves may come to the same weights
            torch.autograd.backward([y for y, _ in later], [g for _, g in later], retain_graph=bool(groups))
        if groups:
            _weights_half(groups, weights)

    return weights_half


def _inputs_half(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], inputs: Sequence[torch.Tensor], weights: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    from torch.distributed.pipelining._backward import stage_backward_input  # takes seconds to import

    if not pairs:
        return []
    _, groups = stage_backward_input([y for y, _ in pairs], [g for _, g in pairs], list(inputs), iter(weights))
    return groups


def _weights_half(groups: list[dict[str, Any]], weights: Sequence[nn.Parameter]) -> None:
    from torch.distributed.pipelining._backward import stage_backward_weight

    stage_backward_weight(iter(weights), groups)


def _detachable(output: torch.Tensor) -> torch.Tensor:
    """The outputs lose their graph in place, which views cannot, and which an input that is passed on must not."""
    return output.clone() if output._is_view() or output.is_leaf else output


def _root(tensor: torch.Tensor) -> Node | None:
    """Where a tensor's graph begins, seen from its end; of a leaf the node that adds to its gradient."""
    return torch.autograd.graph.get_gradient_edge(tensor).node if tensor.requires_grad else None


def _leads_to(root: Node | None, leaves: set[Node]) -> bool:
    """Whether a way back from here ends at one of the leaves."""
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node in leaves:
            return True
        following = {other for other, _ in node.next_functions} - seen
        seen |= following
        waiting += following
    return False
