"""Stages of a model by hand, pass by pass, so that tests can look between the passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graph_strategies import touch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autodecouple.errors import PartitionError
from autodecouple.graph import Graph
from autodecouple.objectives import SupCon
from autodecouple.objectives.criterion import Criterion
from autodecouple.objectives.gather import gathered_head
from autodecouple.options import Loss, Wish
from autodecouple.passes import verify
from autodecouple.passes.candidates import Candidate
from autodecouple.passes.codegen import StageCode, emit_stages
from autodecouple.passes.insert import insert_heads
from autodecouple.passes.trace import bind
from autodecouple.pipeline import analyse, decide
from autodecouple.plans import Plan
from autodecouple.randomness import Randomness

SMALL = SupCon(hidden=8, out=4)
UNKEYED = Randomness(None)
"""Draws from torch's default generator, as the original does."""


@dataclass
class Built:
    """A model and all that the passes made of it."""

    model: nn.Module
    graph: Graph
    candidates: tuple[Candidate, ...]
    plan: Plan
    module: fx.GraphModule
    codes: tuple[StageCode, ...]

    def values(self, inputs: Any) -> dict[str, Any]:
        names = [node.name for node in self.graph.train.graph.find_nodes(op="placeholder")]
        return dict(zip(names, bind(self.graph, inputs), strict=True))

    def stage(self, index: int, received: dict[str, Any], randomness: Randomness = UNKEYED) -> dict[str, Any]:
        """Run one stage's body: what it was sent and made."""
        code = self.codes[index]
        arguments = [received[name] for name in code.inputs]
        outputs = code.body(*arguments, *([randomness] if code.draws else []))
        return {**received, **dict(zip(code.outputs, outputs, strict=True))}

    def run(self, inputs: Any, randomness: Randomness = UNKEYED) -> list[dict[str, Any]]:
        """One stage after the other; the values that each had, cut free between them as the executors do."""
        received, found = self.values(inputs), []
        for index, code in enumerate(self.codes):
            found.append(self.stage(index, received, randomness))
            received = {n: v.detach() if isinstance(v := found[-1][n], Tensor) else v for n in code.sends}
        return found

    def output(self, values: dict[str, Any]) -> Any:
        """The model's output from the last stage's values."""
        named = iter(self.codes[-1].head_inputs)
        leaves = [values[next(named)] if isinstance(leaf, fx.Node) else leaf for leaf in self.graph.outputs]
        return pytree.tree_unflatten(leaves, self.graph.out_spec)


def decided(
    graph: Graph, candidates: tuple[Candidate, ...], n_stages: int, loss: Loss, devices: Sequence[str] = ("cpu",)
) -> Plan:
    """The plan with this many stages, or with as many as there can be."""
    for count in range(n_stages, 1, -1):
        try:
            return decide(graph, candidates, Wish.checked(count, loss, devices))
        except PartitionError:
            continue
    return decide(graph, candidates, Wish.checked(1, loss if isinstance(loss, str) else SMALL, devices))


def build(model: nn.Module, inputs: Any, n_stages: int, loss: Loss = SMALL, devices: Sequence[str] = ("cpu",)) -> Built:
    """The criterion touches every output, so that every stage's parameters matter."""
    graph, candidates = analyse(model, inputs)
    plan = decided(graph, candidates, n_stages, loss, devices)
    heads = []
    for cut in plan.cuts:
        features = [cut.spec(name) for name in cut.features]
        with verify.seeded(len(heads)):
            heads.append(gathered_head(SMALL, features, graph.signal) if cut.detached else None)
    constants = {index: leaf for index, leaf in enumerate(graph.outputs) if not isinstance(leaf, fx.Node)}
    criterion = Criterion(lambda output, target: touch(output), graph.out_spec, constants)
    module = insert_heads(graph, plan, heads, criterion)
    verify.plan_fits(graph, plan)
    verify.heads_fit(module, graph, plan)
    codes = emit_stages(module, graph, plan)
    verify.stages_fit(codes, plan)
    return Built(model, graph, candidates, plan, module, codes)


def target(rows: int) -> Tensor:
    """Two classes, so that there are positives."""
    return torch.arange(rows) % 2
