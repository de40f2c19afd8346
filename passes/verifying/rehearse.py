"""Run a model, or its capture, on the example and keep what it did; the model stays as it was.

With gradients in evaluation too: without them nn.TransformerEncoder takes a kernel that fills padding with zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autodecouple.passes.verifying.snapshot import preserved, seeded

Tensor = torch.Tensor


@dataclass(frozen=True)
class Rehearsal:
    """What to run: the model's example call, in one mode.

    training:  True for the mode in which the user left the model's parts (those frozen with .eval() stay so)
    gradients: whether a backward follows the first call, from a fixed random gradient of every floating point output
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    gradients: bool = False

    def run(self, module: nn.Module, *, batches: int = 1) -> Run:
        """Call the module, the model itself or a graph over its tensors, on the same example several times in a row.

        What the module raises passes through.
        """
        with preserved(self.model, module) as snapshot, torch.enable_grad():
            _prepare(self.model, self.training)
            first = self._call(module, 0)
            buffers = _buffers(self.model)  # before a backward that runs a part of the forward again (checkpoint)
            refused = _backward(first) if self.gradients else ""  # before the next call, which may write into it
            outputs = [_released(first)]
            outputs += [_released(self._call(module, seed)) for seed in range(1, batches)]
            buffers = buffers if batches == 1 else _buffers(self.model)
            return Run(tuple(outputs), _gradients(self.model), buffers, snapshot.hidden(), refused)

    def outputs(self, module: nn.Module) -> Any:
        """The outputs of one call, with their autograd graph."""
        with preserved(self.model, module), torch.enable_grad():
            _prepare(self.model, self.training)
            return self._call(module, 0)

    def inputs(self) -> Any:
        """A fresh copy of (args, kwargs): a forward may write into its inputs, and a backward ends at them."""
        return pytree.tree_map_only(Tensor, _fresh, (self.args, self.kwargs))

    def _call(self, module: nn.Module, seed: int) -> Any:
        args, kwargs = self.inputs()
        with seeded(seed):
            return module(*args, **kwargs)


@dataclass(frozen=True)
class Run:
    """What a module did.

    outputs:   of each batch
    gradients: by parameter, of the first batch; None where none arrived
    buffers:   afterwards, by name
    hidden:    attributes and random states that a graph cannot know of and that changed
    refused:   why autograd went no further, where a forward writes into what its own backward needs
    """

    outputs: tuple[Any, ...]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    hidden: tuple[str, ...]
    refused: str = ""


@contextlib.contextmanager
def own_errors(model: nn.Module) -> Iterator[None]:
    """Say of what the original raises that it was the original."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by {type(model).__name__} itself, run as it is on the example inputs")
        raise


def _prepare(model: nn.Module, training: bool) -> None:
    """Evaluation or training mode for all of the model, but parts that the user froze with .eval() stay frozen."""
    if not training or not model.training:
        model.train(training)


def _fresh(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _backward(output: Any) -> str:
    """From a random gradient of every output: what is lost anywhere shows in some parameter.

    It is drawn also for outputs that need none, so that all others have the same in the model and its capture.
    Returns why autograd refused, "" if it did not: stages, which copy what is written into later, may go through yet.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    floating = [leaf for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()]
    with seeded():
        gradients = [torch.randn(leaf.shape, dtype=leaf.dtype).to(leaf.device) for leaf in floating]
    ends = [(leaf, gradient) for leaf, gradient in zip(floating, gradients, strict=True) if leaf.requires_grad]
    try:
        if ends:
            torch.autograd.backward([leaf for leaf, _ in ends], [gradient for _, gradient in ends])
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return str(error)
    return ""


def _released(output: Any) -> Any:
    """Values that later writes, into buffers that were returned, do not reach."""
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), output)


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
