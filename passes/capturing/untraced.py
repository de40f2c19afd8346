"""What torch.export leaves out in silence, noticed while it traces.

It inlines the forward of a torch.autograd.Function and forgets its backward, it forgets hooks on tensors and on what
autograd saves, and it takes `len(x)` for a number. A module that does such a thing had better run whole; checkpoint()
only changes what is kept.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.autograd import function
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.symbolic_shapes import ShapeEnv

CHECKPOINTED = (
    "the model calls torch.utils.checkpoint, which a graph cannot hold: its layers are captured as they are, and the"
    " stages keep their activations. recompute=True has every stage recompute them"
)


_Base: Any = function._SingleLevelFunction
"""What `torch.autograd.Function.apply` calls: models keep references to `apply` itself."""


class LostError(Exception):
    """Something that a graph would lose without a word."""


class FixedError(LostError):
    """The batch would have as many rows as the example from here on."""


@contextlib.contextmanager
def noticing(rows: int | None = None) -> Iterator[list[str]]:
    """Raise LostError where this thread would lose something; gives the list of what to tell the user.

    rows: of the example; raise FixedError too where the graph would be tied to them. None allows it
    """
    notes: list[str] = []
    watch = _Watch(threading.get_ident(), notes, rows)
    with (
        mock.patch.object(_Base, "apply", classmethod(watch.apply), create=True),
        mock.patch.object(torch.Tensor, "register_hook", watch.wrapped(torch.Tensor.register_hook)),
        mock.patch.object(saved_tensors_hooks, "__enter__", watch.entered(saved_tensors_hooks.__enter__)),
        mock.patch.object(ShapeEnv, "_set_replacement", watch.replaced(ShapeEnv._set_replacement)),
    ):
        yield notes


class _Watch:
    """Other threads may be training meanwhile: they are left alone."""

    def __init__(self, thread: int, notes: list[str], rows: int | None) -> None:
        self.thread = thread
        self.notes = notes
        self.rows = rows

    @property
    def here(self) -> bool:
        return threading.get_ident() == self.thread and torch.is_grad_enabled()

    def apply(self, cls: Any, *args: Any, **kwargs: Any) -> Any:
        if self.here and not _known(cls):
            raise LostError(f"{cls.__qualname__} has a backward of its own, which a graph would lose")
        below: Any = super(_Base, cls)
        return below.apply(*args, **kwargs)

    def wrapped(self, register_hook: Any) -> Any:
        def register(tensor: torch.Tensor, hook: Any) -> Any:
            if self.here:
                raise LostError("a hook is registered on a tensor in the forward, which a graph would lose")
            return register_hook(tensor, hook)

        return register

    def entered(self, enter: Any) -> Any:
        def notice(hooks: saved_tensors_hooks) -> Any:
            if self.here and type(hooks).__module__ == "torch.utils.checkpoint":
                self.notes.append(CHECKPOINTED)
            elif self.here and not isinstance(hooks, save_on_cpu):
                raise LostError("saved_tensors_hooks() changes what autograd saves, which a graph would lose")
            return enter(hooks)

        return notice

    def replaced(self, replace: Any) -> Any:
        """A free size becomes a number when the model uses it as one."""

        def notice(shapes: ShapeEnv, symbol: Any, value: Any, message: str) -> None:
            if self.rows is not None and self.here and value == self.rows and symbol in shapes.var_to_sources:
                raise FixedError("it uses the number of rows as a number, and every batch would need as many")
            replace(shapes, symbol, value, message)

        return notice


def _known(cls: type) -> bool:
    """torch's own functions are those of its operators; reentrant checkpoints and module hooks are none.

    What a checkpoint that is not reentrant keeps its inputs with (torch 2.11) gives no gradient of its own.
    """
    lost = ("torch.utils.checkpoint", "torch.nn.modules._functions")
    return cls.__name__ == "_NoopSaveInputs" or (cls.__module__.startswith("torch.") and cls.__module__ not in lost)
