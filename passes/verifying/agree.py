"""Whether a capture is the model: what both do on the example, from the same random state, must agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from autodecouple.errors import TraceError
from autodecouple.graph import Graph
from autodecouple.passes.verifying.compare import buffer_difference, gradient_errors, output_difference
from autodecouple.passes.verifying.locate import custom_backwards, first_difference
from autodecouple.passes.verifying.rehearse import Rehearsal, Run, own_errors

NUM_BATCHES = 4
"""Calls in a row that are compared where a forward changes what a graph cannot know of: a counter shows by then."""


def matches_original(
    graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool = True
) -> tuple[str, ...]:
    """Run the original and the captures on the example, from the same random state, and compare what they do.

    Outputs (structure, types, shapes, values), buffers afterwards and, in training, the gradients of all trainable
    parameters must agree. Nothing is changed: buffers, gradients, flags and random states come back.

    training: whether `graph.train` was captured in training mode; else the original runs in evaluation mode too
    Returns notes: what the user should know of a model that agrees, or that cannot be compared.
    Raises TraceError naming the mode, what differs and where; what the model itself raises passes through.
    """
    notes: dict[str, None] = {}
    trained = Rehearsal(graph.model, args, kwargs, training, gradients=True)
    notes |= dict.fromkeys(_check(graph, graph.train, trained))
    if graph.evaluation is not None:
        notes |= dict.fromkeys(_check(graph, graph.evaluation, Rehearsal(graph.model, args, kwargs, training=False)))
    return tuple(notes)


@dataclass(frozen=True)
class _Difference:
    """What differs first ("output", "gradient" or "buffer"), at which batch, in words."""

    kind: str
    text: str
    batch: int = 0


def _check(graph: Graph, module: fx.GraphModule, rehearsal: Rehearsal) -> list[str]:
    with own_errors(graph.model):
        expected = rehearsal.run(graph.model)
        if expected.hidden:
            expected = rehearsal.run(graph.model, batches=NUM_BATCHES)
    batches = len(expected.outputs)
    found = _run_capture(module, rehearsal, batches)
    difference = _difference(expected, found, graph)
    if difference is None:
        if expected.refused:
            return [f"backprop through the whole model is refused by autograd, gradients untested: {expected.refused}"]
        unknown = [name for name in expected.hidden if name not in found.hidden]
        return _hidden_note(graph, unknown, batches) if rehearsal.gradients else []  # in evaluation: caches
    if _is_repeatable(graph.model, rehearsal, batches, graph):
        raise TraceError(_explain(difference, expected, rehearsal, module))
    if _is_repeatable(module, rehearsal, batches, graph):
        raise TraceError(_frozen(difference, rehearsal))
    return [
        "the capture could not be checked: two runs of the model from one random state differ, and so do two of the"
        f" captured graph ({difference.text})"
    ]


def _run_capture(module: fx.GraphModule, rehearsal: Rehearsal, batches: int) -> Run:
    try:
        return rehearsal.run(module, batches=batches)
    except Exception as error:
        mode, first = _mode(rehearsal), (str(error).strip().splitlines() or [""])[0]
        raise TraceError(
            f"in {mode} mode the captured graph fails where the model does not: {type(error).__name__}: {first}"
        ) from error


def _is_repeatable(module: nn.Module, rehearsal: Rehearsal, batches: int, graph: Graph) -> bool:
    runs = [rehearsal.run(module, batches=batches) for _ in range(2)]
    return _difference(runs[0], runs[1], graph) is None


def _difference(expected: Run, found: Run, graph: Graph) -> _Difference | None:
    if text := output_difference(expected.outputs[0], found.outputs[0]):
        return _Difference("output", text)
    refused = expected.refused or found.refused
    if not refused and (errors := gradient_errors(expected.gradients, found.gradients)):
        return _Difference("gradient", _worst(errors, graph))
    for batch in range(1, len(expected.outputs)):
        if text := output_difference(expected.outputs[batch], found.outputs[batch]):
            return _Difference("output", text, batch)
    text = buffer_difference(expected.buffers, found.buffers)
    return _Difference("buffer", text) if text else None


def _worst(errors: Mapping[str, float], graph: Graph) -> str:
    """Name the parameter that is used last: what follows it is where its gradient went wrong."""
    positions = {name: max(uses, default=-1) for name, uses in graph.parameter_uses().items()}
    name = max(errors, key=lambda name: positions.get(name, -1))
    owner = name.rpartition(".")[0]
    more = f", as are those of {len(errors) - 1} more" if len(errors) > 1 else ""
    kind = type(graph.model.get_submodule(owner)).__name__
    off = f"off by {errors[name]:.0%} of its norm" if errors[name] < math.inf else "there, where the model has none"
    return f"the gradient of {name!r} (in {owner!r}, {kind}) is {off}{more}"


def _hidden_note(graph: Graph, names: Sequence[str], batches: int) -> list[str]:
    if not names:
        return []
    return [
        f"the forward of {type(graph.model).__name__} changes {_some(names)}, and the stages do not; its outputs did"
        f" not depend on that in {batches} batches"
    ]


def _explain(difference: _Difference, expected: Run, rehearsal: Rehearsal, module: fx.GraphModule) -> str:
    """One error of three sentences: what differs, where, and what to do about it."""
    parts = [_headline(difference, rehearsal)]
    if difference.kind != "gradient" and difference.batch == 0 and (place := first_difference(rehearsal, module)):
        parts.append(place)
    if difference.kind == "gradient":
        parts.append(_lost_backward(rehearsal, module))
    elif expected.hidden:
        settled = "; if only the first call changes it, call the model once before compiling" * (difference.batch > 0)
        parts.append(
            f"The forward changes {_some(expected.hidden)}, and the graph keeps what that was at capture (Python"
            " counters, its own random generator). Make it a buffer (register_buffer) that changes in place, draw with"
            f" torch's default generator, or pass it in as an input{settled}"
        )
    else:
        parts.append(
            "The forward probably depends on state outside its inputs, parameters and buffers (Python counters, its own"
            " random generator)"
            + (', or decides something by chance as it trains: capture it with mode="eval"' * rehearsal.training)
        )
    return ". ".join(parts) + "."


def _lost_backward(rehearsal: Rehearsal, module: fx.GraphModule) -> str:
    held = custom_backwards(rehearsal.outputs(module))
    lost = [name for name in custom_backwards(rehearsal.outputs(rehearsal.model)) if name not in held]
    names = f" ({_some(lost)})" if lost else ""
    way_out = "Write it as torch operations: y = x + (f(x) - x).detach() has the value of f and the gradient of x"
    if "CheckpointFunction" in lost:
        way_out = "Call checkpoint with use_reentrant=False"
    return (
        f"The backward of the model runs Python{names} that a graph does not hold: an autograd.Function with a backward"
        f" of its own, a backward hook. {way_out}"
    )


def _frozen(difference: _Difference, rehearsal: Rehearsal) -> str:
    return (
        f"{_headline(difference, rehearsal)}. The model differs from itself when it is run twice from one random state:"
        " its forward depends on state outside its inputs, parameters and buffers (its own random generator, the time,"
        " a file), and the graph keeps what that was at capture. Draw with torch's default generator, or pass it in as"
        " an input."
    )


def _headline(difference: _Difference, rehearsal: Rehearsal) -> str:
    later = f" at batch {difference.batch + 1}, not before" if difference.batch else ""
    return f"in {_mode(rehearsal)} mode the captured graph differs from the model{later}: {difference.text}"


def _mode(rehearsal: Rehearsal) -> str:
    return "training" if rehearsal.training else "evaluation"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
