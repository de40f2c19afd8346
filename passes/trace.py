"""Capture an unmodified model as a flat fx graph, once as it trains and once as it evaluates.

`torch.export(strict=False)` is the way in: it takes 236 of 246 real models where symbolic tracing takes 85, keeps the
user's own parameter objects and in-place operations, and leaves the batch dynamic.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from autodecouple.errors import InputError, TraceError
from autodecouple.graph import LEAF, Graph, device_of, is_free, spec_of
from autodecouple.passes import verify
from autodecouple.passes.capturing import surroundings
from autodecouple.passes.capturing.bind import as_call, bind
from autodecouple.passes.capturing.export import Example, Export, backward_hooks
from autodecouple.passes.capturing.recurrent import draws_as_fused, split_layers
from autodecouple.passes.verifying.sizes import takes_other_sizes
from autodecouple.plans import TensorSpec

MODES = ("train", "eval")


def capture(model: nn.Module, example_inputs: Any, *, mode: str = "train", dynamic: Sequence[int] = ()) -> Graph:
    """Capture `model` in train and evaluation mode, and check both against the original.

    example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs; dimension 0 is the batch.
    Tensors on the meta device do: then nothing is computed, and the check is left out.
    mode: "eval" trains the model as it evaluates, without dropout and the like: for models whose training mode no
    graph can hold; dynamic: further dimensions of the inputs that may differ from batch to batch, (1,) for the length
    of sequences.
    Raises TraceError, with the user's file:line and the ways out, where the model cannot be captured; what the model
    itself raises on the example passes through.
    """
    if mode not in MODES:
        raise InputError(f'mode must be "train" or "eval", not {mode!r}')
    settings = (surroundings.NOT_SYNCED, *surroundings.cache_settings(model))
    with surroundings.neutral(), surroundings.quiet(), surroundings.held(settings):
        example = _example(example_inputs, dynamic)
        graph = _capture(model, example, training=mode == "train")
        if example.is_real and device_of(model).type != "meta":
            notes = _verify(graph, example, training=mode == "train")
            graph = dataclasses.replace(graph, warnings=(*graph.warnings, *notes))
        if not draws_as_fused(model):
            for module in filter(None, (graph.train, graph.evaluation)):
                split_layers(module)
            graph = dataclasses.replace(graph)  # which forgets what it knew of its nodes
        return graph


def _verify(graph: Graph, example: Example, *, training: bool) -> tuple[str, ...]:
    """Compare with the original on two rows, which show all that many would, or on the whole example if those fail."""
    batched = {spec.name for spec in graph.inputs if spec.batch_dim == 0}
    if any(LEAF in node.meta for node in graph.operations):
        with surroundings.mode(graph.model, training=training):
            takes_other_sizes(graph, example.resized()[:2])
    names = [node.name for node in graph.train.graph.find_nodes(op="placeholder")]
    few = [leaf[:2] if name in batched else leaf for name, leaf in zip(names, example.leaves, strict=True)]
    try:
        return verify.matches_original(graph, *example.call(few), training=training)
    except TraceError:
        raise
    except Exception:  # rows in groups, say; what the model raises on its example comes again
        return verify.matches_original(graph, *example.call(), training=training)


def _example(inputs: Any, dynamic: Sequence[int]) -> Example:
    leaves, in_spec = pytree.tree_flatten(as_call(inputs))
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise InputError(f"example_inputs holds no tensor: {inputs!r}; pass one batch, like (x,)")
    example = Example(tuple(map(_normal, leaves)), in_spec, tuple(dict.fromkeys(dynamic)))
    for dim in example.dynamic:
        if dim < 1 or all(dim >= tensor.ndim for tensor in example.tensors):
            raise InputError(f"dynamic={tuple(dynamic)} names dimension {dim}, but {_dims(example)}; the batch is 0")
    return dataclasses.replace(example, leaves=tuple(_widen(list(example.leaves), example.num_rows)))


def _dims(example: Example) -> str:
    most = max(tensor.ndim for tensor in example.tensors)
    return f"no input has more than {most} dimensions, 0 to {most - 1}"


def _capture(model: nn.Module, example: Example, *, training: bool) -> Graph:
    with surroundings.mode(model, training=training):
        export = Export(model, example, backward_hooks(model))
        train, out_spec = export.run()
        notes = [*_whole_notes(export.whole), *export.notes]
    inputs, constants, fixed = _describe(train, example)
    notes = [*([] if training else [_lost_note(model)]), *notes, *fixed]
    evaluation: fx.GraphModule | None = None
    spec = None
    try:
        with surroundings.mode(model, training=False):
            evaluation, spec = Export(model, example, dict(export.whole)).run()
    except TraceError as error:
        notes.append(f"evaluation runs the model itself, on one device: its evaluation mode was not captured ({error})")
    specs: dict[str, Any] = {"in_spec": example.in_spec, "out_spec": out_spec, "evaluation_spec": spec}
    return Graph(model, train, evaluation, inputs, constants, **specs, warnings=tuple(notes))


def _whole_notes(whole: dict[str, str]) -> list[str]:
    """One note per reason."""
    found: dict[str, list[str]] = {}
    for path, reason in whole.items():
        found.setdefault(reason, []).append(path)
    return [
        f"{', '.join(paths[:3])}{f' and {len(paths) - 3} more' if len(paths) > 3 else ''} run"
        f"{'s' * (len(paths) == 1)} whole, with no cut inside: {reason}"
        for reason, paths in found.items()
    ]


def _lost_note(model: nn.Module) -> str:
    """What training in evaluation mode leaves out, by the classes of modules that ask for the mode."""
    words = ("drop", "batchnorm", "noise")
    acting = (m for m in model.modules() if getattr(m, "p", None) != 0)
    kinds = Counter(type(m).__name__ for m in acting if any(word in type(m).__name__.lower() for word in words))
    lost = ", ".join(f"{count} {name}" for name, count in kinds.items()) or "whatever depends on model.training"
    return (
        f'mode="eval": the stages train the model as it evaluates; without their training behaviour are {lost}'
        " (no dropout, no statistics of the batch)"
    )


def _normal(leaf: Any) -> Any:
    """A tensor that was made in inference mode cannot be trained on; its copy can."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) and leaf.is_inference() else leaf


def _widen(leaves: list[Any], rows: int | None) -> list[Any]:
    """Two rows where the batch has one: export would take a batch of 1 for a constant.

    One row beside a larger batch is not widened: it broadcasts.
    """
    if rows != 1:
        return leaves
    return [torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.ndim and len(x) == 1 else x for x in leaves]


def _describe(train: fx.GraphModule, example: Example) -> tuple[tuple[TensorSpec, ...], dict[str, object], list[str]]:
    """Input specs, inputs that are constants, and what to tell the user about them.

    The batch is the dimension 0 that all inputs share which are free and as long as the first of them; what is free
    and of another length (a bank of keys) is kept to the length it has.
    """
    placeholders = train.graph.find_nodes(op="placeholder")
    named = list(zip(placeholders, example.leaves, strict=True))
    constants = {node.name: leaf for node, leaf in named if not isinstance(leaf, torch.Tensor)}
    tensors = [(node, leaf) for node, leaf in named if isinstance(leaf, torch.Tensor)]
    free = {node: len(leaf) for node, leaf in tensors if leaf.ndim and is_free(node.meta["val"].shape[0])}
    batch = next(iter(free.values()), None)
    batched = {node for node, rows in free.items() if rows == batch}
    symbols = {str(node.meta["val"].shape[0]) for node in batched}
    specs, notes = [], []
    for node, leaf in tensors:
        spec = spec_of(node.name, leaf, 0 if node in batched else None)
        assert spec is not None
        sizes = node.meta["val"].shape
        open_dims = [dim for dim in example.dynamic if dim < leaf.ndim and is_free(sizes[dim])]
        dims = tuple(dim for dim in open_dims if str(sizes[dim]) not in symbols)
        specs.append(dataclasses.replace(spec, free_dims=dims))
        notes += _fixed_notes(node.name, leaf, example, dims)
    if not free:
        notes = [*_fixed_rows(tensors, example), *notes]
    return tuple(specs), constants, notes


def _fixed_rows(tensors: Sequence[tuple[fx.Node, torch.Tensor]], example: Example) -> list[str]:
    return [
        f"input {node.name!r} is fixed to {len(leaf)} rows, so a smaller last batch will be refused: the model uses its"
        " batch size as a number. Write x.shape[0] for a literal or len(x), and -1 in x.view(-1, ...)"
        for node, leaf in tensors
        if leaf.ndim and len(leaf) == example.num_rows
    ]


def _fixed_notes(name: str, leaf: torch.Tensor, example: Example, free: Sequence[int]) -> list[str]:
    return [
        f"input {name!r} is fixed to size {leaf.shape[dim]} in dimension {dim}, which dynamic= was to leave free: "
        + ("a size of 1 in the example is taken for a constant" if leaf.shape[dim] == 1 else "the model ties it down")
        for dim in example.dynamic
        if dim < leaf.ndim and dim not in free
    ]


__all__ = ["as_call", "bind", "capture"]
