"""A batch as the captured graph takes it: flat, in order, and checked against the capture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autodecouple.errors import InputError
from autodecouple.graph import Graph, dtype_name
from autodecouple.plans import TensorSpec

Call = tuple[tuple[Any, ...], dict[str, Any]]


def as_call(inputs: Any) -> Call:
    """(args, kwargs) of a call, from a tensor, a tuple or list of positional inputs, or a dict of keyword inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def bind(graph: Graph, inputs: Any) -> list[Any]:
    """Flat leaves of a batch in the graph's order; raises InputError where they do not fit the capture."""
    args, kwargs = as_call(inputs)
    _, names = graph.in_spec.children()
    if set(kwargs) == set(names.context):
        kwargs = {name: kwargs[name] for name in names.context}  # the order of a dict carries no meaning
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if spec != graph.in_spec:
        raise InputError(f"the model was captured with {_form(graph.in_spec)}, but got {_form(spec)}")
    placeholders = graph.train.graph.find_nodes(op="placeholder")
    known = {spec.name: spec for spec in graph.inputs}
    for node, leaf in zip(placeholders, leaves, strict=True):
        if node.name in known:
            _check_tensor(known[node.name], leaf)
        elif isinstance(leaf, torch.Tensor) or leaf != graph.constants[node.name]:
            raise InputError(
                f"input {node.name!r} is {leaf!r}, but the model was captured with {graph.constants[node.name]!r}:"
                " inputs that are no tensors are part of the graph; compile again for another value"
            )
    _check_sizes(graph, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
    return leaves


def _form(spec: Any) -> str:
    args, kwargs = spec.children()
    parts = [f"{args.num_children} positional input{'s' * (args.num_children != 1)}"] if args.num_children else []
    if kwargs.num_children:
        parts.append(f"keyword inputs {', '.join(map(str, kwargs.context))}")
    return " and ".join(parts) or "no inputs"


def _check_tensor(spec: TensorSpec, leaf: Any) -> None:
    if not isinstance(leaf, torch.Tensor):
        raise InputError(f"input {spec.name!r} must be a tensor {spec}, but is {type(leaf).__name__}")
    shape = tuple(leaf.shape)
    free = (spec.batch_dim, *spec.free_dims)
    fits = len(shape) == len(spec.shape) and all(
        i in free or size == expected for i, (size, expected) in enumerate(zip(shape, spec.shape, strict=True))
    )
    if not fits or dtype_name(leaf.dtype) != spec.dtype:
        raise InputError(f"input {spec} was captured, but got shape {shape} {dtype_name(leaf.dtype)}")
    if spec.batch_dim is not None and shape[spec.batch_dim] == 0:
        raise InputError(f"input {spec.name!r} has no rows: shape {shape}")


def _check_sizes(graph: Graph, tensors: list[torch.Tensor]) -> None:
    """Inputs that the model ties to one number of rows, or to one length, must have it in every batch."""
    rows: dict[int, tuple[str, int]] = {}
    lengths: dict[str, tuple[str, int]] = {}
    for spec, leaf in zip(graph.inputs, tensors, strict=True):
        if spec.batch_dim is not None:
            name, size = rows.setdefault(spec.shape[0], (spec.name, leaf.shape[0]))
            if leaf.shape[0] != size:
                raise InputError(f"input {spec.name!r} has {leaf.shape[0]} rows, but {name!r} has {size}")
        for dim in spec.free_dims:
            name, size = lengths.setdefault(_symbol(graph, spec, dim), (spec.name, leaf.shape[dim]))
            if leaf.shape[dim] != size:
                raise InputError(
                    f"input {spec.name!r} has size {leaf.shape[dim]} in dimension {dim}, but {name!r} has {size}:"
                    " the model needs them equal"
                )


def _symbol(graph: Graph, spec: TensorSpec, dim: int) -> str:
    """What the capture calls a free size: equal names are equal sizes."""
    placeholders = graph.train.graph.find_nodes(op="placeholder")
    node = next(node for node in placeholders if node.name == spec.name)
    return str(node.meta["val"].shape[dim])
