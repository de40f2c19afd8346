"""What must hold after each pass; a broken promise stops the compiler, not the training run."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autodecouple.errors import TraceError
from autodecouple.graph import Graph, attribute
from autodecouple.passes.codegen import StageCode
from autodecouple.plans import Plan


def matches_original(graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the original and the captures on the example, from the same random state, and compare; nothing is changed.

    Raises TraceError naming the mode and the largest difference.
    """
    for training, module in ((True, graph.train), (False, graph.evaluation)):
        if module is None:
            continue
        expected = _run(graph.model, graph.model, args, kwargs, training)
        found = _run(graph.model, module, args, kwargs, training)
        _compare(expected, found, "training" if training else "evaluation")


def untrained_parameters(graph: Graph) -> list[str]:
    """Trainable parameters of the model that no gradient of its outputs reaches: unused, detached, used for nothing."""
    nodes = graph.train.graph.find_nodes(op="get_attr")
    reached = {id(attribute(graph.train, node)) for node in nodes if str(node.target) in graph.trained}
    return [name for name, p in graph.model.named_parameters() if p.requires_grad and id(p) not in reached]


def stages_fit(codes: Sequence[StageCode], plan: Plan) -> None:
    """What the stages send is what the plan says crosses, and every parameter lives in one stage."""
    for code, cut in zip(codes, plan.cuts, strict=False):
        sent = {code.origin(name) for name in code.sends}
        said = {spec.name for spec in cut.crossing}
        assert sent == said, f"cut after {cut.after!r}: {sorted(sent ^ said)} sent or planned, but not both"
    owners = Counter(id(p) for code in codes for p in code.body.parameters() if p.requires_grad)
    assert all(count == 1 for count in owners.values()), "a parameter lives in two stages"


def _run(model: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Any:
    args, kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (args, kwargs))
    flags = {m: m.training for m in model.modules()}
    # With gradients in evaluation too: without them nn.TransformerEncoder takes a kernel that fills padding with zeros.
    with preserved(model), torch.enable_grad(), seeded():
        try:
            if not training or not model.training:
                model.train(training)
            with own_errors(model) if module is model else contextlib.nullcontext():
                return module(*args, **kwargs)
        finally:
            for m, flag in flags.items():
                m.training = flag


@contextlib.contextmanager
def own_errors(model: nn.Module) -> Iterator[None]:
    """Say of what the original raises that it was the original."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by {type(model).__name__} itself, run as it is on the example inputs")
        raise


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Give buffers their values back afterwards: a forward updates BatchNorm statistics."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draw from a fixed random state for a while; the caller's comes back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _compare(expected: Any, found: Any, mode: str) -> None:
    a, spec = pytree.tree_flatten(expected)
    b, other = pytree.tree_flatten(found)
    if spec != other:
        raise TraceError(f"in {mode} mode the capture returns another structure than the model: {other} for {spec}")
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        if not isinstance(x, torch.Tensor):
            continue
        try:
            torch.testing.assert_close(y, x, equal_nan=True)
        except AssertionError as error:
            raise TraceError(
                f"in {mode} mode the captured graph differs from the model at output {index}: "
                f"{' '.join(str(error).split())}. The forward probably depends on state outside its inputs, parameters"
                " and buffers (Python counters, its own random generator)."
            ) from error
