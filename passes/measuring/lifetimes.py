"""When the memory of a graph's values is born, saved for the backward and used for the last time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, fx

from autodecouple.graph import Graph, Measure
from autodecouple.passes.measuring.recomputable import Needs

NEVER = 2**60
"""A position behind every other."""


@dataclass(frozen=True)
class Footprint:
    """What the fake run of one node showed of its memory.

    born:           (storage, bytes) of memory that is new with this node: its values, and what it keeps for itself
    saved:          storages that autograd keeps for its backward
    forward_bytes:  most that it takes besides while it runs
    backward_bytes: pairs (threshold, bytes), as in `Measure.backward_flops`: most that its backward takes besides,
                    gradients included
    """

    born: tuple[tuple[int, int], ...] = ()
    saved: frozenset[int] = frozenset()
    forward_bytes: int = 0
    backward_bytes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Measured(Measure):
    """A node's measure with its memory."""

    footprint: Footprint = Footprint()

    def without_backward(self) -> Measured:
        footprint = replace(self.footprint, saved=frozenset(), backward_bytes=())
        return replace(self, in_loss=False, backward_flops=(), activation_bytes=0, footprint=footprint)


def footprint_of(measure: Measure) -> Footprint:
    return measure.footprint if isinstance(measure, Measured) else Footprint()


class Gradient(NamedTuple):
    """The gradient of a value: its bytes, the value's birth, and the uses that give it, in order.

    A stage that begins behind `depends` does not need it.
    """

    size: int
    birth: int
    depends: int
    uses: tuple[int, ...]

    @property
    def last(self) -> int:
        return self.uses[-1] if self.uses else self.birth


class Lifetimes:
    """Lives of everything in a measured graph; positions count its operations from 0.

    sizes, births: of each storage, its bytes and birth (-1 for inputs)
    saved, used:   of each storage, the operations that save it for their backward (with the last start of a stage
                   which has such a backward), and the last operation whose stage needs it
    makes:         of each storage that stages behind its birth make again, the operations for which they do
    gradients:     by the names of the values that get one
    weights:       (bytes, first use, last use) of each trainable parameter
    frozen:        (bytes, uses) of every other tensor that the model owns; twice the bytes where the forward writes it
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.positions = graph.positions
        self.sizes: dict[int, int] = {}
        self.births: dict[int, int] = {}
        self.saved: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.used: dict[int, int] = {}
        self.makes: dict[int, set[int]] = {}
        self.needs = Needs.known(graph)
        self.gradients: dict[str, Gradient] = {}
        self._needed = self.needs.last
        self._trained = {node for node in self.positions if self._is_trained(graph.measured[node])}
        for node in (*graph.train.graph.find_nodes(op="placeholder"), *self.positions):
            self._meet(node, graph.measured[node])
        self.weights: list[tuple[int, int, int]] = []
        self.frozen: list[tuple[int, list[int]]] = []
        self._own()

    def _meet(self, node: fx.Node, measure: Measure) -> None:
        footprint, position = footprint_of(measure), measure.position
        for storage, size in footprint.born:
            self.sizes[storage], self.births[storage] = size, position
        for storage in footprint.saved:
            self.saved[storage].append((position, measure.depends))
        last = max(position, self._needed.get(node, -1))
        for storage in measure.storages:
            self.used[storage] = max(self.used.get(storage, -1), last)
        if measure.recomputed:  # what shares memory with it is computed again as well
            for storage, _ in footprint.born:
                self.makes[storage] = set()
            for storage in measure.storages & self.makes.keys():
                self.makes[storage] |= self.needs.readers(node)
        if node in self._trained and measure.value is not None:
            uses = sorted([self.positions[user] for user in node.users if user in self._trained])
            self.gradients[node.name] = Gradient(measure.value.num_bytes, position, measure.depends, tuple(uses))

    def _is_trained(self, measure: Measure) -> bool:
        return measure.in_loss and measure.gradient_since is not None

    def _own(self) -> None:
        uses, trainable = self.graph.parameter_uses(), dict[str, Tensor]()
        frozen: dict[str, list[fx.Node]] = defaultdict(list)
        for node, tensor in self.graph.owned.items():
            name = self.graph.names[node]
            if name in uses:
                trainable[name] = tensor
            elif isinstance(tensor, Tensor):
                frozen[name].append(node)
        at = {name: uses[name] for name in trainable if uses[name]}
        self.weights = [(_num_bytes(trainable[name]), min(found), max(found)) for name, found in at.items()]
        self._own_frozen(frozen)

    def _own_frozen(self, nodes: dict[str, list[fx.Node]]) -> None:
        for same in nodes.values():
            copies = 2 if self.graph.measured[same[-1]].storages & self.graph.writers.keys() else 1
            at = sorted({at for node in same for at in self.needs.of(node) if at < len(self.positions)})
            self.frozen.append((copies * _num_bytes(self.graph.owned[same[-1]]), at))


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
