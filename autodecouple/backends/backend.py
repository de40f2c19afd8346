"""How the stages are run: as they are, through torch.compile, or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autodecouple.errors import InputError

NAMES = ("eager", "compile", "cuda_graphs")
"""What may be asked for by name."""
GRAPHED_MODES = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile whose outputs the next call overwrites, while other stages still read them."""


@dataclass(frozen=True)
class Backend:
    """One of NAMES, and for "compile" what torch.compile is told."""

    name: str = "eager"
    options: Mapping[str, Any] = field(default_factory=dict)


EAGER = Backend()


def resolve_backend(given: str | Mapping[str, Any]) -> Backend:
    """The backend of a name, or of options for torch.compile; raises InputError for what it does not know."""
    if isinstance(given, str) and given in NAMES:
        return Backend(given)
    if not isinstance(given, Mapping):
        names = ", ".join(map(repr, NAMES))
        raise InputError(f"backend={given!r} is not known; there are: {names}, or a dict of options for torch.compile")
    options = dict(given)
    if options.get("mode") in GRAPHED_MODES or (options.get("options") or {}).get("triton.cudagraphs"):
        raise InputError(
            f"backend={given!r} would overwrite what one stage gave while others still read it: take"
            ' backend="cuda_graphs", or mode="max-autotune-no-cudagraphs"'
        )
    try:
        torch.compile(nn.Identity(), **options)
    except Exception as error:
        raise InputError(f"backend={given!r} is no set of options for torch.compile: {error}") from error
    return Backend("compile", options)
