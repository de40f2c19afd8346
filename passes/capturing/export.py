"""torch.export of a model in one mode; what it refuses runs whole, as small a submodule as will do."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.export import Dim
from torch.utils import _pytree as pytree

from autodecouple.graph import device_of
from autodecouple.passes import verify
from autodecouple.passes.capturing import blame, untraced
from autodecouple.passes.capturing.buffers import write_early
from autodecouple.passes.capturing.leaves import Leaves
from autodecouple.passes.capturing.observe import Call, OpaqueError, observe
from autodecouple.passes.capturing.opaque import Sight
from autodecouple.passes.capturing.recurrent import draws_as_fused, shape_only, split_layers
from autodecouple.passes.capturing.regions import inline_regions, marked
from autodecouple.passes.capturing.surroundings import symbolic
from autodecouple.passes.verifying.snapshot import preserved, seeded

_LARGEST = 0.35
"""Share of the parameters that a module may have which runs whole without need: see `Export._take`."""


@dataclass(frozen=True)
class Example:
    """One batch, flat, and which of its dimensions may change: the first, and those in `dynamic`."""

    leaves: tuple[Any, ...]
    in_spec: Any
    dynamic: tuple[int, ...] = ()

    @property
    def is_real(self) -> bool:
        return not any(leaf.is_meta for leaf in self.tensors)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    @property
    def num_rows(self) -> int | None:
        """Rows of the batch: those of the first tensor that has any."""
        return next((len(tensor) for tensor in self.tensors if tensor.ndim), None)

    def call(self, leaves: Iterable[Any] | None = None) -> Call:
        args, kwargs = pytree.tree_unflatten(list(self.leaves if leaves is None else leaves), self.in_spec)
        return args, kwargs

    def fake(self, device: torch.device) -> Call:
        """Meta tensors as fake tensors of the model's device: export needs a device, and no memory."""
        if self.is_real or device.type == "meta":
            return self.call()
        with FakeTensorMode(allow_non_fake_inputs=True):
            return self.call(
                torch.empty(x.shape, dtype=x.dtype, device=device) if isinstance(x, torch.Tensor) else x
                for x in self.leaves
            )

    def free(self, leaf: Any) -> dict[int, Any] | None:
        """What export is to leave open in one input."""
        if not isinstance(leaf, torch.Tensor):
            return None
        return {dim: Dim.AUTO for dim in (0, *self.dynamic) if dim < leaf.ndim} or None

    def resized(self) -> list[Call]:
        """The example, and batches in which the rows, or one of the further free sizes, are others."""
        rows = self.num_rows
        found = [self.call()]
        if rows is not None:
            found += [self.call(_resized(leaf, 0, rows, size) for leaf in self.leaves) for size in (rows + 1, 2 * rows)]
        for dim in self.dynamic:
            for size in sorted({t.shape[dim] for t in self.tensors if t.ndim > dim and t.shape[dim] > 1}):
                found += [self.call(_resized(leaf, dim, size, n) for leaf in self.leaves) for n in (size + 1, 2 * size)]
        return found


def _resized(leaf: Any, dim: int, size: int, wanted: int) -> Any:
    """`wanted` instead of `size` elements along a dimension, drawn from them: what counts the data must not scale."""
    if not isinstance(leaf, torch.Tensor) or leaf.ndim <= dim or leaf.shape[dim] != size:
        return leaf
    index = torch.randint(size, (wanted,), generator=torch.Generator().manual_seed(wanted))
    return leaf.detach().index_select(dim, index.to(leaf.device))


@dataclass
class Export:
    """The capture of a model in the mode that it is in, as far as it has come.

    whole:   why modules run whole, by path; before `run`, those that have to
    refused: why other modules cannot
    notes:   what to tell the user of the rest
    """

    model: nn.Module
    example: Example
    whole: dict[str, str]
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _sights: dict[str, tuple[Sight, ...]] = field(default_factory=dict)
    _may_fix: bool = False

    def run(self) -> tuple[fx.GraphModule, Any]:
        """The captured graph, and how its output nests; `whole` then names the modules that it calls.

        Raises TraceError where nothing helps; what the model itself raises on the example passes through.
        """
        required, self.whole = self.whole, {}
        for path, reason in required.items():
            if path not in self._sights and not self._take(_enclosing(path), reason):
                raise blame.explain(self.model, untraced.LostError(f"{path or 'the model'!r}: {reason}"), self.refused)
        while True:
            failure = self._attempt()
            if not isinstance(failure, Exception):
                return failure
            if not self.whole and not self.refused:
                self._run_original()  # not in a handler: its own error stands alone, without torch's in front
            if isinstance(failure, OpaqueError):
                self._put_back(failure)
            fixed = isinstance(failure, untraced.FixedError)
            paths = blame.modules_of(self.model, failure)
            if not (fixed and self._is_fixed()) and self._take(paths, blame.reason(failure), small=fixed):
                continue
            if not fixed:
                raise blame.explain(self.model, failure, self.refused) from failure
            self._may_fix = True

    def _attempt(self) -> tuple[fx.GraphModule, Any] | Exception:
        leaves = Leaves(self.model, self._sights)
        try:
            with untraced.noticing(None if self._may_fix else self.example.num_rows) as notes, leaves.opaque():
                program = _export(self.model, self.example)
            module = program.module(check_guards=False)
            assert isinstance(module, fx.GraphModule)
            _drop_checks(module)
            write_early(module)
            if draws_as_fused(self.model):
                split_layers(module)  # before an autocast region wraps the layers
            inline_regions(module)
            self.whole = {path: self.whole[path] for path in leaves.settle(module)}
        except Exception as error:
            return error
        self.notes = list(dict.fromkeys(notes))
        return module, program.call_spec.out_spec

    def _take(self, paths: Iterable[str], reason: str, *, small: bool = False) -> bool:
        """Let the first of these modules that can run whole do so, together with those of its class.

        small: only one that leaves enough of the model to cut
        """
        for path in paths:
            if not path or path in self._sights or path in self.refused or (small and not self._is_small(path)):
                continue
            if self._can_run_whole(path):
                self.whole |= dict.fromkeys((p for p in self._sights if p not in self.whole), reason)
                return True
        return False

    def _is_small(self, path: str) -> bool:
        size, whole = (sum(p.numel() for p in m.parameters()) for m in (self.model.get_submodule(path), self.model))
        return size <= _LARGEST * whole

    def _can_run_whole(self, path: str) -> bool:
        if not self.example.is_real or device_of(self.model).type == "meta":
            self.refused[path] = (
                "how large its outputs are is seen in a real run: pass real tensors as example inputs, not meta tensors"
            )
            return False
        paths = [p for p in _alike(self.model, path) if p not in self._sights]
        found = observe(self.model, paths, self.example.resized())
        for name, what in found.items():
            if isinstance(what, str):
                self.refused[name] = what
            else:
                self._sights[name] = what
        return path in self._sights

    def _put_back(self, error: OpaqueError) -> None:
        """A module that looked as if it could run whole, but cannot."""
        paths = [path for path in blame.modules_of(self.model, error) if path in self._sights]
        for path in paths[:1] or list(self._sights):
            del self._sights[path]
            self.whole.pop(path, None)
            self.refused[path] = str(error)

    def _is_fixed(self) -> bool:
        """Whether the model itself takes no other number of rows."""
        if not self.example.is_real:
            return True
        try:
            observe(self.model, (), self.example.resized()[1:2])
        except Exception:
            return True
        return False

    def _run_original(self) -> None:
        """What stops the model itself is not the capture's: let it through, with its own type and traceback."""
        args, kwargs = self.example.fake(device_of(self.model))
        unknown = () if self.example.is_real else (DataDependentOutputException, DynamicOutputShapeException)
        with contextlib.suppress(*unknown), preserved(self.model), seeded(), verify.own_errors(self.model):
            self.model(*args, **kwargs)


def _enclosing(path: str) -> list[str]:
    """A module and those around it, innermost first, the model itself left out."""
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _alike(model: nn.Module, path: str) -> list[str]:
    """The module and all of its class, but those around it; of torch's own classes it stands alone."""
    module = model.get_submodule(path)
    around = {"", *_enclosing(path)[1:]}
    if type(module).__module__.startswith("torch."):
        return [path]
    others = [p for p, m in model.named_modules() if type(m) is type(module) and p not in around and p != path]
    return [path, *others]


def backward_hooks(model: nn.Module) -> dict[str, str]:
    """Why modules with hooks on their backward have to run whole, by path."""
    return {
        path: "it has a backward hook, which a graph would lose"
        for path, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    }


def _export(model: nn.Module, example: Example) -> torch.export.ExportedProgram:
    args, kwargs = example.fake(device_of(model))
    shapes, named = pytree.tree_unflatten([example.free(leaf) for leaf in example.leaves], example.in_spec)
    with shape_only(), marked(), symbolic(model), _spelled_out(model, kwargs) as signature:
        # the form that export wants: names as in the signature, *args and **kwargs under theirs
        by_name = dict(signature.bind(*shapes, **named).arguments)
        return torch.export.export(model, args, kwargs, dynamic_shapes=by_name, strict=False)


@contextlib.contextmanager
def _spelled_out(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[inspect.Signature]:
    """The forward's signature; keyword inputs that its **kwargs catches become parameters for a while.

    torch 2.13 checks their dynamic shapes once below the name of **kwargs and once beside it: no form passes both.
    """
    signature = inspect.signature(model.forward)
    known = list(signature.parameters.values())
    extra = [name for name in kwargs if name not in signature.parameters]
    if not extra or known[-1].kind is not inspect.Parameter.VAR_KEYWORD or "forward" in vars(model):
        yield signature
        return
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*known[:-1], *added])  # type: ignore[attr-defined]
    object.__setattr__(model, "forward", forward)
    try:
        yield inspect.signature(forward)
    finally:
        object.__delattr__(model, "forward")


def _drop_checks(module: fx.GraphModule) -> None:
    """Remove what only asserts: it bakes devices and sizes and computes nothing."""
    checks = (
        "_assert_tensor_metadata",
        "_assert_scalar",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_assert_async",
    )
    for node in reversed(list(module.graph.nodes)):
        name = getattr(node.target, "_opname", "") or getattr(node.target, "__name__", "")
        if node.op == "call_function" and not node.users and name.split(".")[0] in checks:
            module.graph.erase_node(node)
    module.recompile()
