"""A stage through torch.compile: its body, and its head with the loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from autodecouple.backends.draws import kernel_draws, masked_draws
from autodecouple.backends.keyed import TracedRandomness
from autodecouple.backends.signature import signature
from autodecouple.backends.turns import Turns
from autodecouple.passes.codegen import StageCode
from autodecouple.randomness import Randomness
from autodecouple.stage import Stage

_turns = Turns()


class CompiledStage(Stage):
    """A stage whose body and head are compiled when first called, and anew where it is moved."""

    def __init__(self, *given: Any, options: Mapping[str, Any]) -> None:
        self._options = options
        super().__init__(*given)

    def place(self, device: torch.device) -> None:
        super().place(device)
        body, where = self.code.body, f"stage {self.index}"
        self.run_body = _WithKeys(Compiled(body, where, self._options), masked_draws(body, device))
        if self.code.head is not None and not self.code.head_draws:  # its keys would become part of the code
            self.run_head = Compiled(_head_alone(self.code), f"the head of {where}", self._options)
        if drawn := kernel_draws(body, device):
            _warn(f"{', '.join(drawn)} of {where}", "what draws random numbers inside a kernel or a whole module")


class Compiled:
    """A module through torch.compile; as it is, after a warning that says why, where that fails."""

    def __init__(self, module: nn.Module, name: str, options: Mapping[str, Any]) -> None:
        self._module = module
        self._name = name
        self._compiled = torch.compile(module, **options)
        self._known: set[Hashable] = set()
        self._run: Callable[..., Any] = self._compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = signature(([value for value in args if not isinstance(value, Randomness)], kwargs))
        if self._run is self._compiled and kind not in self._known:
            return self._first(kind, args, kwargs)
        with _turns.shared():
            return self._run(*args, **kwargs)

    def _first(self, kind: Hashable, args: Any, kwargs: Any) -> Any:
        """A call that compiles."""
        tensors = (*pytree.tree_leaves((args, kwargs)), *self._module.buffers())
        before = [(x, x._version, x.detach().clone()) for x in tensors if isinstance(x, torch.Tensor)]
        with _turns.alone():
            try:
                found = self._compiled(*args, **kwargs)
            except Exception as error:  # of a compiler, or of what it made; the module's own comes again below
                _restore(before)  # a part may have run
                self._run = self._module
                _warn(self._name, " ".join(str(error).strip().split("\n\n")[0].split()))
            else:
                self._known.add(kind)
                return found
        return self._module(*args, **kwargs)


class _WithKeys:
    """A compiled body that is given the keys of its draws in the place of the randomness."""

    def __init__(self, compiled: Compiled, nodes: list[str]) -> None:
        self._compiled = compiled
        self._nodes = nodes

    def __call__(self, *args: Any) -> Any:
        if args and isinstance(args[-1], Randomness) and args[-1].seed is not None:
            args = (*args[:-1], TracedRandomness.of(args[-1], self._nodes))
        return self._compiled(*args)


def _head_alone(code: StageCode) -> fx.GraphModule:
    """The head, called by code of its own: torch.compile counts what it compiled per code, and heads share theirs."""
    assert code.head is not None
    graph = fx.Graph()
    inputs = [graph.placeholder(f"features_{index}") for index in range(len(code.head_inputs))]
    signal = graph.placeholder("signal")
    mask: dict[str, Any] = {"mask": graph.placeholder("mask")} if code.mask is not None else {}
    graph.output(graph.call_module("head", (*inputs, signal), mask))
    return fx.GraphModule({"head": code.head}, graph)


def _restore(before: Iterable[tuple[torch.Tensor, int, torch.Tensor]]) -> None:
    with torch.no_grad():
        for tensor, version, value in before:
            if tensor._version != version:
                tensor.copy_(value)


def _warn(what: str, reason: str) -> None:
    warnings.warn(f'backend="compile": {what} runs as eager code: {reason}', stacklevel=2)
