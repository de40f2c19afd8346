"""Where a cut is legal, what would cross there, and why it is not legal elsewhere.

A cut after a node is legal when exactly one tensor that carries a gradient crosses. Everything else that crosses
(masks, positions, integers) travels beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx

from autodecouple.graph import Graph, module_path
from autodecouple.passes.masks import find_mask
from autodecouple.plans import Cut, TensorSpec

FEATURE_RANKS = (2, 3, 4, 5)
"""Ranks that heads are built for: (N, D), (N, T, D), (N, C, H, W), (N, C, D, H, W)."""


@dataclass(frozen=True)
class Candidate:
    """One place between two operations: the cut, or the reason why there is none.

    node:     the cut would lie after this operation
    position: of that operation
    ended:    the modules that end here, outermost first
    twin:     an earlier place with the same cut, where this one only repeats it
    """

    node: str
    position: int
    ended: tuple[str, ...]
    cut: Cut | None
    reason: str = ""
    twin: str | None = None

    @property
    def module(self) -> str:
        """The outermost module that ends here, "" inside one."""
        return self.ended[0] if self.ended else ""


def find_cuts(graph: Graph) -> tuple[Candidate, ...]:
    """Every place in execution order, except after the last operation; linear in the graph."""
    return tuple(_Sweep(graph))


class _Sweep:
    """Walks the operations once, keeping the values that are still needed."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.operations = graph.operations
        self.measures = {node: graph.measures[node.name] for node in graph.train.graph.nodes if node.op != "output"}
        positions = {node: i for i, node in enumerate(self.operations)}
        end = len(self.operations)
        self.last_use = {
            node: max((positions.get(user, end) for user in node.users), default=-1) for node in self.measures
        }
        self.last_write: dict[int, int] = {}
        for position, node in enumerate(self.operations):
            for storage in self.measures[node].writes:
                self.last_write[storage] = position
        self.blocked = _blocked(_spans(graph), end)
        trained = [uses for name, uses in graph.parameter_uses().items() if name in graph.trained]
        self.last_trained = max((max(uses) for uses in trained if uses), default=-1)
        self.owned = frozenset[int]().union(*(m.storages for n, m in self.measures.items() if n.op == "get_attr"))

    def __iter__(self) -> Iterator[Candidate]:
        live = {node for node in self.measures if node.op == "placeholder" and self.last_use[node] >= 0}
        before: frozenset[fx.Node] = frozenset()
        twin = ""
        for position, node in enumerate(self.operations[:-1]):
            if self.last_use[node] > position:
                live.add(node)
            live = {value for value in live if self.last_use[value] > position}
            candidate = self._candidate(position, node, live)
            if candidate.cut is not None:
                if before == live:
                    candidate = replace(candidate, cut=None, reason=f"the same cut as after {twin!r}", twin=twin)
                else:
                    before, twin = frozenset(live), node.name
            yield candidate

    def _candidate(self, position: int, node: fx.Node, live: set[fx.Node]) -> Candidate:
        ended = ended_modules(node, self.operations[position + 1])
        reason = self._reason(position, live)
        if reason:
            return Candidate(node.name, position, ended, None, reason)
        values = sorted(live, key=lambda value: self.measures[value].position)
        (features,) = (value for value in values if self.measures[value].carries_gradient(position))
        others = [(value, self._spec(value)) for value in values if value is not features]
        mask, meaning = find_mask(self._spec(features), others)
        cut = Cut(
            after=node.name,
            crossing=tuple(self._spec(value) for value in values),
            features=features.name,
            mask=mask,
            mask_meaning=meaning,
            copied=tuple(value.name for value in values if self._must_copy(value, position)),
            module=ended[0] if ended else "",
        )
        return Candidate(node.name, position, ended, cut)

    def _reason(self, position: int, live: set[fx.Node]) -> str:
        if position in self.blocked:
            name, first, last = self.blocked[position]
            return f"{name} is used on both sides, by {self._name(first)!r} and {self._name(last)!r}"
        tuples = [value.name for value in live if self.measures[value].value is None]
        if tuples:
            return f"{tuples[0]!r} is a tuple: cut at its items"
        carrying = [value for value in live if self.measures[value].carries_gradient(position)]
        if not carrying:
            return "nothing that is trained crosses: no trainable parameter before it reaches what follows"
        if len(carrying) > 1:
            names = sorted((value.name for value in carrying), key=str)
            return f"{len(names)} tensors that carry a gradient cross: {', '.join(names)}"
        if self.last_trained <= position:
            return "no trainable parameter follows"
        return self._reason_features(position, carrying[0]) or self._reason_aliases(position, live)

    def _reason_features(self, position: int, features: fx.Node) -> str:
        spec = self.measures[features].value
        assert spec is not None
        if not spec.dtype.startswith(("float", "bfloat")):
            return f"{features.name!r} is {spec.dtype}: heads read floating point features"
        if len(spec.shape) not in FEATURE_RANKS:
            return f"{features.name!r} has {len(spec.shape)} dimensions: heads read 2 to 5"
        if spec.batch_dim is None:
            return f"no dimension of {features.name!r} {list(spec.shape)} is the batch alone"
        return ""

    def _reason_aliases(self, position: int, live: set[fx.Node]) -> str:
        """Two values that share memory cannot both cross if something writes into it later."""
        storages = Counter(storage for value in live for storage in self.measures[value].storages)
        for storage, count in storages.items():
            if count > 1 and self.last_write.get(storage, -1) > position:
                return f"values that share memory cross, and {self._name(self.last_write[storage])} writes into it"
        return ""

    def _must_copy(self, value: fx.Node, position: int) -> bool:
        """A later write would corrupt what this stage saved; an update would change a view of a parameter."""
        storages = self.measures[value].storages
        return any(self.last_write.get(storage, -1) > position or storage in self.owned for storage in storages)

    def _name(self, position: int) -> str:
        return self.operations[position].name

    def _spec(self, value: fx.Node) -> TensorSpec:
        spec = self.measures[value].value
        assert spec is not None
        return spec


Span = tuple[str, int, int]
"""What is used, first position, last position."""


def _blocked(spans: list[Span], end: int) -> dict[int, Span]:
    """For each position inside a span, the span that reaches furthest."""
    blocked: dict[int, Span] = {}
    waiting = sorted(spans, key=lambda span: span[1])[::-1]
    current: Span | None = None
    for position in range(end):
        while waiting and waiting[-1][1] == position:
            span = waiting.pop()
            current = span if current is None or span[2] > current[2] else current
        if current is not None and position < current[2]:
            blocked[position] = current
    return blocked


def _spans(graph: Graph) -> list[Span]:
    """First and last use of every trainable parameter, and of every buffer that the forward writes."""
    spans = {f"parameter {name!r}": (min(uses), max(uses)) for name, uses in graph.parameter_uses().items() if uses}
    operations = graph.operations
    written = {s for node in operations for s in graph.measures[node.name].writes}
    positions = {node: i for i, node in enumerate(operations)}
    for node in graph.train.graph.find_nodes(op="get_attr"):
        if graph.measures[node.name].storages & written:
            uses = [positions[user] for user in node.users if user in positions]
            if uses:
                spans[f"buffer {str(node.target)!r}"] = (min(uses), max(uses))
    return [(name, first, last) for name, (first, last) in spans.items() if first < last]


def ended_modules(node: fx.Node, following: fx.Node) -> tuple[str, ...]:
    """The modules that `node` is the last operation of, outermost first."""
    after = set(module_path(following))
    return tuple(name for name in module_path(node) if name and name not in after)
