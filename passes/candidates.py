"""Where a cut is legal, what would cross there, and why it is not legal elsewhere.

A cut after a node is legal when one to three tensors that carry a gradient cross and heads can read them. Everything
else that is used behind it (masks, positions, integers) travels beside them, or is computed again there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from autodecouple.errors import CutError
from autodecouple.graph import Graph, Measure, module_classes
from autodecouple.passes.capturing.tied import way_out
from autodecouple.passes.collecting import uncollected
from autodecouple.passes.masks import find_mask
from autodecouple.passes.measuring.recomputable import Needs
from autodecouple.passes.reach import Reach
from autodecouple.plans import Cut, TensorSpec

MOST_CARRYING = 3
"""How many tensors that carry a gradient may cross: more hardly improve the balance of any known model."""


@dataclass(frozen=True)
class Candidate:
    """One place between two operations: the cut, or the reason why there is none.

    node:     the cut would lie after this operation
    position: of that operation
    ended:    the modules that end here, outermost first
    twin:     an earlier place with the same cut, where this one only repeats it
    reads:    (tensor, threshold) pairs: the head of a stage that begins at or before the threshold has to read it to
              see every parameter; the first is always read
    blind:    a stage that begins at or before this position holds a parameter that no head could see
    """

    node: str
    position: int
    ended: tuple[str, ...]
    cut: Cut | None
    reason: str = ""
    twin: str | None = None
    reads: tuple[tuple[str, int], ...] = ()
    blind: int = -1

    def features(self, start: int) -> tuple[str, ...]:
        """What the head of a stage that begins at this position reads."""
        return tuple([name for i, (name, threshold) in enumerate(self.reads) if i == 0 or start <= threshold])

    @property
    def module(self) -> str:
        """The outermost module that ends here, "" inside one."""
        return self.ended[0] if self.ended else ""


@uncollected()
def find_cuts(graph: Graph) -> tuple[Candidate, ...]:
    """Every place in execution order, except after the last operation; linear in the graph."""
    return tuple(_Sweep(graph))


def keep_whole(graph: Graph, candidates: Sequence[Candidate], names: Iterable[str]) -> tuple[Candidate, ...]:
    """The candidates, none of them legal inside the named modules.

    names: of modules ("encoder.layer.3") or of their classes ("BertLayer")
    Raises CutError for a name that no module or class has.
    """
    spans = [(name, *span) for name in names for span in _extents(graph, name)]
    spans.sort(key=lambda span: span[1])
    found = []
    for candidate in candidates:
        inside = next((name for name, first, last in spans if first <= candidate.position < last), None)
        if inside is not None and candidate.cut is not None:
            candidate = replace(candidate, cut=None, reason=f"inside {inside!r}, which no_split keeps whole")
        found.append(candidate)
    return tuple(found)


def _extents(graph: Graph, name: str) -> list[tuple[int, int]]:
    """First and last position of a module, or of every module of a class."""
    extents: dict[str, tuple[int, int]] = {}
    for position, node in enumerate(graph.operations):
        for path, kind in module_classes(node):
            if name in (path, kind):
                extents[path] = (extents.get(path, (position, 0))[0], position)
    if not extents:
        raise CutError(f"no_split names {name!r}, but the captured model has no module or class of that name")
    return list(extents.values())


Live = Mapping[fx.Node, Measure]
"""The values that are used behind a place, by position."""


class _Sweep:
    """Walks the operations once, keeping the values that are still needed.

    A value that is computed again crosses nowhere: what it is computed of is needed for as long as it is.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.operations = graph.operations
        self.measures = graph.measured
        self.last_use = Needs.known(graph).last
        self.last_write = {storage: writers[-1] for storage, writers in graph.writers.items()}
        self.blocked = _blocked(_spans(graph), len(self.operations))
        self.reach = Reach(graph)
        self.unreadable: dict[fx.Node, str] = {}
        self.owned = frozenset[int]().union(*(self.measures[node].storages for node in graph.names))
        self.kept = self.owned.union(self.last_write)  # memory that a stage may have to copy from

    def __iter__(self) -> Iterator[Candidate]:
        inputs = sorted(self.graph.train.graph.find_nodes(op="placeholder"), key=lambda node: node.name)
        live = {node: self.measures[node] for node in inputs if node in self.last_use}
        before, twin = None, ""
        steps = zip(self.operations, itertools.pairwise(self.graph.paths), strict=False)
        for position, (node, (path, following)) in enumerate(steps):
            live[node] = self.measures[node]
            live = {value: measure for value, measure in live.items() if self.last_use.get(value, -1) > position}
            self.reach.visit(node)
            ended = tuple([name for name in path if name and name not in following])
            candidate = self._candidate(position, ended, live)
            if candidate.cut is not None:
                now = candidate.cut.crossing, candidate.cut.mask
                if before == now:
                    candidate = replace(candidate, cut=None, reason=f"the same cut as after {twin!r}", twin=twin)
                else:
                    before, twin = now, node.name
            yield candidate

    def _candidate(self, position: int, ended: tuple[str, ...], live: Live) -> Candidate:
        node, carrying = self._name(position), self._carrying(position, live)
        reason = self._reason(position, live, carrying)
        if reason:
            return Candidate(node, position, ended, None, reason)
        unread = [value for value in carrying if self._unreadable(value)]
        features = [value for value in carrying if value not in unread] if unread else carrying
        reads, blind = self.reach.thresholds(features, unread)
        others = ((value, measure.value) for value, measure in live.items() if value not in carrying)
        mask, meaning = find_mask(self._spec(features[0]), others)
        values = [value for value, measure in live.items() if not measure.recomputed]
        cut = Cut(
            after=node,
            crossing=tuple([self._spec(value) for value in values]),
            carrying=tuple([value.name for value in (*features, *unread)]),
            features=(features[0].name,),
            mask=mask,
            mask_meaning=meaning,
            copied=tuple([value.name for value in values if self._must_copy(value, position)]),
            module=ended[0] if ended else "",
            recomputed=tuple([value.name for value, measure in live.items() if measure.recomputed]),
        )
        named = tuple([(value.name, threshold) for value, threshold in zip(features, reads, strict=True)])
        return Candidate(node, position, ended, cut, reads=named, blind=blind)

    def _carrying(self, position: int, live: Live) -> list[fx.Node]:
        """What carries a gradient across, the latest in the line of trained parameters first."""
        found = [value for value, measure in live.items() if measure.carries_gradient(position)]
        return sorted(found, key=lambda value: (live[value].depends, live[value].position), reverse=True)

    def _reason(self, position: int, live: Live, carrying: list[fx.Node]) -> str:
        if position in self.blocked:
            return self._reason_blocked(self.blocked[position])
        tuples = [value for value, measure in live.items() if measure.value is None and not measure.recomputed]
        if tuples:
            return f"{tuples[0].name!r} is a tuple: cut at its items"
        if not carrying:
            return "nothing that is trained crosses: no trainable parameter before it reaches what follows"
        if len(carrying) > MOST_CARRYING:
            names = sorted(value.name for value in carrying)
            return (
                f"{len(names)} tensors that carry a gradient cross, and heads read {MOST_CARRYING}: {', '.join(names)}"
            )
        if self.reach.last <= position:
            return "no trainable parameter follows"
        reasons = [self._unreadable(value) for value in carrying]
        if all(reasons):
            return reasons[0]
        return self._reason_aliases(position, live)

    def _reason_blocked(self, span: Span) -> str:
        remedy = f": {way_out(self.graph.model, span.name)}" if span.kind == "parameter" else ""
        first, last = self._name(span.first), self._name(span.last)
        return f"{span.kind} {span.name!r} is used on both sides, by {first!r} and {last!r}{remedy}"

    def _unreadable(self, features: fx.Node) -> str:
        """Why no head can read a value, "" if one can."""
        if features not in self.unreadable:
            self.unreadable[features] = self._why_unreadable(features)
        return self.unreadable[features]

    def _why_unreadable(self, features: fx.Node) -> str:
        spec = self.measures[features].value
        assert spec is not None
        if not spec.dtype.startswith(("float", "bfloat", "complex")):
            return f"{features.name!r} is {spec.dtype}: heads read floating point features"
        if len(spec.shape) < 2:
            return f"{features.name!r} has one dimension: heads read two or more"
        if spec.batch_dim is None:
            return f"no dimension of {features.name!r} {list(spec.shape)} is the batch alone"
        return ""

    def _reason_aliases(self, position: int, live: Live) -> str:
        """Two values that share memory cannot both cross if something writes into it later."""
        if not self.last_write:
            return ""
        storages = Counter(storage for measure in live.values() for storage in measure.storages)
        for storage, count in storages.items():
            if count > 1 and self.last_write.get(storage, -1) > position:
                return f"values that share memory cross, and {self._name(self.last_write[storage])} writes into it"
        return ""

    def _must_copy(self, value: fx.Node, position: int) -> bool:
        """A later write would corrupt what this stage saved; an update would change a view of a parameter."""
        storages = self.measures[value].storages
        risky = self.kept & storages
        return any(storage in self.owned or self.last_write[storage] > position for storage in risky)

    def _name(self, position: int) -> str:
        return self.operations[position].name

    def _spec(self, value: fx.Node) -> TensorSpec:
        spec = self.measures[value].value
        assert spec is not None
        return spec


@dataclass(frozen=True)
class Span:
    """Between the first and the last use of a parameter or a buffer there is no cut."""

    kind: str
    name: str
    first: int
    last: int


def _blocked(spans: list[Span], end: int) -> dict[int, Span]:
    """For each position inside a span, the span that reaches furthest."""
    blocked: dict[int, Span] = {}
    waiting = sorted(spans, key=lambda span: span.first)[::-1]
    current: Span | None = None
    for position in range(end):
        while waiting and waiting[-1].first == position:
            span = waiting.pop()
            current = span if current is None or span.last > current.last else current
        if current is not None and position < current.last:
            blocked[position] = current
    return blocked


def _spans(graph: Graph) -> list[Span]:
    """Those of every trainable parameter, and of every buffer that the forward writes."""
    parameters = graph.parameter_uses().items()
    spans = [Span("parameter", name, min(at), max(at)) for name, at in parameters if len(at) > 1]
    positions, writers = graph.positions, graph.writers
    for node in graph.names if writers else ():
        # A chain of writes leads from one to the next and not back to the buffer's own node.
        writes = [at for storage in graph.measured[node].storages for at in writers.get(storage, ())]
        uses = [*writes, *(positions[user] for user in node.users if user in positions)]
        if writes:
            spans.append(Span("buffer", str(node.target), min(uses), max(uses)))
    return [span for span in spans if span.first < span.last]
