"""The length of the gradient at every module of a network, batch after batch, whatever trains it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class GradientNorms:
    """Watches the parameters of some modules: each gradient as it lands on its parameter, before any update.

    Local training leaves the gradients where backprop would, on the network's own parameters, and removes them after
    the update; heads are none of the modules. A batch must give every parameter one gradient: no micro-batches.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._squares: dict[str, list[list[Tensor]]] = {}
        self._handles = []
        for name, module in modules.items():
            self._squares[name] = [[] for _ in module.parameters()]
            for parameter, squares in zip(module.parameters(), self._squares[name], strict=True):
                self._handles.append(parameter.register_post_accumulate_grad_hook(_noting(squares)))

    def close(self) -> dict[str, list[float]]:
        """Stop watching; the norm at each module, one per batch."""
        for handle in self._handles:
            handle.remove()
        return {name: _norms(squares) for name, squares in self._squares.items() if squares}


def _noting(squares: list[Tensor]):
    def note(parameter: Tensor) -> None:
        assert parameter.grad is not None
        squares.append(parameter.grad.square().sum())  # a number only when all is over: asking waits for the device

    return note


def _norms(squares: Sequence[Sequence[Tensor]]) -> list[float]:
    """Over the parameters of a module; those that a loss does not reach count 0."""
    reached = [torch.stack(list(each)) for each in squares if each]
    return torch.stack(reached).sum(0).sqrt().tolist() if reached else []


def layers(network: nn.Module) -> dict[str, nn.Module]:
    """The network's parts in order: what lies in its lists of layers one by one, the rest whole."""
    parts: dict[str, nn.Module] = {}
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and name != "classifier":
            parts |= {f"{name}.{index}": layer for index, layer in child.named_children()}
        else:
            parts[name] = child
    return parts


def ends(norms: Sequence[float], share: float = 0.1) -> tuple[float, float]:
    """Medians over the first and the last `share` of the batches."""
    count = max(1, round(share * len(norms)))
    return statistics.median(norms[:count]), statistics.median(norms[-count:])
