"""A model of the zoo on its way through the compiler, beside the untouched original."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import autodecouple
from autodecouple import Decoupled
from autodecouple.errors import AutodecoupleError
from autodecouple.graph import Graph
from autodecouple.objectives import SupCon
from autodecouple.passes.capturing.bind import bind
from autodecouple.pipeline import Pipeline
from autodecouple.randomness import Randomness
from zoo.entry import Entry

SMALL = SupCon(hidden=8, out=4)
UNKEYED = Randomness(None)
"""Draws from torch's default generator, as the original does."""


@dataclass
class Trial:
    """A model on its way through the steps, and the untouched original beside it."""

    entry: Entry
    model: nn.Module
    original: nn.Module
    graph: Graph | None = None
    stages: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = _tensors(self.original)
        for module in self.original.modules():
            for name in ("use_cache", "use_mems_eval"):  # caches are no part of the promise
                if getattr(getattr(module, "config", None), name, False):
                    setattr(module.config, name, False)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Whatever goes wrong in here is a failure of this step."""
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, (AssertionError, AutodecoupleError)) else f"{type(error).__name__}: "
            self.failures.append((name, f"{kind}{' '.join(str(error).split())}"[:600]))

    def compiled(self, schedule: str) -> Decoupled:
        """A new pipeline on the capture, from the initial weights."""
        assert self.graph is not None
        reset(self.model, self.state)
        devices = ["cpu"] * min(2, self.stages)
        return autodecouple.compile(
            self.graph, self.stages, SMALL, criterion=weigh, optimizer=Watching, devices=devices, schedule=schedule
        )

    def expected(self, rows: int, training: bool) -> tuple[Any, dict[str, Tensor]]:
        """The original's output and buffers after one forward."""
        reset(self.original, self.state)
        self.original.train(training)
        output = _seeded(lambda: call(self.original, self.entry.batch(rows)))
        return output, {name: buffer.clone() for name, buffer in self.original.named_buffers()}

    def found(self, function: Callable[[], Any]) -> Any:
        """What the compiled model gives, from the same weights, buffers and random state."""
        reset(self.model, self.state)
        return _seeded(function)


class Watching(torch.optim.SGD):
    """Remembers whom it has seen with a gradient."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=1e-3)
        self.seen: set[int] = set()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen |= {id(p) for group in self.param_groups for p in group["params"] if p.grad is not None}
        super().step(closure)


def weigh(output: Any, target: Any = None) -> Tensor:
    """A loss that every floating point output has a part in, each element a part of its own."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    parts = [leaf.reshape(-1) for leaf in leaves if leaf.requires_grad] or [leaf.reshape(-1) for leaf in leaves]
    total = torch.stack([(p * torch.linspace(0.5, 1.5, p.numel(), dtype=p.dtype)).mean().float() for p in parts])
    return total.sum()


def compose(pipeline: Pipeline, inputs: Any) -> Any:
    """The model's output by its stages, one after the other, cut free between them as the executors do."""
    graph = pipeline.graph
    names = [node.name for node in graph.train.graph.find_nodes(op="placeholder")]
    values = dict(zip(names, bind(graph, inputs), strict=True))
    for code in pipeline.codes:
        arguments = [values[name] for name in code.inputs]
        made = code.body(*arguments, *([UNKEYED] if code.draws else []))
        whole = {**values, **dict(zip(code.outputs, made, strict=True))}
        values = {name: v.detach() if isinstance(v := whole[name], Tensor) else v for name in code.sends}
    named = iter(pipeline.codes[-1].head_inputs)
    leaves = [whole[next(named)] if isinstance(leaf, fx.Node) else leaf for leaf in graph.outputs]
    return pytree.tree_unflatten(leaves, graph.out_spec)


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def reset(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Parameters and buffers as they were, in place and by name: a forward may assign its buffers anew."""
    with torch.no_grad():
        for name, tensor in _named(model):
            if name in state and state[name].shape == tensor.shape:
                tensor.copy_(state[name])


def _named(model: nn.Module) -> Sequence[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _named(model)}


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


def _seeded(function: Callable[[], Any]) -> Any:
    """Python's and numpy's generators too: some models draw from them."""
    with torch.random.fork_rng(devices=[]):
        _seed()
        return function()
