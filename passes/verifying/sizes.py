"""Whether a capture takes a batch of another size behind one of the example's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autodecouple.errors import TraceError
from autodecouple.graph import Graph
from autodecouple.passes.verifying.snapshot import preserved, seeded

Call = tuple[tuple[Any, ...], dict[str, Any]]


def takes_other_sizes(graph: Graph, calls: Sequence[Call]) -> None:
    """Run the capture on batches of several sizes in a row, in the mode that the model is in.

    Modules that run whole may keep something of the last batch in an attribute, such as a state that they go on from.
    Raises TraceError, naming the attributes, where the capture fails behind another batch and the model does not.
    """
    failed = _failure(graph.train, graph.model, calls)
    if failed is None or _failure(graph.model, graph.model, calls) is not None:
        return
    error, kept = failed
    raise TraceError(
        f"the captured graph takes no batch of another size, which {type(graph.model).__name__} does:"
        f" {type(error).__name__}: {str(error).splitlines()[0]}. Of the batch before, "
        + (f"{', '.join(kept[:3])} is kept" if kept else "something is kept")
        + " in a module that runs whole: let its forward begin anew, or pass the state in as an input"
    ) from error


def _failure(module: nn.Module, model: nn.Module, calls: Sequence[Call]) -> tuple[Exception, tuple[str, ...]] | None:
    """What the first call that fails raises, and what the calls before it left behind."""
    with preserved(model, module) as snapshot, torch.enable_grad(), seeded():
        for call in calls:
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, call)  # a forward may write into its inputs
            kept = snapshot.hidden()
            try:
                module(*args, **kwargs)
            except Exception as error:
                return error, kept
    return None
