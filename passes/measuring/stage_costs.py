"""What a stage between any two legal cuts would cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, fx

from autodecouple.graph import Graph
from autodecouple.objectives.objective import Objective, Signal, at_cut, signal_of, tie_of
from autodecouple.passes.candidates import Candidate
from autodecouple.passes.measure import HeadCost
from autodecouple.passes.measuring.charges import Charge
from autodecouple.passes.measuring.extents import Extents
from autodecouple.passes.measuring.floors import first_within
from autodecouple.passes.measuring.head_costs import HeadCosts, HeadRuns
from autodecouple.passes.measuring.lifetimes import Lifetimes
from autodecouple.passes.measuring.memory import MemoryWalk
from autodecouple.passes.measuring.prices import Prices, Tie
from autodecouple.passes.measuring.stage_memory import OPTIMIZER_STATES, HeadMemory
from autodecouple.passes.partitioning.runs import StageRuns
from autodecouple.passes.partitioning.sums import RunSums
from autodecouple.plans import Cut, Plan, StageSpec

Kind = tuple[Tie, Tie, tuple[int, Signal] | None]
"""How a stage is tied to the one before and to the one behind, and its objective's id with what that compares with,
None for the last."""


class StageCosts:
    """Costs and bytes of the stages that the legal cuts allow, linear in the nodes.

    Ends are the legal cuts, then the model's end; starts are the model's beginning, then the place after each legal
    cut. Between two of them lies a segment: a stage from start b to end e holds the segments from b to e.

    charge: what costs are counted in; None is FLOPs. Its speed and memory limit do not count here
    """

    def __init__(self, graph: Graph, legal: Sequence[Candidate], charge: Charge | None = None) -> None:
        self.graph = graph
        self.legal = legal
        self.charge = charge or Charge(graph)
        self.cuts: list[Cut] = [candidate.cut for candidate in legal if candidate.cut is not None]
        self.nodes = graph.operations
        self.starts = [0, *(candidate.position + 1 for candidate in legal)]
        self.ends = [*(candidate.position for candidate in legal), len(self.nodes) - 1]
        self.heads = HeadCosts(legal, self.charge.head)
        self._walks: dict[tuple[Tie, Tie], MemoryWalk] = {}  # by how start and end are tied
        self._head_runs: dict[tuple[int, Signal], HeadRuns] = {}  # by the objective's id and signal
        self._runs: dict[Kind, StageRuns] = {}

    @cached_property
    def first_uses(self) -> dict[int, list[Tensor]]:
        """The trainable parameters by the position of their first use."""
        parameters = {str(node.target): value for node, value in self.graph.owned.items()}
        first: dict[int, list[Tensor]] = {}
        for name, position in self.graph.first_uses.items():
            first.setdefault(position, []).append(parameters[name])
        return first

    @cached_property
    def _training(self) -> Tensor:
        """The segments in which parameters that the outputs train are first used."""
        trained = self.graph.trained
        first = [position for name, position in self.graph.first_uses.items() if name in trained]
        segments: Tensor = torch.unique(self._segments(torch.tensor(first, dtype=torch.int64)))
        return segments

    def most_stages(self) -> int:
        """How many stages with something to train each: take every cut that closes one."""
        return len(self._training)

    def kind(self, stage: int, objectives: Sequence[Objective]) -> Kind:
        ties = ["detached", *map(tie_of, objectives), "detached"]
        head = (id(objectives[stage]), self._signal(stage, objectives)) if stage < len(objectives) else None
        return ties[stage], ties[stage + 1], head

    def _signal(self, stage: int, objectives: Sequence[Objective]) -> Signal:
        return signal_of(stage, objectives, self.graph.signal)

    def runs(self, stage: int, objectives: Sequence[Objective]) -> StageRuns:
        """The stages that may be stage number `stage`: those that train something which their head sees."""
        kind = self.kind(stage, objectives)
        if kind not in self._runs:
            self._runs[kind] = self._allowed(stage, objectives)
        return self._runs[kind]

    def _allowed(self, stage: int, objectives: Sequence[Objective]) -> StageRuns:
        before, after, _ = self.kind(stage, objectives)
        sums = self._sums[0 if before == "detached" else 2 if after == "overlapping" else 1]
        if stage == len(objectives):
            end, start, head = torch.tensor([[len(self.legal)], [0], [self.charge.criterion]])
            runs = StageRuns(sums, end, start, self._last_starts[end], head)
        else:
            heads, blind = self._heads(stage, objectives), objectives[stage].name != "bp"
            first = torch.maximum(heads.first, self._seen[heads.end]) if blind else heads.first
            last = torch.minimum(heads.last, self._last_starts[heads.end])
            runs = StageRuns(sums, heads.end, first, last, heads.price)
        return runs.where(runs.first <= runs.last)

    @cached_property
    def _prices(self) -> Prices:
        return Prices.of(self.charge)

    @cached_property
    def _sums(self) -> tuple[RunSums, RunSums, RunSums]:
        """Prices of the operations, after a detached cut, after one that a gradient comes back over, and between two
        such cuts the later of which overlaps: `Prices.stage`.

        The backward of what a threshold lies behind is spent by stages that begin early enough to hold the parameter
        behind that input; where it comes back always.
        """
        threshold, position, backward = self._prices.backward
        first, last = self._segments(threshold), self._segments(position)
        within, across = first == last, (first >= 0) & (first < last)
        plain = self._added(self._segments(torch.arange(len(self.nodes))), self._prices.forward)
        detached = plain + self._added(last[within], backward[within])
        spanning = torch.stack([first, last, backward], dim=1)
        returned = self._added(last[self._prices.inward], backward[self._prices.inward])
        attached = RunSums(plain + self._added(last, backward), spanning[:0])
        return RunSums(detached, spanning[across]), attached, RunSums(detached + returned, spanning[across])

    def _segments(self, positions: Tensor) -> Tensor:
        return torch.bucketize(positions, torch.tensor(self.starts), right=True) - 1

    def _added(self, segments: Tensor, amounts: Tensor) -> Tensor:
        return torch.zeros(len(self.starts), dtype=torch.int64).index_add_(0, segments, amounts)

    @cached_property
    def _last_starts(self) -> Tensor:
        """(ends,) the last start from which on something is trained, -1 if there is none."""
        last = torch.full((len(self.ends),), -1)
        last[self._training] = self._training
        return last.cummax(0).values

    @cached_property
    def _seen(self) -> Tensor:
        """(legal cuts,) the first start of a stage all of whose parameters a head there sees."""
        return self._segments(torch.tensor([candidate.blind for candidate in self.legal], dtype=torch.int64)) + 1

    def head(self, stage: int, end: int, begin: int, objectives: Sequence[Objective]) -> HeadCost:
        """Of the head of a stage from a start to a legal cut."""
        return self.heads.cost(end, self.starts[begin], objectives[stage], self._signal(stage, objectives))

    def _heads(self, stage: int, objectives: Sequence[Objective]) -> HeadRuns:
        objective, signal = objectives[stage], self._signal(stage, objectives)
        if (id(objective), signal) not in self._head_runs:
            self._head_runs[id(objective), signal] = self.heads.runs(objective, signal)
        return self._head_runs[id(objective), signal]

    @cached_property
    def _lives(self) -> Lifetimes:
        return Lifetimes(self.graph)

    def memory(self, stage: int, objectives: Sequence[Objective]) -> MemoryWalk:
        """Bytes of stages as stage number `stage`, heads apart."""
        before, after, _ = self.kind(stage, objectives)
        if (before, after) not in self._walks:
            self._walks[before, after] = MemoryWalk(self._lives, self.legal, before, after)
        return self._walks[before, after]

    def first_within(self, stage: int, objectives: Sequence[Objective], limit: int) -> Tensor:
        """(ends,) the first start from which stage number `stage` may need no more bytes than this; all stages from
        starts before it need more."""
        heads = HeadMemory(*torch.zeros(3, len(self.ends), dtype=torch.int64))
        if stage < len(objectives):
            heads = self._heads(stage, objectives).smallest(len(self.ends))
        return first_within(self.memory(stage, objectives), heads, limit)

    def needs(self, stage: int, objectives: Sequence[Objective], begin: int, ends: tuple[int, int]) -> Tensor:
        """(ends,) bytes of a training step as stage number `stage`: `StageSpec.memory_bytes` of the stages from a
        start to each of these ends, first and last."""
        memory = self.memory(stage, objectives).stages(begin, *ends)
        head = self._criterion_memory()
        if stage < len(objectives):
            head = self._heads(stage, objectives).memory_from(begin, *ends)
        step = memory.step(head, self.charge.recompute)
        return step + (1 + OPTIMIZER_STATES) * (memory.weights + head.parameters) + memory.frozen

    def _criterion_memory(self) -> HeadMemory:
        """What cross-entropy takes: the logarithms of the probabilities, and two gradients of that size."""
        specs = [self.graph.measures[leaf.name].value for leaf in self.graph.outputs if isinstance(leaf, fx.Node)]
        peak = 3 * sum(spec.num_bytes for spec in specs if spec is not None and "float" in spec.dtype)
        return HeadMemory(*torch.tensor([[0], [0], [peak]]))

    def plan(self, chosen: Sequence[int], objectives: Sequence[Objective]) -> Plan:
        """The plan with these legal cuts, all stages on one lane."""
        begins, ends = [0, *(end + 1 for end in chosen)], [*chosen, len(self.cuts)]
        cuts = tuple(map(self._cut, begins, chosen, objectives))
        stages = [
            self._stage(index, begin, end, objectives)
            for index, (begin, end) in enumerate(zip(begins, ends, strict=True))
        ]
        model = type(self.graph.model).__name__
        return Plan(tuple(stages), cuts, model, self.graph.inputs, self.graph.warnings, recompute=self.charge.recompute)

    def _cut(self, begin: int, end: int, objective: Objective) -> Cut:
        """A legal cut as the end of the stage that begins there."""
        features = self.legal[end].features(self.starts[begin])
        kind = tie_of(objective)
        cut = dataclasses.replace(
            self.cuts[end],
            features=features,
            detached=kind != "coupled",
            overlaps=kind == "overlapping",
            encodes=objective.encodes,
        )
        return at_cut(objective, cut)[1]

    def _stage(self, index: int, begin: int, end: int, objectives: Sequence[Objective]) -> StageSpec:
        start, stop = self.starts[begin], self.ends[end] + 1
        last, (before, after, _) = index == len(objectives), self.kind(index, objectives)
        head = HeadCost(0, 0, 0) if last else self.head(index, end, begin, objectives)
        prices = self._prices.stage(start, stop, before, after)
        forward, backward = prices.forward, prices.backward
        parameters = [p for position in range(start, stop) for p in self.first_uses.get(position, [])]
        weights = sum(map(_num_bytes, parameters))
        memory = self.memory(index, objectives).stages(begin, end, end)
        held = HeadMemory(*torch.tensor([[head.parameter_bytes], [head.largest_bytes], [head.peak_bytes]]))
        costliest = int((forward + backward == (forward + backward).max()).nonzero()[0])
        return StageSpec(
            index=index,
            nodes=tuple(node.name for node in self.nodes[start:stop]),
            objective="criterion" if last else objectives[index].name,
            forward_flops=int(forward.sum()),
            backward_flops=int(backward.sum()),
            head_flops=head.flops,
            num_parameters=sum(parameter.numel() for parameter in parameters),
            parameter_bytes=weights,
            head_parameter_bytes=head.parameter_bytes,
            frozen_bytes=int(memory.frozen),
            activation_bytes=int(memory.resting if self.charge.recompute else memory.activations),
            optimizer_bytes=OPTIMIZER_STATES * (weights + head.parameter_bytes),
            step_bytes=int(memory.step(self._criterion_memory() if last else held, self.charge.recompute)),
            modules=self._extents.whole(start, stop),
            costliest_node=self.nodes[start + costliest].name,
            costliest_flops=int(forward[costliest] + backward[costliest]),
            returning=prices.returning,
        )

    @cached_property
    def _extents(self) -> Extents:
        return Extents(self.graph.paths)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
