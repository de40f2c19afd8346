"""The memory that a training step of any stage takes at its worst moment, from one walk over the operations."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from autodecouple.graph import Graph
from autodecouple.passes.candidates import Candidate
from autodecouple.passes.measuring.lifetimes import NEVER, Lifetimes, footprint_of
from autodecouple.passes.measuring.stage_memory import StageMemory

WEIGHTS, GRADIENTS, FROZEN, LIVE, SAVED, WAITING, PASSING = range(7)

Change = tuple[int, int, int, int]
"""(row, first start, end of the starts, bytes): what is added to a row of sums for these starts."""


class MemoryWalk:
    """Fills the tables of `StageMemory` in execution order.

    A vector over the starts holds what a stage that begins there has by now. Memory that was born before a start
    belongs to what the stage was sent: it is there for the whole step, whoever saves it. What the stage computes again
    is born anew, where the stage first uses it.

    With a(p) what is saved up to position p, w(p) the gradients that wait there and g(p) those of the weights behind
    p, the backward takes the maximum of a(p) + w(p) + g(p) over the stage: on the way back a shrinks and g grows.

    before, after: whether the stages are coupled to those before and behind them: what they are sent takes a gradient,
                   all that they send gets one
    """

    def __init__(self, graph: Graph, legal: Sequence[Candidate], before: bool = False, after: bool = False) -> None:
        self.coupled_before, self.coupled_after = before, after
        self.graph = graph
        self.legal = legal
        self.nodes = graph.operations
        self.footprints = [footprint_of(graph.measures[node.name]) for node in self.nodes]
        self.lives = Lifetimes(graph)
        self.starts = [0, *(candidate.position + 1 for candidate in legal)]
        self.ends = [*(candidate.position for candidate in legal), len(self.nodes) - 1]
        self.before: dict[int, list[Change]] = defaultdict(list)
        self.after: dict[int, list[Change]] = defaultdict(list)
        self._list_owned()
        self._list_values()
        self._list_gradients()

    def tables(self) -> StageMemory:
        sums = torch.zeros(7, len(self.starts), dtype=torch.int64)
        largest, forward, passing = sums[0].clone(), sums[0].clone(), sums[0].clone()
        received, overwritten = self._received(), self._overwritten()
        worst = [torch.full_like(forward, -NEVER)]  # of a + w - g up to each position
        rows, rows_of = [], {position: end for end, position in enumerate(self.ends)}
        for position, footprint in enumerate(self.footprints):
            begun = self._begun(position)
            _apply(sums, self.before[position])
            largest[: self._begun(position)].clamp_(min=self.largest.get(position, 0))
            _raise(forward[:begun], sums[LIVE, :begun] + footprint.forward_bytes)
            _raise(passing[:begun], sums[PASSING, :begun] + footprint.forward_bytes)
            now = sums[SAVED] + sums[WAITING] - sums[GRADIENTS]
            for threshold, size in footprint.backward_bytes:
                now[: self._taking(threshold)] += size
            worst.append(worst[-1].clone())
            _raise(worst[-1][:begun], now[:begun])
            _apply(sums, self.after[position])
            if position in rows_of:
                end = rows_of[position]
                copies = self._copies(end)
                backward = self._worst(end, worst) + sums[GRADIENTS]
                sent = self._sent(end) + copies
                row = (sums[WEIGHTS], sums[GRADIENTS], largest, sums[FROZEN], sent)
                peaks = (sums[LIVE] - self._dropped(end) + copies, forward, backward + copies)
                again = (received + passing + overwritten, received + sent + overwritten)
                beside = overwritten if self._is_consumed(end) else sent + overwritten
                rows.append(torch.stack([*row, *(received + peak for peak in peaks), *again, beside]))
        return StageMemory(*torch.stack(rows, dim=1))

    def _begun(self, position: int) -> int:
        """How many of the starts lie at or before a position."""
        return bisect_right(self.starts, position)

    def _taking(self, depends: int) -> int:
        """How many of the starts begin a stage in which what depends on this position takes a gradient."""
        return len(self.starts) if self.coupled_before else self._begun(depends)

    def _list_owned(self) -> None:
        self.largest: dict[int, int] = {}
        for size, first, last in self.lives.weights:
            begun = self._begun(first)
            self.before[first].append((WEIGHTS, 0, begun, size))
            self.before[last].append((GRADIENTS, 0, begun, size))
            self.largest[first] = max(size, self.largest.get(first, 0))
        for size, uses in self.lives.frozen:
            for previous, use in zip([-1, *uses], uses, strict=False):  # once per stage, though stages may share it
                self.before[use].append((FROZEN, self._begun(previous), self._begun(use), size))

    def _list_values(self) -> None:
        lives = self.lives
        for storage, birth in lives.births.items():
            begun, size = 0, lives.sizes[storage]
            for made in self._makes(storage):
                self.before[made] += [(row, begun, self._begun(made), size) for row in (LIVE, PASSING)]
                begun = self._begun(made)
            saved = self._saved(storage)
            for position, lowest, reach in saved:
                self.before[position].append((SAVED, lowest, reach, size))
            reach = saved[-1][2] if saved else 0
            used = lives.used.get(storage, birth)
            self.after[used] += [(LIVE, reach, begun, -size), (PASSING, 0, begun, -size)]

    def _makes(self, storage: int, end: int = NEVER) -> list[int]:
        """Where memory is born, at the latest at an end: each time for the stages that begin behind the time before.

        What is made for the model's output alone is born with the last operation.
        """
        birth, last = self.lives.births[storage], len(self.nodes) - 1
        again = {min(use, last) for use in self.lives.makes.get(storage, ())}
        return sorted(made for made in {birth, *again} if made <= end)

    def _saved(self, storage: int, end: int = NEVER) -> list[tuple[int, int, int]]:
        """(first operation to save it, range of the starts for which that is so): later starts later operations."""
        found, reach, birth = [], 0, self.lives.births[storage]
        for position, depends in self.lives.saved.get(storage, ()):
            if position > end:
                break
            born = position if storage in self.lives.makes else birth
            begun = min(self._begun(born), self._taking(depends))
            if begun > reach:
                found.append((position, reach, begun))
                reach = begun
        return found

    def _list_gradients(self) -> None:
        """A gradient waits from the last use of its value back to the operation after its birth."""
        for gradient in self.lives.gradients.values():
            begun, since, last = self._taking(gradient.depends), gradient.birth + 1, gradient.last
            if last <= since:
                continue
            self.before[since].append((WAITING, 0, begun, gradient.size))
            self.before[last].append((WAITING, 0, begun, -gradient.size))
            if last < len(self.nodes) and self.nodes[last].target in _ADDITIONS:
                # both addends get the same gradient, which the operation that made the other one counts as its own
                for other in self._operands(last):
                    if other >= since:
                        self.before[other].append((WAITING, 0, begun, -gradient.size))
                        self.after[other].append((WAITING, 0, begun, gradient.size))

    def _operands(self, position: int) -> list[int]:
        positions = self.lives.positions
        return [positions[node] for node in self.nodes[position].all_input_nodes if node in positions]

    def _received(self) -> Tensor:
        """What a stage that begins at each start is sent."""
        sent = [{spec.name for spec in self.graph.inputs}, *map(self._crossing, range(len(self.legal)))]
        return torch.tensor([sum(self._storages(names).values()) for names in sent])

    def _is_consumed(self, end: int) -> bool:
        """Whether what is sent there is gone when the backward begins: a coupled stage has had its own by then."""
        return self.coupled_after and end < len(self.legal)

    def _overwritten(self) -> Tensor:
        """What a stage that begins at each start copies, to run its forward twice: of coupled ones the body does so."""
        writes = {s for node in self.nodes for s in self.graph.measures[node.name].writes}
        inputs = self._storages({spec.name for spec in self.graph.inputs}).items()
        copies = [0 if self.coupled_before else self._copies(end) for end in range(len(self.legal))]
        return torch.tensor([sum(size for storage, size in inputs if storage in writes), *copies])

    def _crossing(self, end: int) -> set[str]:
        if end == len(self.legal):
            return {leaf.name for leaf in self.graph.outputs if isinstance(leaf, fx.Node)}
        cut = self.legal[end].cut
        assert cut is not None
        return {spec.name for spec in cut.crossing}

    def _storages(self, names: set[str]) -> dict[int, int]:
        """The memory of these values, with its size."""
        storages = {storage for name in names for storage in self.graph.measures[name].storages}
        return {s: self.lives.sizes[s] for s in storages if s in self.lives.sizes}

    def _sent(self, end: int) -> Tensor:
        sent = torch.zeros(len(self.starts), dtype=torch.int64)
        for storage, size in self._storages(self._crossing(end)).items():
            sent[: self._begun(self.lives.births[storage])] += size
        return sent

    def _dropped(self, end: int) -> Tensor:
        """What is used behind an end and computed again there, unless this stage saves it for its own backward."""
        dropped = torch.zeros(len(self.starts), dtype=torch.int64)
        cut = self.legal[end].cut if end < len(self.legal) else None
        names = cut.recomputed if cut is not None else ()
        for storage in {s for name in names for s in self.graph.measures[name].storages if s in self.lives.makes}:
            saved, position = self._saved(storage, self.ends[end]), self.ends[end]
            reach, begun = saved[-1][2] if saved else 0, self._begun(self._makes(storage, position)[-1])
            dropped[reach:begun] += self.lives.sizes[storage]
        return dropped

    def _copies(self, end: int) -> int:
        """Bytes of what is cloned at a cut."""
        cut = self.legal[end].cut if end < len(self.legal) else None
        return sum(cut.spec(name).num_bytes for name in cut.copied) if cut is not None else 0

    def _worst(self, end: int, worst: Sequence[Tensor]) -> Tensor:
        """The maximum of a + w - g over the positions up to an end, with what only this end adds.

        Each addition holds for the positions before some `until` only. So up to there the running maximum counts with
        it, and the whole one without it, which what the former has in common with it cannot exceed.
        """
        level, best = torch.zeros_like(worst[0]), worst[0].clone()
        held = sorted((*self._kept(end), *self._head_gradients(end)))
        for _, begin, stop, size in held:
            level[begin:stop] += max(size, 0)
        for until, begin, stop, size in held:
            if until <= self.ends[end]:
                _raise(best, worst[until] + level)
                level[begin:stop] -= abs(size)
        return torch.maximum(best, worst[self.ends[end] + 1] + level)

    def _kept(self, end: int) -> list[Change]:
        """(until, ...): what is sent on stays to the end; behind `until` it is counted as saved."""
        found: list[Change] = []
        for storage, size in self._storages(self._crossing(end)).items():
            saved, begun = self._saved(storage), self._begun(self.lives.births[storage])
            found += [(position, lowest, reach, size) for position, lowest, reach in saved]
            found.append((NEVER, saved[-1][2] if saved else 0, begun, size))
        return found

    def _head_gradients(self, end: int) -> list[Change]:
        """(until, ...): gradients that a head gives stay to the end; behind `until` they are counted as waiting.

        What crosses and no head reads gets none: it waits (a negative size) only before its last use in the stage.
        """
        found: list[Change] = []
        for name in self._crossing(end):
            gradient = self.lives.gradients.get(name)
            if gradient is None:
                continue
            begun, readers = self._taking(gradient.depends), self._readers(end, name)
            last = max((use for use in gradient.uses if use <= self.ends[end]), default=0)
            found += self._held(name, end, 0, min(begun, readers))
            found.append((max(last, gradient.birth + 1), min(begun, readers), begun, -gradient.size))
        return found

    def _held(self, name: str, end: int, begin: int, stop: int, through: int = NEVER) -> Iterator[Change]:
        """The gradient of a value from an end: a use in the stage adds another one to it, into memory of its own.

        Where there is no such use, the gradient of a view is the value's that it views, and that of a concatenation is
        those of its parts. through: the operation by which it comes
        """
        gradient = self.lives.gradients[name]
        inner = [use for use in gradient.uses if use <= self.ends[end] and use != through]
        parts = [] if inner else self._parts(gradient.birth)
        if not parts:
            yield max([gradient.birth, *(use + 1 for use in inner)]), begin, stop, gradient.size
        for part in parts:
            known = self.lives.gradients.get(part.name)
            taking = self._taking(known.depends) if known is not None and known.birth < gradient.birth else 0
            middle = min(max(begin, taking), stop)
            if known is not None:
                yield from self._held(part.name, end, begin, middle, gradient.birth)
            yield gradient.birth, middle, stop, self._size(part)

    def _parts(self, position: int) -> list[fx.Node]:
        """What an operation views whole or concatenates."""
        node = self.nodes[position]
        if node.target is torch.ops.aten.cat.default:
            return [part for part in node.all_input_nodes if self._size(part)]
        measures = self.graph.measures
        whole = [s for s in node.all_input_nodes if measures[s.name].storages & measures[node.name].storages]
        return whole if [self._size(s) for s in whole] == [self._size(node)] else []

    def _size(self, node: fx.Node) -> int:
        value = self.graph.measures[node.name].value
        return value.num_bytes if value is not None else 0

    def _readers(self, end: int, name: str) -> int:
        """How many of the starts, from the first, begin a stage with a loss on this value at this end."""
        if self.coupled_after or end == len(self.legal):
            return len(self.starts)
        for index, (read, threshold) in enumerate(self.legal[end].reads):
            if read == name:
                return self._begun(threshold) if index else len(self.starts)
        return 0


def _apply(sums: Tensor, changes: Sequence[Change]) -> None:
    for row, begin, stop, size in changes:
        sums[row, begin:stop] += size


def _raise(best: Tensor, values: Tensor) -> None:
    torch.maximum(best, values, out=best)


_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
