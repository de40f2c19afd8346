"""The memory that a training step of any stage takes at its worst moment, from one walk over its operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from autodecouple.passes.candidates import Candidate
from autodecouple.passes.measuring.columns import columns
from autodecouple.passes.measuring.crossing import Crossing
from autodecouple.passes.measuring.lifetimes import Footprint, Lifetimes, footprint_of
from autodecouple.passes.measuring.prices import Tie
from autodecouple.passes.measuring.stage_memory import StageMemory

WEIGHTS, GRADIENTS, FROZEN, LIVE, GONE, PASSED, SAVED, WAITING, WORKING = range(9)
"""What changes with an operation. GONE comes off LIVE after it, or PASSED where a forward saves nothing for a backward;
WORKING is there during its backward only."""

Change = tuple[int, int, int, int, int]
"""(position, row, after, until, bytes): what is added from there on for stages that begin after a position, up to
another."""


class MemoryWalk:
    """Fills `StageMemory` for the stages that begin at one start and end anywhere behind it.

    A vector over the operations holds what such a stage has by then. Memory that was born before a start belongs to
    what the stage was sent: it is there for the whole step, whoever saves it. What the stage computes again is born
    anew, where the stage first uses it.

    With a(p) what is saved up to position p, w(p) the gradients that wait there and g(p) those of the weights behind
    p, the backward takes the maximum of a(p) + w(p) + g(p) over the stage: on the way back a shrinks and g grows.

    before, after: how the stages are tied to those before and behind them: unless detached, what they are sent takes a
                   gradient, all that they send gets one
    """

    def __init__(
        self, lives: Lifetimes, legal: Sequence[Candidate], before: Tie = "detached", after: Tie = "detached"
    ) -> None:
        self.lives = lives
        self.nodes = lives.graph.operations
        self.ties = before, after
        self.crossing = Crossing(lives, legal, before != "detached", after != "detached")
        footprints = [footprint_of(lives.graph.measured[node]) for node in self.nodes]
        self._forward = torch.tensor([footprint.forward_bytes for footprint in footprints])
        self._largest = self._largest_weights()
        self.changes = self._sorted_changes(footprints)
        self._positions = self.changes[0].contiguous()

    def stages(self, begin: int, first: int, last: int) -> StageMemory:
        """Of the stages from start number `begin` to each end from number `first` to number `last`."""
        start, stop = self.crossing.starts[begin], self.crossing.ends[last] + 1
        changes = self._changes_of(start, stop)
        sums = changes.cumsum(1)
        live, passing = sums[LIVE] - sums[GONE], sums[LIVE] - sums[PASSED]
        forward = _highest(live + changes[GONE] + self._forward[start:stop])
        first_forward = _highest(passing + changes[PASSED] + self._forward[start:stop])
        waiting = sums[WAITING] + self._waiting_at(start)
        worst = _highest(sums[SAVED] + waiting - sums[GRADIENTS] + changes[WORKING])
        at = self.crossing.positions[first : last + 1] - start
        copies, received = self.crossing.copies(first, last), self.crossing.received(begin)
        sent, overwritten = self.crossing.sent(begin, first, last) + copies, self.crossing.overwritten(begin)
        backward = received + self.crossing.highest(begin, first, last, worst) + sums[GRADIENTS, at] + copies
        activations = received + live[at] - self.crossing.dropped(begin, first, last) + copies
        if "overlapping" in self.ties:
            most = activations + _highest(waiting + changes[WORKING])[at]
            backward = torch.maximum(backward, most) + self._held_over(start, at, sums[GRADIENTS, at], first, last)
        return StageMemory(
            weights=sums[WEIGHTS, at],
            gradients=sums[GRADIENTS, at],
            largest=_highest(self._largest[start:stop])[at],
            frozen=sums[FROZEN, at],
            sent=sent,
            activations=activations,
            forward=received + forward[at],
            backward=backward,
            passing=received + first_forward[at] + overwritten,
            resting=received + sent + overwritten,
            beside=torch.where(self.crossing.consumed(first, last), 0, sent) + overwritten,
        )

    def _held_over(self, start: int, at: Tensor, gradients: Tensor, first: int, last: int) -> Tensor:
        """(ends,) what a backward beside a cut that overlaps holds besides, at most: its activations are needed again.

        Before such a cut, what comes from the next stage and its sum with what the own loss gives. Behind one the
        gradients are kept from which the weights' will be taken, all of them while those come.
        """
        carried = self.crossing.carried(first, last)
        if self.ties[1] == "overlapping":
            return 2 * carried
        return self._junctions[start + at + 1] - self._junctions[start] + gradients + carried

    @cached_property
    def _junctions(self) -> Tensor:
        """(operations + 1,) bytes of what operations with a weight have made, before each."""
        measures = self.lives.graph.measures
        trains = [any(source.op == "get_attr" for source in node.all_input_nodes) for node in self.nodes]
        values = [measures[node.name].value if own else None for node, own in zip(self.nodes, trains, strict=True)]
        sizes = [value.num_bytes if value is not None else 0 for value in values]
        return torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)

    def _changes_of(self, start: int, stop: int) -> Tensor:
        """(9, operations) what changes for a stage from this start, before each operation from start to stop."""
        low, high = (int(place) for place in torch.searchsorted(self._positions, torch.tensor([start, stop])))
        position, row, after, until, size = self.changes[:, low:high]
        changes = torch.zeros(9, stop - start, dtype=torch.int64)
        holds = (after < start) & (start <= until)
        changes.view(-1).index_add_(0, row * (stop - start) + position - start, torch.where(holds, size, 0))
        return changes

    def _waiting_at(self, start: int) -> int:
        """Gradients of what was made before a stage: it gives them back, if it is coupled to the stage before."""
        return int(self._waiting[start]) if self.crossing.coupled_before else 0

    @cached_property
    def _waiting(self) -> Tensor:
        position, row, _, _, size = self.changes
        known = (row == WAITING) & (position < len(self.nodes))
        waiting = torch.zeros(len(self.nodes) + 1, dtype=torch.int64)
        return waiting.index_add_(0, position[known] + 1, size[known]).cumsum(0)

    def _largest_weights(self) -> Tensor:
        """(operations,) bytes of the largest weight that is first used at each."""
        largest = [0] * len(self.nodes)
        for size, first, _ in self.lives.weights:
            largest[first] = max(size, largest[first])
        return torch.tensor(largest)

    def _sorted_changes(self, footprints: Sequence[Footprint]) -> Tensor:
        """(5, changes) position, row, after, until, bytes; by position."""
        changes = columns(chain(self._owned(), self._values(), self._gradients(), self._working(footprints)), 5)
        return changes[:, changes[0].double().argsort()].contiguous()  # torch sorts doubles faster than integers

    def _working(self, footprints: Sequence[Footprint]) -> Iterator[Change]:
        for position, footprint in enumerate(footprints):
            for threshold, size in footprint.backward_bytes:
                if size:
                    yield position, WORKING, -1, self.crossing.taking(threshold), size

    def _owned(self) -> Iterator[Change]:
        for size, first, last in self.lives.weights:
            yield first, WEIGHTS, -1, first, size
            yield last, GRADIENTS, -1, first, size
        for size, uses in self.lives.frozen:
            for previous, use in zip([-1, *uses], uses, strict=False):  # once per stage, though stages may share it
                yield use, FROZEN, previous, use, size

    def _values(self) -> Iterator[Change]:
        lives = self.lives
        for storage, birth in lives.births.items():
            made, size, used, kept = -1, lives.sizes[storage], lives.used.get(storage, birth), -1
            for again in self.crossing.makes(storage):
                yield again, LIVE, made, again, size
                made = again
            for position, after, until in self.crossing.saved(storage):
                yield position, SAVED, after, until, size
                kept = until
            yield used, GONE, kept, made, size
            yield used, PASSED, -1, made, size

    def _gradients(self) -> Iterator[Change]:
        """A gradient waits from the last use of its value back to the operation after its birth."""
        for gradient in self.lives.gradients.values():
            until, since, last = self.crossing.taking(gradient.depends), gradient.birth + 1, gradient.last
            if last <= since:
                continue
            yield since, WAITING, -1, until, gradient.size
            yield last, WAITING, -1, until, -gradient.size
            if last < len(self.nodes) and self.nodes[last].target in _ADDITIONS:
                # both addends get the same gradient, which the operation that made the other one counts as its own
                for other in self._operands(last):
                    if other >= since:
                        yield other, WAITING, -1, until, -gradient.size
                        yield other + 1, WAITING, -1, until, gradient.size

    def _operands(self, position: int) -> list[int]:
        positions = self.lives.positions
        return [positions[node] for node in self.nodes[position].all_input_nodes if node in positions]


def _highest(values: Tensor) -> Tensor:
    """The maximum of all values up to each."""
    return values.cummax(0).values


_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
