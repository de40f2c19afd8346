"""The captured model as a chain of blocks: where one tensor leads from each to the next."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from autodecouple.graph import LEAF, Graph
from autodecouple.passes.candidates import Candidate
from autodecouple.passes.downstream.selection import Form
from autodecouple.passes.downstream.units import Extent, find_units


@dataclass(frozen=True)
class Segment:
    """Operations from one position up to another, `stop` excluded.

    entry: the one tensor that enters it, None where it begins at a cut and reads what crosses there
    leaving: the one that leaves it, None at the model's end
    name:  of the module that it begins with
    flops: of a training step
    """

    start: int
    stop: int
    entry: fx.Node | None
    leaving: fx.Node | None
    name: str
    flops: int


class _Maker:
    """Makes segments, by where they begin and stop."""

    def __init__(self, graph: Graph, entries: Mapping[int, fx.Node]) -> None:
        self.graph = graph
        self.entries = entries
        measures = [graph.measures[node.name] for node in graph.operations]
        flops = [m.forward_flops + sum(cost for _, cost in m.backward_flops) for m in measures]
        self.sums = [0, *itertools.accumulate(flops)]

    def __call__(self, start: int, stop: int, name: str) -> Segment:
        leaving = self.entries[stop] if stop < len(self.graph.operations) else None
        return Segment(start, stop, self.entries.get(start), leaving, name, self.sums[stop] - self.sums[start])

    def is_copyable(self, segment: Segment) -> bool:
        """A module that runs whole is the user's own object."""
        return not any(LEAF in node.meta for node in self.graph.operations[segment.start : segment.stop])


@dataclass(frozen=True)
class Chain:
    """blocks: those that may be sampled, in order; tails: the output layers, whole, then ever less of them."""

    blocks: tuple[Segment, ...]
    tails: tuple[Segment, ...]
    _maker: _Maker

    @property
    def largest(self) -> int:
        """FLOPs of the largest block."""
        return max((block.flops for block in self.blocks), default=0)

    def behind(self, position: int) -> tuple[Segment, ...]:
        """The blocks that begin behind a position."""
        return tuple(block for block in self.blocks if block.start > position)

    def tails_behind(self, position: int) -> tuple[Segment, ...]:
        """The tails that begin behind a position, the longest first."""
        return tuple(tail for tail in self.tails if tail.start > position)

    def crossing(self, position: int) -> fx.Node | None:
        """What crosses behind a position, where it is the only tensor with a gradient."""
        return self._maker.entries.get(position + 1)

    def form(self, node: fx.Node | None) -> Form:
        """What two tensors have in common if one can be taken as the other; nothing has the form of None."""
        spec = self._maker.graph.measures[node.name].value if node is not None else None
        return (spec.shape, spec.dtype, spec.batch_dim) if spec is not None else None

    def rest(self, position: int) -> Segment | None:
        """What is left, behind a position, up to the next block or to the output layers.

        None where nothing is, or where that is more than a block: what goes around many blocks is not waited for.
        """
        stop = min((segment.start for segment in (*self.blocks, *self.tails) if segment.start > position), default=0)
        if stop <= position + 1:
            return None
        found = replace(self._maker(position + 1, stop, ""), entry=None)
        return found if found.flops <= self.largest and self._maker.is_copyable(found) else None


def find_chain(graph: Graph, candidates: Sequence[Candidate]) -> Chain:
    """The blocks between which one tensor that carries a gradient crosses.

    A block begins with a module that has weights and ends where the next one begins. Output layers are what follows the
    last block: the last module with weights, or all behind the last one that has positions, where the output has none.
    """
    entries = _entries(graph, candidates)
    units = find_units(graph, frozenset(entries))
    make = _Maker(graph, entries)
    if not units:
        return Chain((), (), make)
    last = _last_block(units, {unit.first: len(_shape(graph, entries[unit.first])) for unit in units})
    stops = [unit.first for unit in units[1 : last + 1]]
    stops += [units[last].last + 1] if last >= 0 else []
    blocks = [make(u.first, stop, u.name) for u, stop in zip(units[: last + 1], stops, strict=True)]
    starts = [*stops[-1:], *(unit.first for unit in units[last + 1 :])]
    end, names = len(graph.operations), [unit.name for unit in units[last + 1 :]]
    tails = [make(start, end, names[max(0, i - bool(stops))]) for i, start in enumerate(starts)]
    return Chain(tuple(block for block in blocks if make.is_copyable(block)), tuple(dict.fromkeys(tails)), make)


def _entries(graph: Graph, candidates: Sequence[Candidate]) -> dict[int, fx.Node]:
    """By position: the tensor that enters what begins there, where it is the only one with a gradient."""
    nodes = {node.name: node for node in graph.train.graph.nodes}
    cuts = {candidate.node: candidate.cut for candidate in candidates}
    found = {}
    for candidate in candidates:
        cut = cuts[candidate.twin] if candidate.twin is not None else candidate.cut
        if cut is not None and len(cut.carrying) == 1:
            found[candidate.position + 1] = nodes[cut.carrying[0]]
    return found


def _shape(graph: Graph, node: fx.Node) -> tuple[int, ...]:
    spec = graph.measures[node.name].value
    return spec.shape if spec is not None else ()


def _last_block(units: Sequence[Extent], ranks: Mapping[int, int]) -> int:
    """Index of the last unit that is no output layer, -1 if there is none."""
    if ranks[units[-1].first] == 2:
        wide = [index for index, unit in enumerate(units) if ranks[unit.first] > 2]
        if wide:
            return wide[-1]
    return len(units) - 2


def positions(segments: Sequence[Segment]) -> Iterator[int]:
    """Of all the operations in the segments."""
    return itertools.chain.from_iterable(range(segment.start, segment.stop) for segment in segments)
