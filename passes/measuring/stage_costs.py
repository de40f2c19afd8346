"""What a stage between any two legal cuts would cost."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import fx

from autodecouple.graph import Graph, attribute, module_path
from autodecouple.objectives.objective import Objective
from autodecouple.passes.candidates import Candidate
from autodecouple.passes.measure import HeadCost, head_cost
from autodecouple.passes.measuring.memory import MemoryWalk
from autodecouple.passes.measuring.stage_memory import OPTIMIZER_STATES, HeadMemory, StageMemory
from autodecouple.plans import Cut, Plan, StageSpec

FORBIDDEN = 2**60
"""Cost of a stage that is not allowed; far above any real one, far below the overflow of a sum."""


class StageCosts:
    """FLOPs and bytes of every stage that the legal cuts allow.

    Rows are ends (each legal cut, then the model's end), columns are starts (the model's beginning, then the place
    after each legal cut).

    recompute: a stage runs its forward again, for and as a part of its backward
    """

    def __init__(self, graph: Graph, legal: Sequence[Candidate], recompute: bool = False) -> None:
        self.graph = graph
        self.legal = legal
        self.recompute = recompute
        self.cuts: list[Cut] = [candidate.cut for candidate in legal if candidate.cut is not None]
        self.nodes = graph.operations
        self.measures = [graph.measures[node.name] for node in self.nodes]
        self.starts = [0, *(candidate.position + 1 for candidate in legal)]
        self.ends = [*(candidate.position for candidate in legal), len(self.nodes) - 1]
        self._memory: dict[tuple[bool, bool], StageMemory] = {}  # by whether start and end are coupled
        self._tables_of_heads: dict[int, torch.Tensor] = {}  # by the objective's id

    @cached_property
    def first_uses(self) -> dict[int, list[torch.Tensor]]:
        """The trainable parameters by the position of their first use."""
        parameters = {
            str(n.target): attribute(self.graph.train, n) for n in self.graph.train.graph.find_nodes(op="get_attr")
        }
        first: dict[int, list[torch.Tensor]] = {}
        for name, uses in self.graph.parameter_uses().items():
            if uses:
                first.setdefault(min(uses), []).append(parameters[name])
        return first

    @cached_property
    def trained(self) -> Counter[int]:
        """How many parameters that the outputs train are first used at a position."""
        uses = self.graph.parameter_uses()
        return Counter(min(uses[name]) for name in self.graph.trained if uses.get(name))

    def most_stages(self) -> int:
        """How many stages with something to train each: take every cut that closes one."""
        used = sorted(self.trained)
        count, start = 0, 0
        for end in self.ends:
            if bisect_left(used, start) < bisect_right(used, end):
                count, start = count + 1, end + 1
        return count

    def table(self, stage: int, objectives: Sequence[Objective], memory_limit: int | None) -> torch.Tensor:
        """(ends, starts) FLOPs of a training step of stage number `stage`, FORBIDDEN where it is not allowed."""
        detached, coupled, trained = self._tables
        after_coupled = stage > 0 and objectives[stage - 1].name == "bp"
        flops = (coupled if after_coupled else detached).clone()
        if stage < len(objectives):
            flops[:-1] += self._head_tables(objectives[stage])[0]
            if objectives[stage].name != "bp":
                blind = torch.tensor([candidate.blind for candidate in self.legal])[:, None]
                flops[:-1][torch.tensor(self.starts)[None, :] <= blind] = FORBIDDEN
        backwards = torch.tensor(self.ends)[:, None] < torch.tensor(self.starts)[None, :]
        flops[backwards | (trained == 0)] = FORBIDDEN
        if memory_limit is not None:
            flops[self._needs(stage, objectives) > memory_limit] = FORBIDDEN
        return flops

    @cached_property
    def _tables(self) -> tuple[torch.Tensor, ...]:
        """(ends, starts) each: FLOPs after a detached cut, FLOPs after a coupled one, trained parameters.

        One walk over the nodes keeps, for every start, what a stage that begins there has cost so far.
        """
        sums = torch.zeros(3, len(self.starts), dtype=torch.int64)
        rows, ends = [], set(self.ends)
        for position, measure in enumerate(self.measures):
            begun = bisect_right(self.starts, position)
            forward = measure.forward_flops * (1 + self.recompute)
            everything = forward + sum(flops for _, flops in measure.backward_flops)
            added = [forward, everything, self.trained[position]]
            if any(added):
                sums[:, :begun] += torch.tensor(added, dtype=torch.int64)[:, None]
            for threshold, flops in measure.backward_flops:
                # spent only by a stage that begins early enough to hold the parameter behind that input
                sums[0, : bisect_right(self.starts, threshold)] += flops
            if position in ends:
                rows.append(sums.clone())
        return tuple(torch.stack(rows).unbind(dim=1))

    def _head_tables(self, objective: Objective) -> torch.Tensor:
        """(4, legal cuts, starts): FLOPs and bytes of the head, which reads more in a longer stage: see `HeadCost`."""
        if id(objective) not in self._tables_of_heads:
            costs = torch.zeros(4, len(self.cuts), len(self.starts), dtype=torch.int64)
            for end, candidate in enumerate(self.legal):
                longer = sorted({threshold for _, threshold in candidate.reads[1:] if threshold >= 0}, reverse=True)
                for start in (len(self.nodes), *longer):
                    head, begun = self.head(end, start, objective), bisect_right(self.starts, start)
                    numbers = [head.flops, head.parameter_bytes, head.largest_bytes, head.peak_bytes]
                    costs[:, end, :begun] = torch.tensor(numbers)[:, None]
            self._tables_of_heads[id(objective)] = costs
        return self._tables_of_heads[id(objective)]

    def memory(self, stage: int, objectives: Sequence[Objective]) -> StageMemory:
        """Bytes of every stage as stage number `stage`, heads apart."""
        coupled = [False, *(objective.name == "bp" for objective in objectives), False]
        key = coupled[stage], coupled[stage + 1]
        if key not in self._memory:
            self._memory[key] = MemoryWalk(self.graph, self.legal, *key).tables()
        return self._memory[key]

    def _step_bytes(self, stage: int, objectives: Sequence[Objective]) -> torch.Tensor:
        """(ends, starts) bytes that a step takes beside weights, frozen tensors and optimizer state."""
        heads = torch.zeros(3, len(self.ends), len(self.starts), dtype=torch.int64)
        heads[2, -1] = self._criterion_bytes()
        if stage < len(objectives):
            heads[:, :-1] = self._head_tables(objectives[stage])[1:]
        return self.memory(stage, objectives).step(HeadMemory(*heads), self.recompute)

    def _needs(self, stage: int, objectives: Sequence[Objective]) -> torch.Tensor:
        """(ends, starts) bytes of a training step of stage number `stage`: `StageSpec.memory_bytes`."""
        memory = self.memory(stage, objectives)
        needs = self._step_bytes(stage, objectives) + (1 + OPTIMIZER_STATES) * memory.weights + memory.frozen
        if stage < len(objectives):
            needs[:-1] += (1 + OPTIMIZER_STATES) * self._head_tables(objectives[stage])[1]
        return needs

    def _criterion_bytes(self) -> int:
        """What cross-entropy takes: the logarithms of the probabilities, and two gradients of that size."""
        specs = [self.graph.measures[leaf.name].value for leaf in self.graph.outputs if isinstance(leaf, fx.Node)]
        return 3 * sum(spec.num_bytes for spec in specs if spec is not None and "float" in spec.dtype)

    def head(self, end: int, start: int, objective: Objective) -> HeadCost:
        """Cost of the objective's head on what it reads at a legal cut, in a stage that begins at a position."""
        if objective.name == "bp":
            return HeadCost(0, 0, 0)
        specs = [self.cuts[end].spec(name) for name in self.legal[end].features(start)]
        return head_cost(objective, [dataclasses.replace(s, name="features") for s in specs], self.graph.signal)

    def plan(self, chosen: Sequence[int], objectives: Sequence[Objective]) -> Plan:
        """The plan with these legal cuts, all stages on one lane."""
        begins, ends = [0, *(end + 1 for end in chosen)], [*chosen, len(self.cuts)]
        cuts = tuple(map(self._cut, begins, chosen, objectives))
        stages = [
            self._stage(index, begin, end, objectives, coupled=index > 0 and not cuts[index - 1].detached)
            for index, (begin, end) in enumerate(zip(begins, ends, strict=True))
        ]
        model = type(self.graph.model).__name__
        return Plan(tuple(stages), cuts, model, self.graph.inputs, self.graph.warnings, self.recompute)

    def _cut(self, begin: int, end: int, objective: Objective) -> Cut:
        """A legal cut as the end of the stage that begins there."""
        features = self.legal[end].features(self.starts[begin])
        detached = objective.name != "bp"
        return dataclasses.replace(self.cuts[end], features=features, detached=detached, encodes=objective.encodes)

    def _stage(self, index: int, begin: int, end: int, objectives: Sequence[Objective], *, coupled: bool) -> StageSpec:
        start, stop = self.starts[begin], self.ends[end] + 1
        last = index == len(objectives)
        head = HeadCost(0, 0, 0) if last else self.head(end, start, objectives[index])
        flops = {p: self._node_flops(p, -1 if coupled else start) for p in range(start, stop)}
        parameters = [p for position in range(start, stop) for p in self.first_uses.get(position, [])]
        weights = sum(map(_num_bytes, parameters))
        memory = self.memory(index, objectives)
        costliest = max(flops, key=lambda position: sum(flops[position]))
        return StageSpec(
            index=index,
            nodes=tuple(node.name for node in self.nodes[start:stop]),
            objective="criterion" if last else objectives[index].name,
            forward_flops=sum(forward for forward, _ in flops.values()),
            backward_flops=sum(backward for _, backward in flops.values()),
            head_flops=head.flops,
            num_parameters=sum(parameter.numel() for parameter in parameters),
            parameter_bytes=weights,
            head_parameter_bytes=head.parameter_bytes,
            frozen_bytes=int(memory.frozen[end, begin]),
            activation_bytes=int((memory.resting if self.recompute else memory.activations)[end, begin]),
            optimizer_bytes=OPTIMIZER_STATES * (weights + head.parameter_bytes),
            step_bytes=int(self._step_bytes(index, objectives)[end, begin]),
            modules=whole_modules(self.nodes, start, stop),
            costliest_node=self.nodes[costliest].name,
            costliest_flops=sum(flops[costliest]),
        )

    def _node_flops(self, position: int, start: int) -> tuple[int, int]:
        """FLOPs forward and backward of one node in a stage that begins at `start`; -1 asks for every gradient."""
        measure = self.measures[position]
        backward = sum(flops for threshold, flops in measure.backward_flops if threshold >= start)
        return measure.forward_flops, backward + self.recompute * measure.forward_flops


def whole_modules(nodes: Sequence[fx.Node], start: int, stop: int) -> tuple[str, ...]:
    """The modules whose forward lies wholly in [start, stop), in order and none within another."""
    last = {name: position for position, node in enumerate(nodes) for name in module_path(node)}
    first = {name: position for position, node in reversed(list(enumerate(nodes))) for name in module_path(node)}
    outermost = (
        next((name for name in module_path(node) if name and start <= first[name] and last[name] < stop), "")
        for node in nodes[start:stop]
    )
    return tuple(dict.fromkeys(filter(None, outermost)))


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
