"""What crosses at the ends of stages: sent and received, kept for the next stage, given a gradient there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, fx

from autodecouple.passes.candidates import Candidate
from autodecouple.passes.measuring.columns import columns
from autodecouple.passes.measuring.lifetimes import NEVER, Lifetimes

Change = tuple[int, int, int, int]
"""(up to, after, until, bytes): counts up to a position, for stages that begin after a second one and up to a third."""


class Crossing:
    """Bytes that only the end of a stage decides on, for the stages from one start to each of several ends.

    starts, ends:  positions of the first and last operations of stages: the model's own, and those beside each cut
    before, after: whether the stages are coupled to those before and behind them
    """

    def __init__(self, lives: Lifetimes, legal: Sequence[Candidate], before: bool, after: bool) -> None:
        self.coupled_before, self.coupled_after = before, after
        self.lives = lives
        self.graph = lives.graph
        self.nodes = lives.graph.operations
        self.legal = legal
        self.starts = [0, *(candidate.position + 1 for candidate in legal)]
        self.ends = [*(candidate.position for candidate in legal), len(self.nodes) - 1]
        self.positions = torch.tensor(self.ends)

    def taking(self, depends: int) -> int:
        """The last position at which a stage may begin and take a gradient of what depends on this one."""
        return NEVER if self.coupled_before else depends

    def makes(self, storage: int) -> list[int]:
        """Where memory is born: each time for the stages that begin behind the time before.

        What is made for the model's output alone is born with the last operation.
        """
        birth = self.lives.births[storage]
        if storage not in self.lives.makes:
            return [birth]
        return sorted({birth, *(min(use, len(self.nodes) - 1) for use in self.lives.makes[storage])})

    def saved(self, storage: int) -> list[tuple[int, int, int]]:
        """(first operation to save it, after, until) for the stages that begin after a position, up to another: later
        ones have later operations."""
        found, after, birth = [], -1, self.lives.births[storage]
        for position, depends in self.lives.saved.get(storage, ()):
            born = position if storage in self.lives.makes else birth
            until = min(born, self.taking(depends))
            if until > after:
                found.append((position, after, until))
                after = until
        return found

    def received(self, begin: int) -> int:
        """What a stage that begins there is sent."""
        names = self._crossing(begin - 1) if begin else {spec.name for spec in self.graph.inputs}
        return sum(self._storages(names).values())

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

    def sent(self, begin: int, first: int, last: int) -> Tensor:
        end, until, size = _between(self._sent_changes, first, last) if first < last else columns(self._sends(first), 3)
        return _added(end - first, torch.where(self.starts[begin] <= until, size, 0), last - first + 1)

    @cached_property
    def _sent_changes(self) -> Tensor:
        return columns((row for end in range(len(self.ends)) for row in self._sends(end)), 3)

    def _sends(self, end: int) -> list[tuple[int, ...]]:
        """(end, until, bytes) of what crosses there and was made in the stage, if that begins up to a position."""
        storages = self._storages(self._crossing(end))
        return [(end, self.lives.births[storage], size) for storage, size in storages.items()]

    def dropped(self, begin: int, first: int, last: int) -> Tensor:
        """(ends,) what is used behind each end and computed again there, unless the stage saves it for its backward."""
        end, after, until, size = (
            _between(self._dropped_changes, first, last) if first < last else columns(self._drops(first), 4)
        )
        start = self.starts[begin]
        return _added(end - first, torch.where((after < start) & (start <= until), size, 0), last - first + 1)

    @cached_property
    def _dropped_changes(self) -> Tensor:
        return columns((row for end in range(len(self.ends)) for row in self._drops(end)), 4)

    def _drops(self, end: int) -> list[tuple[int, ...]]:
        """(end, after, until, bytes)."""
        cut = self.legal[end].cut if end < len(self.legal) else None
        names = cut.recomputed if cut is not None else ()
        storages = {s for name in names for s in self.graph.measures[name].storages if s in self.lives.makes}
        return [(end, *self._unsaved(storage, self.ends[end]), self.lives.sizes[storage]) for storage in storages]

    def _unsaved(self, storage: int, end: int) -> tuple[int, int]:
        """(after, until) for the stages with an end there that make this memory and do not save it."""
        saved, makes = self.saved(storage), self.makes(storage)
        known = bisect_right(saved, end, key=lambda row: row[0])
        return saved[known - 1][2] if known else -1, makes[bisect_right(makes, end) - 1]

    def carried(self, first: int, last: int) -> Tensor:
        """(ends,) bytes of all that gets a gradient at each end."""
        gradients = self.lives.gradients
        named = (self._crossing(end) & gradients.keys() for end in range(first, last + 1))
        return torch.tensor([sum(gradients[name].size for name in names) for names in named])

    def consumed(self, first: int, last: int) -> Tensor:
        """(ends,) whether what is sent is gone when the backward begins: a coupled stage has had its own by then."""
        return torch.tensor([self.coupled_after and end < len(self.legal) for end in range(first, last + 1)])

    def overwritten(self, begin: int) -> int:
        """What a stage that begins there copies, to run its forward twice: of coupled ones the body does so."""
        if begin:
            return 0 if self.coupled_before else self._copied(begin - 1)
        inputs = self._storages({spec.name for spec in self.graph.inputs})
        return sum(size for storage, size in inputs.items() if storage in self.graph.writers)

    def copies(self, first: int, last: int) -> Tensor:
        """(ends,) bytes of what is cloned at each cut."""
        return torch.tensor([self._copied(end) for end in range(first, last + 1)])

    def _copied(self, end: int) -> int:
        cut = self.legal[end].cut if end < len(self.legal) else None
        return sum(cut.spec(name).num_bytes for name in cut.copied) if cut is not None else 0

    def highest(self, begin: int, first: int, last: int, worst: Tensor) -> Tensor:
        """(ends,) the maximum of a + w - g up to each end, with what only that end adds.

        worst: (operations,) the running maximum of a + w - g

        Each addition holds for the positions before some `up_to` only. So up to there the running maximum counts with
        it, and the whole one without it, which what the former has in common with it cannot exceed.
        """
        end, up_to, after, until, size = (
            _between(self._held_changes, first, last) if first < last else columns(self._holds(first), 5)
        )
        count, start, end = last - first + 1, self.starts[begin], end - first
        size = torch.where((after < start) & (start <= until), size, 0)
        worst = torch.cat([worst.new_full((1,), -NEVER), worst])  # of the positions before each
        positions = self.positions[first : last + 1]
        inside = up_to <= positions[end]
        over = torch.where(inside, size.abs(), 0)
        total, gone = _added(end, size.clamp(min=0), count), _added(end, over, count)
        passed = over.cumsum(0) - over - (gone.cumsum(0) - gone)[end]  # what an end's additions before this one held
        peaks = worst[(up_to - start).clamp(0, len(worst) - 1)] + total[end] - passed
        best = worst[positions - start + 1] + total - gone
        return best.scatter_reduce(0, end, torch.where(inside, peaks, -NEVER), "amax")

    @cached_property
    def _held_changes(self) -> Tensor:
        return columns((row for end in range(len(self.ends)) for row in self._holds(end)), 5)

    def _holds(self, end: int) -> list[tuple[int, ...]]:
        """(end, up to, after, until, bytes) of what only this end adds, in this order."""
        return [(end, *change) for change in sorted((*self._kept(end), *self._head_gradients(end)))]

    def _kept(self, end: int) -> list[Change]:
        """What is sent on stays to the end; behind the first position it is counted as saved."""
        found: list[Change] = []
        for storage, size in self._storages(self._crossing(end)).items():
            saved = self.saved(storage)
            found += [(position, after, until, size) for position, after, until in saved]
            found.append((NEVER, saved[-1][2] if saved else -1, self.lives.births[storage], size))
        return found

    def _head_gradients(self, end: int) -> list[Change]:
        """Gradients that a head gives stay to the end; behind the first position they are counted as waiting.

        What crosses and no head reads gets none: it waits (a negative size) only before its last use in the stage.
        """
        found: list[Change] = []
        for name in self._crossing(end):
            gradient = self.lives.gradients.get(name)
            if gradient is None:
                continue
            taking = self.taking(gradient.depends)
            reading = min(taking, self._reading(end, name))
            within = bisect_right(gradient.uses, self.ends[end])
            last = gradient.uses[within - 1] if within else 0
            found += self._held(name, end, -1, reading)
            found.append((max(last, gradient.birth + 1), reading, taking, -gradient.size))
        return found

    def _held(self, name: str, end: int, after: int, until: int, through: int = NEVER) -> Iterator[Change]:
        """The gradient of a value from an end: a use in the stage adds another one to it, into memory of its own.

        Where there is no such use, the gradient of a view is the value's that it views, and that of a concatenation is
        those of its parts. through: the operation by which it comes
        """
        gradient = self.lives.gradients[name]
        inner = [use for use in gradient.uses if use <= self.ends[end] and use != through]
        parts = [] if inner else self._parts(gradient.birth)
        if not parts:
            yield max([gradient.birth, *(use + 1 for use in inner)]), after, until, gradient.size
        for part in parts:
            known = self.lives.gradients.get(part.name)
            taking = self.taking(known.depends) if known is not None and known.birth < gradient.birth else -1
            middle = min(max(after, taking), until)
            if known is not None:
                yield from self._held(part.name, end, after, middle, gradient.birth)
            yield gradient.birth, middle, until, self._size(part)

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

    def _reading(self, end: int, name: str) -> int:
        """The last position at which a stage may begin and have a loss on this value at this end; -1 for none."""
        if self.coupled_after or end == len(self.legal):
            return NEVER
        for index, (read, threshold) in enumerate(self.legal[end].reads):
            if read == name:
                return threshold if index else NEVER
        return -1


def _added(index: Tensor, values: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64).index_add_(0, index, values)


def _between(rows: Tensor, first: int, last: int) -> Tensor:
    """Of rows that are sorted by end those from one end to another."""
    low, high = (int(place) for place in torch.searchsorted(rows[0], torch.tensor([first, last + 1])))
    return rows[:, low:high]
