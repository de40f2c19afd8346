"""What a run of a model may leave behind, kept and put back: tensors, gradients, attributes, random states."""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_CONTAINERS = (dict, OrderedDict, list, set, deque)
_PLAIN = (int, float, complex, str, bytes, tuple, torch.dtype, torch.device, torch.Size)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def preserved(*modules: nn.Module) -> Iterator[Snapshot]:
    """Give the modules, and the random states outside torch, back as they were; also after an error.

    Meanwhile no parameter has a gradient, and hooks that act on a finished one (an optimizer in backward) are silent.
    """
    snapshot = Snapshot(*modules)
    try:
        with snapshot.without_gradients():
            yield snapshot
    finally:
        snapshot.restore()


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draw from a fixed random state for a while; the caller's comes back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class Snapshot:
    """The modules, with all below them, as they were when this was made.

    Tensors are parameters, buffers and tensors that are plain attributes. Of attributes, the values of numbers, strings
    and tuples are kept, one level of containers, and the states of torch generators; what deeper objects hold is not.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.model = modules[0]
        found = list(dict.fromkeys(m for root in modules for m in root.modules()))
        self.attributes = {m: dict(vars(m)) for m in found}
        held = [v for kept in self.attributes.values() for v in kept.values()]
        self.contents = {id(v): (v, _copy(v)) for v in held if type(v) in _CONTAINERS}
        self.generators = {id(v): (v, v.get_state()) for v in held if isinstance(v, torch.Generator)}
        tensors = [t for m in found for t in (*m._parameters.values(), *m._buffers.values())]
        own = {id(t): t for t in (*tensors, *held) if isinstance(t, torch.Tensor) and not is_lazy(t)}
        self.tensors = {key: (t, t.detach().clone(), t.requires_grad) for key, t in own.items()}
        self.libraries = {name: _state(get) for name, (get, _) in _libraries().items()}

    @contextlib.contextmanager
    def without_gradients(self) -> Iterator[None]:
        leaves = [t for t, _, _ in self.tensors.values() if t.is_leaf]
        gradients = [t.grad for t in leaves]
        hooks = [(found, dict(found)) for t in leaves if (found := getattr(t, "_post_accumulate_grad_hooks", None))]
        try:
            for t in leaves:
                t.grad = None
            for found, _ in hooks:
                found.clear()
            yield
        finally:
            for t, gradient in zip(leaves, gradients, strict=True):
                t.grad = gradient
            for found, kept in hooks:
                found.update(kept)

    def restore(self) -> None:
        for module, kept in self.attributes.items():
            if not _alike(vars(module), kept):
                vars(module).clear()
                vars(module).update(kept)
        for container, content in self.contents.values():
            if not _alike(container, content):
                _refill(container, content)
        with torch.no_grad():
            for tensor, value, needs_grad in self.tensors.values():
                if not same_values(tensor, value):
                    tensor.copy_(value)
                if tensor.requires_grad != needs_grad:
                    tensor.requires_grad_(needs_grad)
        for generator, state in self.generators.values():
            generator.set_state(state)
        for name, (_, set_) in _libraries().items():
            set_(pickle.loads(self.libraries[name]))

    def hidden(self) -> tuple[str, ...]:
        """What a graph cannot know of and has changed since: attributes of the model's modules, by name, and the random
        states of other libraries."""
        found = [
            f"{path}.{key}".strip(".")
            for path, module in self.model.named_modules()
            for key in (self._changed(module) if module in self.attributes else [""])  # a new module
        ]
        drawn = [name for name, (get, _) in _libraries().items() if _state(get) != self.libraries[name]]
        return (*found, *drawn)

    def _changed(self, module: nn.Module) -> list[str]:
        before, now = self.attributes[module], vars(module)
        keys = [key for key in dict.fromkeys([*before, *now]) if key not in _OF_EVERY_MODULE]
        return [key for key in keys if key not in now or key not in before or not self._same(before[key], now[key])]

    def _same(self, before: Any, now: Any) -> bool:
        if isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor):
            return same_values(self.tensors[id(before)][1], now)
        if isinstance(before, _PLAIN) and type(before) is type(now):
            return bool(before == now)
        if before is not now:
            return False
        if id(now) in self.generators:
            return torch.equal(self.generators[id(now)][1], now.get_state())
        return id(now) not in self.contents or _alike(now, self.contents[id(now)][1])


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one shape, dtype, device and, NaN apart, values."""
    if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
        return False
    if a.is_meta:
        return True
    if a.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    return torch.equal(a, b)


def _copy(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _alike(container: Any, content: Any) -> bool:
    """Whether a container still holds the very same things."""
    a, b = _copy(container), content
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[key] is b[key] for key in a)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _refill(container: Any, content: Any) -> None:
    container.clear()
    getattr(container, "update" if isinstance(container, (dict, set)) else "extend")(content)


def _state(get: Callable[[], Any]) -> bytes:
    return pickle.dumps(get())


def _libraries() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """How to read and set the random states that models draw from beside torch's."""
    found: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]
    found = {"Python's random": (random.getstate, random.setstate)}
    if (numpy := sys.modules.get("numpy")) is not None:
        found["numpy.random"] = (numpy.random.get_state, numpy.random.set_state)
    return found
