"""Captured graphs of any size, built node by node: torch.export would take minutes for the largest of them."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autodecouple.graph import Graph
from autodecouple.passes.measure import annotate
from autodecouple.plans import TensorSpec

ROWS, WIDTH, CLASSES = 7, 16, 3
NODES_PER_BLOCK = 4


class Block(nn.Module):
    """x + down(relu(up(x)))"""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)


class Tower(nn.Module):
    """An embedding, which takes memory and hardly a FLOP, residual blocks of different widths, and a classifier."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8 * num_blocks, WIDTH)
        self.blocks = nn.ModuleList(Block(8 + 8 * (index * 7 % 5)) for index in range(num_blocks))
        self.classifier = nn.Linear(WIDTH, CLASSES)


def residual_tower(num_nodes: int) -> Graph:
    """A tower of about so many operations, captured and measured; half of its nodes name parameters (on meta)."""
    num_blocks = max(1, num_nodes // NODES_PER_BLOCK)
    with torch.device("meta"):
        model = Tower(num_blocks)
    builder = _Builder(model)
    tokens = builder.graph.placeholder("tokens")
    tokens.meta["val"] = builder.fake(ROWS, dtype=torch.int64)
    value = builder.embedding(tokens, "embedding")
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        value = builder.block(value, f"blocks.{index}", block.up.out_features)
    builder.graph.output((builder.linear(value, "classifier", CLASSES),))
    spec = TensorSpec("tokens", (ROWS,), "int64", 0)
    train = fx.GraphModule(model, builder.graph)
    return annotate(Graph(model, train, None, (spec,), {}, None, None))


class _Builder:
    """Writes operations as torch.export does: weights are get_attr nodes, every node knows its modules."""

    def __init__(self, model: nn.Module) -> None:
        self.mode = FakeTensorMode()
        self.graph = fx.Graph(model)

    def fake(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with self.mode:
            return torch.empty(shape, dtype=dtype)

    def embedding(self, tokens: fx.Node, name: str) -> fx.Node:
        weight = self.graph.get_attr(f"{name}.weight")
        return self._call(torch.ops.aten.embedding.default, (weight, tokens), WIDTH, {name: (name, "Embedding")})

    def block(self, x: fx.Node, name: str, hidden: int) -> fx.Node:
        path = {name: (name, "Block")}
        inner = self.linear(x, f"{name}.up", hidden, path)
        inner = self._call(torch.ops.aten.relu.default, (inner,), hidden, path)
        inner = self.linear(inner, f"{name}.down", WIDTH, path)
        return self._call(torch.ops.aten.add.Tensor, (x, inner), WIDTH, path)

    def linear(self, x: fx.Node, name: str, width: int, outer: dict[str, tuple[str, str]] | None = None) -> fx.Node:
        weights = [self.graph.get_attr(f"{name}.{kind}") for kind in ("weight", "bias")]
        path = {**(outer or {}), name: (name, "Linear")}
        return self._call(torch.ops.aten.linear.default, (x, *weights), width, path)

    def _call(
        self, target: torch._ops.OpOverload, args: tuple[fx.Node, ...], width: int, path: dict[str, tuple[str, str]]
    ) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta |= {"val": self.fake(ROWS, width), "nn_module_stack": {"": ("", "Tower"), **path}}
        return node
