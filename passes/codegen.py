"""Cut the graph apart: one GraphModule per stage, with readable code and the user's own parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from autodecouple.graph import Graph, attribute, module_path, operations
from autodecouple.passes.capturing.vmaps import BODIES
from autodecouple.passes.insert import ORIGIN, ROLE, STAGE
from autodecouple.plans import Plan


@dataclass(frozen=True)
class StageCode:
    """One stage as modules; names say which value goes where.

    body:        forward(*inputs, randomness?) -> tuple of outputs
    inputs:      what the body takes, of the values that the stage was sent
    outputs:     what the body returns
    sends:       what the next stage is sent: of the body's outputs and of what this stage was sent
    head:        the head, or the criterion on the last stage; None before a coupled cut
    head_inputs: what the head takes before the signal; a mask stands last, by keyword
    mask:        its name, if there is one
    draws:       whether the body takes the randomness; head_draws: whether the head does, by keyword
    written:     buffers that the body writes (BatchNorm statistics, counters), by name
    overwrites:  inputs whose memory the body writes into
    origins:     names in the plan of values that were detached or copied at a cut, where they differ
    """

    body: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sends: tuple[str, ...]
    head: nn.Module | None
    head_inputs: tuple[str, ...]
    mask: str | None
    draws: bool
    head_draws: bool
    written: tuple[str, ...]
    overwrites: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)

    def origin(self, name: str) -> str:
        """The name in the plan, and in the captured graph, of a value that the stage knows by `name`."""
        return self.origins.get(name, name)

    @property
    def text(self) -> str:
        """The code that runs, with the module path of each operation, and the head; `x = None` frees are left out."""
        paths = {node.name: module_path(node)[-1:] for node in self.body.graph.nodes}
        lines: list[str] = []
        current: tuple[str, ...] = ("",)
        for line in self.body.code.strip().splitlines():
            path = paths.get(line.split("=")[0].strip(), ())
            if path and path != current:
                lines.append(f"    # {path[0] or type(self.body).__name__}")
                current = path
            lines.append(re.sub(r";  [\w = ]+ = None$", "", line))
        code = "\n".join(lines).replace("def forward", f"def {type(self.body).__name__.lower()}", 1)
        return f"{code}\n\n# head: {self.head!r}\n"


def emit_stages(module: fx.GraphModule, graph: Graph, plan: Plan) -> tuple[StageCode, ...]:
    """Split the graph that `insert_heads` made, along the stages its nodes carry."""
    splitter = _Splitter(module, graph, plan)
    return tuple(splitter.stage(index) for index in range(len(plan.stages)))


def on_device(arguments: Any, device: torch.device) -> Any:
    """Devices that tracing baked in follow the stage."""
    return fx.node.map_aggregate(arguments, lambda value: device if isinstance(value, torch.device) else value)


def rehome(code: StageCode, device: torch.device) -> None:
    """Let the devices that tracing baked into a stage, its head included, be this one."""
    for module in (code.body, code.head):
        rehome_within(module, device)


def rehome_within(module: nn.Module | None, device: torch.device) -> None:
    """The same for the graphs that a module holds, where there are any."""
    for inner in module.modules() if module is not None else ():
        if isinstance(inner, fx.GraphModule):
            rehome_graph(inner.graph, device)
            inner.recompile()


def rehome_graph(graph: fx.Graph, device: torch.device) -> None:
    """The same for a graph; a module over it has to be compiled again."""
    for node in graph.nodes:
        node.args, node.kwargs = on_device(node.args, device), on_device(node.kwargs, device)
        for body in node.meta.get(BODIES, ()):
            rehome_graph(body.graph, device)
            body.recompile()


def parameter_stages(graph: Graph, plan: Plan) -> dict[str, int]:
    """The stage that uses each parameter and buffer."""
    stage_of = {name: stage.index for stage in plan.stages for name in stage.nodes}
    homes: dict[str, int] = {}
    for node in graph.train.graph.find_nodes(op="get_attr"):
        stages = [stage_of[user.name] for user in node.users if user.name in stage_of]
        if stages:
            homes[str(node.target)] = min(stages)
    return homes


def _is_randomness(node: fx.Node) -> bool:
    return node.meta.get(ROLE) == "randomness"


class _Splitter:
    """Builds stages out of the whole graph; a value keeps its name in every stage."""

    def __init__(self, module: fx.GraphModule, graph: Graph, plan: Plan) -> None:
        self.module = module
        self.graph = graph
        self.plan = plan
        self.homes = parameter_stages(graph, plan)
        self.nodes = operations(module.graph)
        self.last = len(plan.stages) - 1

    def stage(self, index: int) -> StageCode:
        body = [n for n in self.nodes if n.meta[STAGE] == index and ROLE not in n.meta]
        head = next(
            (n for n in self.nodes if n.meta[STAGE] == index and n.op == "call_module" and ROLE in n.meta), None
        )
        sends = self._needed_after(index)
        mask = head.kwargs.get("mask") if head is not None else None
        reads = [arg for arg in head.args[:-1] if isinstance(arg, fx.Node)] if head is not None else []
        wanted = dict.fromkeys([*sends, *reads, *([mask] if isinstance(mask, fx.Node) else [])])
        outputs = [node for node in wanted if node in set(body)]
        inputs = self._outside(body)
        found = self.module.get_submodule(str(head.target)) if head is not None else None
        rehome_within(found, torch.device(self.plan.stages[index].device))
        return StageCode(
            body=self._body(index, body, inputs, outputs),
            inputs=tuple(node.name for node in inputs if not _is_randomness(node)),
            outputs=tuple(node.name for node in outputs),
            sends=tuple(node.name for node in sends),
            head=found,
            head_inputs=tuple(node.name for node in reads),
            mask=mask.name if isinstance(mask, fx.Node) else None,
            draws=any(map(_is_randomness, inputs)),
            head_draws=head is not None and "randomness" in head.kwargs,
            written=self._written(body),
            overwrites=self._overwrites(body, inputs),
            origins={node.name: node.meta[ORIGIN] for node in self.nodes if ORIGIN in node.meta},
        )

    def _needed_after(self, index: int) -> list[fx.Node]:
        """Values of this stage or before it that a later stage, or the model's output, uses."""
        later = [n for n in self.nodes if n.meta[STAGE] > index]
        used = dict.fromkeys(source for node in later for source in node.all_input_nodes)
        if index == self.last:
            return []
        return [node for node in self._values() if node in used and node.meta.get(STAGE, -1) <= index]

    def _values(self) -> list[fx.Node]:
        placeholders = [n for n in self.module.graph.find_nodes(op="placeholder") if ROLE not in n.meta]
        return [*placeholders, *(node for node in self.nodes if ROLE not in node.meta)]

    def _outside(self, body: list[fx.Node]) -> list[fx.Node]:
        """What the body takes from elsewhere, parameters aside; the randomness last."""
        inside = set(body)
        used = {source for node in body for source in node.all_input_nodes}
        found = [n for n in self.module.graph.nodes if n in used and n not in inside and n.op != "get_attr"]
        return sorted(found, key=_is_randomness)

    def _body(self, index: int, body: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
        graph = fx.Graph()
        device = torch.device(self.plan.stages[index].device)
        copies: dict[fx.Node, fx.Node] = {}
        for node in inputs:
            copies[node] = graph.placeholder(node.name)
        for node in body:
            for source in node.all_input_nodes:  # a parameter stands where it is first used
                if source not in copies:
                    copies[source] = graph.node_copy(source)
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        rehome_graph(graph, device)
        graph.output(tuple(copies[node] for node in outputs))
        root = {str(n.target): self._owned(n, index) for n in graph.find_nodes(op="get_attr")}
        return fx.GraphModule(root, graph, f"Stage{index}")

    def _owned(self, node: fx.Node, index: int) -> Any:
        """The user's own tensor; a stage on another device than its home reads a copy (it is never written then)."""
        value, home = attribute(self.module, node), self.homes.get(str(node.target), index)
        device = self.plan.stages[index].device
        if isinstance(value, torch.Tensor) and self.plan.stages[home].device != device:
            return value.detach().to(device, copy=True)
        return value

    def _writes(self, body: list[fx.Node]) -> set[int]:
        """Memory that an operation of the body writes into."""
        measures = self.graph.measures
        return {s for node in body if node.name in measures for s in measures[node.name].writes}

    def _overwrites(self, body: list[fx.Node], inputs: list[fx.Node]) -> tuple[str, ...]:
        writes, measures = self._writes(body), self.graph.measures
        names = {node.name: node.meta.get(ORIGIN, node.name) for node in inputs if not _is_randomness(node)}
        return tuple(name for name, origin in names.items() if measures[origin].storages & writes)

    def _written(self, body: list[fx.Node]) -> tuple[str, ...]:
        """Buffers whose memory an operation of the body writes into."""
        measures, writes = self.graph.measures, self._writes(body)
        used = {source for node in body for source in node.all_input_nodes if source.op == "get_attr"}
        return tuple(sorted(str(node.target) for node in used if measures[node.name].storages & writes))
