"""Where a capture goes wrong: the first module whose output differs, the backwards that a graph cannot hold."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from autodecouple.passes.verifying.compare import leaf_difference
from autodecouple.passes.verifying.rehearse import Rehearsal

Tensor = torch.Tensor


@dataclass(frozen=True)
class Call:
    """One call of a module: its name, and how often it was called before."""

    module: str
    index: int


def first_difference(rehearsal: Rehearsal, captured: fx.GraphModule) -> str:
    """A sentence on the first module, in the order in which they finish, whose output differs; "" where none does.

    A call of a module is compared where the graph says which of its nodes belong to it, and where one of those that
    leave it has the shape of the output.
    """
    calls = _record(rehearsal)
    watched = _Watched(captured, rehearsal.model, calls)
    rehearsal.run(watched)
    differences = watched.interpreter.differences
    first = next((call for call in calls if call in differences), None)
    if first is None:
        return ""
    kind = type(rehearsal.model.get_submodule(first.module)).__name__
    times = Counter(call.module for call in calls)[first.module]
    which = f", call {first.index + 1} of {times}" if times > 1 else ""
    return f"The first module whose output differs is {first.module!r} ({kind}{which}), by {differences[first]:.2g}"


def custom_backwards(output: Any) -> tuple[str, ...]:
    """What was written in Python of the backward that leads to an output: autograd.Functions, module hooks."""
    seen: set[Any] = set()
    todo = [leaf.grad_fn for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    found: dict[str, None] = {}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [source for source, _ in node.next_functions]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found[type(node).__name__.removesuffix("Backward")] = None
    return tuple(found)


def _record(rehearsal: Rehearsal) -> dict[Call, list[Tensor]]:
    """The tensors that each call of each module returned, in the order in which they finished."""
    found: dict[Call, list[Tensor]] = {}
    counts: Counter[str] = Counter()

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            leaves = [leaf.detach().clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            found[Call(name, counts[name])] = leaves
            counts[name] += 1

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in rehearsal.model.named_modules() if name]
    try:
        rehearsal.run(rehearsal.model)
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Watched(nn.Module):
    """The captured graph, run operation by operation."""

    def __init__(self, captured: fx.GraphModule, model: nn.Module, calls: Mapping[Call, list[Tensor]]) -> None:
        super().__init__()
        self.captured = captured
        self.interpreter = _Comparison(captured, _members(captured, model), calls)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.interpreter.run(*pytree.tree_leaves((args, kwargs)), enable_io_processing=False)


class _Comparison(fx.Interpreter):
    """Compares the outputs of each call of a module where the last of its nodes has run; later ones may write there."""

    def __init__(
        self,
        captured: fx.GraphModule,
        members: Mapping[Call, list[fx.Node]],
        calls: Mapping[Call, list[Tensor]],
    ) -> None:
        super().__init__(captured, garbage_collect_values=False)
        self.members = members
        self.calls = calls
        self.values: dict[fx.Node, Any] = {}
        self.differences: dict[Call, float] = {}
        self.ends: dict[fx.Node, list[Call]] = defaultdict(list)
        for call, nodes in members.items():
            self.ends[nodes[-1]].append(call)

    def run_node(self, node: fx.Node) -> Any:
        self.values[node] = super().run_node(node)
        for call in self.ends.get(node, ()):
            self._compare(call)
        return self.values[node]

    def _compare(self, call: Call) -> None:
        """A module may return what it was given: the values that its nodes read count as well, if others use them."""
        members = dict.fromkeys(self.members[call])
        nodes = dict.fromkeys(n for node in members for n in (node, *node.all_input_nodes))
        leaving = [node for node in nodes if any(user not in members for user in node.users)]
        values = [v for node in leaving for v in pytree.tree_leaves(self.values[node]) if isinstance(v, Tensor)]
        for expected in self.calls.get(call, ()):
            alike = [v for v in values if (v.shape, v.dtype) == (expected.shape, expected.dtype)]
            if alike and all(leaf_difference(expected, v) for v in alike):
                self.differences[call] = min(_distance(expected, v) for v in alike)


def _members(captured: fx.GraphModule, model: nn.Module) -> dict[Call, list[fx.Node]]:
    """The nodes of each call. torch.export marks the second call of a module by `@1`, and so on; where it does not, all
    calls are one, and the later ones are not compared."""
    names = {id(m): name for name, m in model.named_modules()}
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[Call, list[fx.Node]] = defaultdict(list)
    for node in captured.graph.nodes:
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            _, _, index = key.rpartition("@")
            if path and path in modules:
                found[Call(names[id(modules[path])], int(index) if index.isdecimal() else 0)].append(node)
    return found


def _distance(a: Tensor, b: Tensor) -> float:
    kind = torch.complex128 if a.is_complex() else torch.float64
    return float((a.to(kind) - b.detach().to(kind)).abs().max())
