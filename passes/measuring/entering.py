"""Real values for the model's inputs, where the example's own are not at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from autodecouple.graph import Graph, dtype_from
from autodecouple.plans import TensorSpec

aten = torch.ops.aten


def entering(graph: Graph, device: torch.device, example: Sequence[Any] = ()) -> dict[fx.Node, Any]:
    """A value for every input of the graph: of the example where it is real and of that size, else random.

    example: flat leaves in the order of the graph's inputs; () for none
    """
    nodes = graph.train.graph.find_nodes(op="placeholder")
    specs = {spec.name: spec for spec in graph.inputs}
    found = dict(graph.constants)
    for index, node in enumerate(nodes):
        if (spec := specs.get(node.name)) is not None:
            given = example[index] if example else None
            real = isinstance(given, torch.Tensor) and not given.is_meta and tuple(given.shape) == spec.shape
            value = given.detach() if real else random_like(spec, _rows_of_table(graph, node))  # type: ignore[union-attr]
            found[node.name] = value.to(device, copy=True)  # the forward may write into it
    return {node: found[node.name] for node in nodes}


def random_like(spec: TensorSpec, num_values: int = 2) -> torch.Tensor:
    """Random numbers of a shape and dtype; whole ones from 0 to `num_values` - 1, booleans True."""
    dtype = dtype_from(spec.dtype)
    if dtype == torch.bool:  # a mask that hides everything gives NaN
        return torch.ones(spec.shape, dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(spec.shape, dtype=dtype)
    return torch.randint(num_values, spec.shape, dtype=dtype)


def _rows_of_table(graph: Graph, entry: fx.Node) -> int:
    """Rows of the smallest embedding that an input of whole numbers is looked up in; 2 where there is none."""
    reached, rows = {entry}, []
    for node in graph.operations:
        if reached.isdisjoint(node.all_input_nodes):
            continue
        if node.target is aten.embedding.default and node.args[1] in reached:
            rows += _first_sizes(graph, [node.args[0]])
        elif (spec := graph.measures[node.name].value) is not None and spec.dtype.startswith(("int", "uint")):
            reached.add(node)
    return min(rows, default=2)


def _first_sizes(graph: Graph, nodes: Iterable[Any]) -> list[int]:
    specs = [graph.measures[node.name].value for node in nodes if isinstance(node, fx.Node)]
    return [spec.shape[0] for spec in specs if spec is not None]
