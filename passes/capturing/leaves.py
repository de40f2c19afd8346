"""Modules that no graph can hold run whole: each of their calls is one operation, the call of the user's own module.

While torch.export traces, `opaque.leaf` stands for them. Afterwards the call itself takes its place, with the
parameters and buffers of the module as its first argument, so that every pass sees what it uses:

    leaf_moe = self.leaf_moe;  moe = leaf_moe.forward([weight, bias], x, None)
"""

from __future__ import annotations

import contextlib
import enum
import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from autodecouple.errors import TraceError
from autodecouple.graph import LEAF
from autodecouple.passes.capturing import opaque
from autodecouple.passes.capturing.observe import OpaqueError, is_number, sizes_of, uses_of
from autodecouple.passes.capturing.opaque import Made, Sight
from autodecouple.passes.capturing.surroundings import Setting, cache_settings, called_instead, held

Tensor = torch.Tensor


class _Slot(enum.Enum):
    """What stands at a place of a call and is no constant."""

    TENSOR = enum.auto()
    NUMBER = enum.auto()

    @staticmethod
    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _Slot.TENSOR
        return _Slot.NUMBER if is_number(value) else value


@dataclass(frozen=True)
class _Traced:
    """A call as export met it: its flat inputs, slots and constants, and the modes around it."""

    path: str
    slots: tuple[Any, ...]
    gradients: bool
    autocast: tuple[tuple[str, torch.dtype], ...]


class Leaf(nn.Module):
    """One call of a module that runs whole: `forward(uses, *inputs)` gives the tensors that it returns, as a list.

    The module is the user's own, with its hooks, its control flow and its autograd; it is no submodule of this one, so
    that nothing sees its parameters twice. On fake tensors it does what it was seen to do.
    """

    def __init__(self, module: nn.Module, traced: _Traced, sight: Sight) -> None:
        super().__init__()
        self.path = traced.path
        self.sight = sight
        self.gradients = traced.gradients
        self.autocast = traced.autocast
        tensors = [i for i, slot in enumerate(traced.slots) if slot is _Slot.TENSOR]
        self._written = tuple(tensors[i] for i in sight.writes)
        self._carrying = tuple(tensors[i] for i in sight.carrying if i not in sight.writes)
        self._module = (module,)
        # its flags may be changed between two batches, by model.eval()
        flags: list[Setting] = [(m, "training", m.training) for m in module.modules()]
        self._settings = (*flags, *cache_settings(module))

    @property
    def module(self) -> nn.Module:
        return self._module[0]

    def forward(self, uses: Sequence[Tensor], *inputs: Any) -> list[Tensor]:
        if detect_fake_mode([*uses, *inputs]) is not None:
            return self._imitate(uses, inputs)
        args, kwargs = pytree.tree_unflatten(self._attached(inputs), self.sight.in_spec)
        with contextlib.ExitStack() as stack:
            stack.enter_context(held(self._settings))
            for device, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype))
            if not self.gradients:
                stack.enter_context(torch.no_grad())
            result = self.module(*args, **kwargs)
        return self._tensors(result, inputs)

    def _attached(self, inputs: Sequence[Any]) -> list[Any]:
        """What carried a gradient at the capture does so now, behind a cut too: a hook or torch.autograd.grad in the
        module may ask for it."""
        found = list(inputs)
        for i in self._carrying if torch.is_grad_enabled() else ():
            found[i] = found[i] if found[i].requires_grad else found[i].detach().requires_grad_()
        return found

    def _tensors(self, result: Any, inputs: Sequence[Any]) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(result)
        expected = self.sight.outputs
        kinds = [isinstance(leaf, Made) for leaf in expected]
        if spec != self.sight.out_spec or [isinstance(leaf, Tensor) for leaf in leaves] != kinds:
            raise TraceError(
                f"{self.path!r} runs whole and returned something else than at the capture: {_kinds(leaves)} instead"
                f" of {_kinds(expected)}. Let it return tensors in one structure for every batch"
            )
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        sizes = sizes_of(inputs)
        for tensor, made in zip(tensors, self.sight.made, strict=True):
            if (promised := tuple(size.of(sizes) for size in made.shape)) != tensor.shape:
                raise TraceError(
                    f"{self.path!r} runs whole and returned a tensor of shape {tuple(tensor.shape)}, where its inputs"
                    f" promised {promised}, as at the capture: let its shape depend on theirs alone"
                )
        return tensors

    def _imitate(self, uses: Sequence[Tensor], inputs: Sequence[Any]) -> list[Tensor]:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        with contextlib.nullcontext() if self.gradients else torch.no_grad():
            made = opaque.leaf(list(uses), tensors, [x for x in inputs if is_number(x)], self.sight.key)
        sources = [*uses, *tensors]
        shared = [sources[m.source] if m.source is not None else None for m in self.sight.made]
        return [_in_memory_of(s, t) if s is not None else t for s, t in zip(shared, made, strict=True)]

    def written(self, node: fx.Node) -> list[fx.Node]:
        """What its call may write into: the buffers of the module, and inputs that it was seen to write into."""
        uses, *inputs = node.args[1:]
        assert isinstance(uses, (list, tuple))
        buffers = uses[len(list(self.module.parameters())) :]
        return [x for x in (*buffers, *(inputs[i] for i in self._written)) if isinstance(x, fx.Node)]

    def extra_repr(self) -> str:
        return f"{self.path}: {type(self.module).__name__}"


def _in_memory_of(source: Tensor, like: Tensor) -> Tensor:
    """A tensor of this form whose memory is the source's; which part of it does not matter."""
    if source.shape == like.shape:
        return source.view_as(source)
    stride = like.stride() if like.numel() <= source.untyped_storage().nbytes() // source.element_size() else ()
    return source.as_strided(like.shape, stride or [0] * like.ndim, 0)


def _kinds(leaves: Iterable[Any]) -> str:
    names = ["tensor" if isinstance(leaf, (Tensor, Made)) else repr(leaf) for leaf in leaves]
    return f"({', '.join(names)})"


class Leaves:
    """The modules of one export that run whole: opaque while it traces, called themselves in its result."""

    def __init__(self, model: nn.Module, sights: Mapping[str, Sequence[Sight]]) -> None:
        self.model = model
        self.sights = sights
        self._traced: dict[int, _Traced] = {}
        self._known = {sight.key: sight for calls in sights.values() for sight in calls}

    @contextlib.contextmanager
    def opaque(self) -> Iterator[None]:
        """Let `opaque.leaf` stand for them while export traces."""
        with contextlib.ExitStack() as stack:
            for path, sights in self.sights.items():
                call = functools.partial(self._call, path, itertools.cycle(sights))
                stack.enter_context(called_instead(self.model.get_submodule(path), call))
            yield

    def _call(self, path: str, sights: Iterator[Sight], *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        sight = next(sights)
        if spec != sight.in_spec:
            raise OpaqueError(f"{path!r} is called in another way than in a run of the model")
        if any(isinstance(x, torch.SymBool) for x in leaves):
            raise OpaqueError(f"{path!r} is handed a decision on the data, which no graph can hold")
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        modes = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
        self._traced[sight.key] = _Traced(path, tuple(map(_Slot.of, leaves)), torch.is_grad_enabled(), modes)
        uses = uses_of(self.model.get_submodule(path))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        made = iter(opaque.leaf(uses, tensors, [x for x in leaves if is_number(x)], sight.key))
        result = [next(made) if isinstance(x, Made) else x for x in sight.outputs]
        return pytree.tree_unflatten(result, sight.out_spec)

    def settle(self, module: fx.GraphModule) -> list[str]:
        """Put the calls into the captured graph; returns the paths of the modules that are in it."""
        inner = [m for m in module.modules() if isinstance(m, fx.GraphModule) and m is not module]
        if any(m.graph.find_nodes(op="call_function", target=opaque.leaf) for m in inner):
            raise OpaqueError("it is called inside a branch or a loop of the graph")
        numbers: Counter[str] = Counter()
        for node in module.graph.find_nodes(op="call_function", target=opaque.leaf):
            traced = self._traced[int(node.args[3])]
            numbers[traced.path] += 1
            self._replace(module, node, traced, numbers[traced.path])
        module.recompile()
        return list(numbers)

    def _replace(self, module: fx.GraphModule, node: fx.Node, traced: _Traced, number: int) -> None:
        uses, tensors, sizes, key = node.args
        leaf = Leaf(self.model.get_submodule(traced.path), traced, self._known[int(key)])  # type: ignore[arg-type]
        base = traced.path.replace(".", "_")
        name = f"leaf_{base}" if number == 1 else f"leaf_{base}_{number}"
        module.add_submodule(name, leaf)
        given = {_Slot.TENSOR: iter(tensors), _Slot.NUMBER: iter(sizes)}  # type: ignore[arg-type]
        inputs = [next(given[slot]) if isinstance(slot, _Slot) else slot for slot in traced.slots]
        with module.graph.inserting_before(node):
            owner = module.graph.get_attr(name)
            call = module.graph.call_method("forward", (owner, uses, *inputs))
        call.meta = {**node.meta, LEAF: leaf}
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
        call._rename(base)
