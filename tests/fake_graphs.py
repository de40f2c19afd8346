"""CUDA graphs without a GPU: what is recorded are the operators and their memory, and a replay runs them there again.

As on a device, recording runs nothing (all memory is put back), asking for a value fails, drawing random numbers fails,
and what Python code decided while it was recorded stays decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autodecouple.backends.recorder import Recorders

aten = torch.ops.aten


@dataclass
class Call:
    func: Any
    args: Any
    kwargs: Any
    made: list[tuple[int, Tensor]]
    """Of its outputs, by position: those in memory of their own."""


@dataclass
class FakeGraph:
    calls: list[Call] = field(default_factory=list)
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for call in self.calls:
                found = pytree.tree_leaves(call.func(*call.args, **call.kwargs))
                for position, memory in call.made:
                    memory.copy_(found[position])


class _Recording(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph
        self.own: dict[int, torch.UntypedStorage] = {}  # alive, so that no other memory comes to lie there
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is not None:
            raise RuntimeError("a generator that the graph does not know draws while stream is capturing")
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.own:
                storage = leaf.untyped_storage()
                self.before.setdefault(storage._cdata, (storage, storage.clone()))
        given = _aliases((args, kwargs))
        out = func(*args, **kwargs)
        leaves = list(enumerate(pytree.tree_leaves(out)))
        made = [(i, x) for i, x in leaves if isinstance(x, Tensor) and self._is_new(x)]
        self.own |= {x.untyped_storage()._cdata: x.untyped_storage() for _, x in made}
        made = [] if func._opname.startswith("empty") else made  # holds nothing, and may have been resized since
        self.graph.calls.append(Call(func, *given, _aliases(made)))
        return out

    def _is_new(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata not in self.own.keys() | self.before.keys()


def _aliases(values: Any) -> Any:
    """The same memory; operators such as squeeze_ change later what a tensor makes of it."""
    return pytree.tree_map_only(Tensor, lambda x: x.detach(), values)


class FakeRecorder:
    def __init__(self) -> None:
        self.graphs: list[FakeGraph] = []

    def record(self, work: Callable[[], Any]) -> tuple[FakeGraph, Any]:
        graph = FakeGraph()
        recording = _Recording(graph)
        try:
            with recording:
                found = work()
        finally:
            for storage, value in recording.before.values():
                storage.copy_(value)
        self.graphs.append(graph)
        return graph, found


@contextmanager
def fake_graphs() -> Iterator[FakeRecorder]:
    """Stages on the processor are recorded by the one that this gives."""
    recorder = FakeRecorder()
    with mock.patch.object(Recorders, "of", lambda self, stage: recorder):
        yield recorder
