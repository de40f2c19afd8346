"""The caller's thread-local state, which a new thread would lose: autocast, default device, saved-tensor hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from autodecouple.errors import InputError

_KINDS = ("cpu", "cuda")
_USUAL = contextlib.nullcontext()


@dataclass(frozen=True)
class Caller:
    """What was in force where `train_step` was called."""

    autocast: tuple[tuple[str, torch.dtype], ...]
    cache_enabled: bool
    device: torch.device | None
    hooks: tuple[Callable[..., Any], Callable[..., Any]] | None

    @staticmethod
    def current() -> Caller:
        """Raises InputError where nothing could be trained: under no_grad or inference_mode."""
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise InputError("train_step was called under torch.no_grad() or inference_mode(): leave it to train")
        autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in _KINDS if torch.is_autocast_enabled(kind))
        device = torch.get_default_device()
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return Caller(
            autocast,
            torch.is_autocast_cache_enabled(),
            device if device != torch.device("cpu") else None,
            hooks,
        )

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """Re-enter this state, here and now; what a thread begins with needs no entering."""
        is_usual = not self.autocast and self.device is None and self.hooks is None
        return _USUAL if is_usual and torch.is_grad_enabled() else self._entered()

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self.cache_enabled))
            if self.autocast:
                # Weights once cast are remembered until the outermost autocast is left. Where that is the caller's,
                # around the whole loop, they would go stale with the first update.
                torch.clear_autocast_cache()
                stack.callback(torch.clear_autocast_cache)
            if self.device is not None:
                stack.enter_context(self.device)
            if self.hooks is not None:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*self.hooks))
            yield
