"""Which operations of a stage's code draw random numbers, and which of them do so inside a kernel."""

from __future__ import annotations

import torch
from torch import fx

from autodecouple.graph import LEAF
from autodecouple.passes.capturing.autocast import called

_NAME_AT = {"dropout": 3, "attention": 1, "seeded": 2, "seeded_rows": 2}
"""Methods of Randomness, and where the node's name stands among the arguments, the randomness itself included."""


def masked_draws(body: fx.GraphModule, device: torch.device) -> list[str]:
    """The nodes whose mask is drawn before it is used."""
    return [name for name, method in _draws(body) if not _in_kernel(method, device)]


def kernel_draws(body: fx.GraphModule, device: torch.device) -> list[str]:
    """The nodes that draw inside a kernel or a whole module: no mask of theirs can be drawn elsewhere."""
    return [name for name, method in _draws(body) if _in_kernel(method, device)]


def whole_modules(body: fx.GraphModule) -> list[str]:
    """Modules that run as the user wrote them, with whatever their Python code does."""
    return [node.name for node in body.graph.nodes if LEAF in node.meta]


def _draws(body: fx.GraphModule) -> list[tuple[str, str]]:
    found = []
    for node in body.graph.nodes:
        if node.op not in ("call_method", "call_function"):
            continue
        method, args = called(node)
        if isinstance(method, str) and method in _NAME_AT:
            found.append((str(args[_NAME_AT[method]]), method))
    return found


def _in_kernel(method: str, device: torch.device) -> bool:
    return method in ("seeded", "seeded_rows") or (method == "attention" and device.type != "cpu")
