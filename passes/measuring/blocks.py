"""The captured graph in blocks, each between neighbouring legal cuts, as modules that run by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from autodecouple.graph import LEAF, Graph, attribute
from autodecouple.passes.capturing.autocast import called
from autodecouple.passes.capturing.vmaps import BODIES
from autodecouple.passes.codegen import rehome_graph
from autodecouple.passes.insert import draws, key_randomness, plain_memory


@dataclass(frozen=True)
class Block:
    """Consecutive operations.

    inputs:  values from before that it uses; attributes: parameters, buffers and constants that it uses
    outputs: its values that anything behind it uses
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    attributes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def draws(self) -> bool:
        return any(map(draws, self.nodes))


def split(graph: Graph, ends: Sequence[int]) -> Iterator[Block]:
    """The blocks that end at these positions, in order; the last one ends with the model."""
    starts = [0, *(end + 1 for end in ends)]
    for start, stop in zip(starts, [*starts[1:], len(graph.operations)], strict=True):
        yield block_of(graph.operations[start:stop])


def block_of(nodes: Sequence[fx.Node]) -> Block:
    inside = set(nodes)
    sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    return Block(
        nodes=tuple(nodes),
        inputs=tuple(source for source in sources if source.op != "get_attr"),
        attributes=tuple(source for source in sources if source.op == "get_attr"),
        outputs=tuple(node for node in nodes if any(user not in inside for user in node.users)),
    )


def assemble(graph: Graph, block: Block, device: torch.device) -> fx.GraphModule:
    """forward(*inputs, randomness?) -> tuple of outputs, over the user's own tensors, as a stage would run it."""
    work = fx.Graph()
    copies = {node: work.placeholder(node.name) for node in block.inputs}
    randomness = work.placeholder("randomness") if block.draws else None
    for node in (*block.attributes, *block.nodes):
        copies[node] = work.node_copy(node, lambda source: copies[source])
    for node in block.nodes:
        _guard_group_norm(graph, node, copies)
    if randomness is not None:
        key_randomness(work, randomness)
    work.output(tuple(copies[node] for node in block.outputs))
    rehome_graph(work, device)
    root = {str(node.target): attribute(graph.train, node) for node in block.attributes}
    return fx.GraphModule(root, work, "Block")


def _guard_group_norm(graph: Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> None:
    """As in a stage: torch crashes in the backward of one whose input needs no gradient, unless its memory is plain."""
    operation, args = called(node)
    if operation is not torch.ops.aten.group_norm.default or not isinstance(args[0], fx.Node):
        return
    if not graph.measures[args[0].name].carries_gradient(graph.measures[node.name].position):
        copy, source = copies[node], copies[args[0]]
        with copy.graph.inserting_before(copy):
            copy.replace_input_with(source, copy.graph.call_function(plain_memory, (source,)))


def tensors_of(graph: Graph, block: Block) -> list[torch.Tensor]:
    """The tensors of the model that a block uses, each once."""
    found = (attribute(graph.train, node) for node in block.attributes)
    return list({id(value): value for value in found if isinstance(value, torch.Tensor)}.values())


def signature(graph: Graph, block: Block, values: Sequence[Any]) -> str | None:
    """Equal for blocks that do the same work on inputs alike: one of them is enough to time.

    None where nothing tells what an operation does, as of modules that run whole.
    """
    if any(LEAF in node.meta or BODIES in node.meta for node in block.nodes):
        return None
    attributes = [attribute(graph.train, node) for node in block.attributes]
    if any(isinstance(value, nn.Module) for value in attributes):
        return None
    numbers = {node: index for index, node in enumerate((*block.inputs, *block.attributes, *block.nodes))}
    needs = [_needs_gradient(graph, block, node) for node in block.inputs]
    sources = [_form(value) for value in (*values, *attributes)]
    calls = [
        (str(node.target), fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}"))
        for node in block.nodes
    ]
    return repr((sources, needs, calls, [numbers[node] for node in block.outputs]))


def _needs_gradient(graph: Graph, block: Block, node: fx.Node) -> bool:
    return graph.measures[node.name].carries_gradient(graph.measures[block.nodes[0].name].position)


def gradient_inputs(graph: Graph, block: Block) -> list[bool]:
    """Which of the inputs carry a gradient."""
    return [_needs_gradient(graph, block, node) for node in block.inputs]


def written_inputs(graph: Graph, block: Block) -> list[bool]:
    """Into the memory of which inputs the block writes."""
    writes = {storage for node in block.nodes for storage in graph.measures[node.name].writes}
    return [bool(graph.measures[node.name].storages & writes) for node in block.inputs]


def _form(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), tuple(value.stride()), str(value.dtype), value.requires_grad
    return value
