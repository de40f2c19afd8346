"""Where a cut is legal: against a real run of the graph that looks at memory, versions and autograd."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graph_strategies import Program, leaves, programs, touch
from hypothesis import HealthCheck, given, settings
from stage_builder import build
from torch import Tensor, fx, nn

from autodecouple.errors import CutError
from autodecouple.graph import attribute
from autodecouple.passes.candidates import Candidate, keep_whole
from autodecouple.pipeline import analyse

SWEEP = settings(max_examples=12, suppress_health_check=list(HealthCheck))
SLOW = settings(max_examples=120, suppress_health_check=list(HealthCheck))


@dataclass
class Seen:
    """A value in a real run, at one moment: whether it carries a gradient, its version, its memory, its parameters."""

    carries: bool
    version: int
    memory: int
    leads: frozenset[int]


class Watch(fx.Interpreter):
    """Runs a graph on real tensors and looks at every value after every operation."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.operations = [n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        self.moments: list[dict[str, Seen]] = []
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        if n in self.operations:
            tensors = {name: value for name, value in self.values.items() if isinstance(value, Tensor)}
            self.moments.append({name: look(value) for name, value in tensors.items()})
        return self.values[n.name]


def look(value: Tensor) -> Seen:
    return Seen(value.requires_grad, value._version, value.untyped_storage().data_ptr(), leads(value))


def leads(value: Tensor) -> frozenset[int]:
    """Ids of the leaves that autograd's own graph leads to from a value."""
    found, waiting, known = set(), [value.grad_fn], set()
    while waiting:
        function = waiting.pop()
        if function is None or function in known:
            continue
        known.add(function)
        if hasattr(function, "variable"):
            found.add(id(function.variable))
        waiting += [following for following, _ in function.next_functions]
    return frozenset(found)


class Oracle:
    """Legality by its definition: up to three tensors carry a gradient across, and nothing is torn apart."""

    def __init__(self, program: Program) -> None:
        self.model = program.model()
        self.graph, self.candidates = analyse(self.model, program.inputs())
        self.train = self.graph.train
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.four, self.seven = Watch(self.train), Watch(self.train)
        self.four.run(*leaves(program.inputs(4)))
        self.written = {name for name, b in self.model.named_buffers() if not torch.equal(b, before[name])}
        self.seven.run(*leaves(program.inputs(7)))
        self.positions = {node: i for i, node in enumerate(self.four.operations)}
        self.nodes = {node.name: node for node in self.train.graph.nodes}
        self.again = {name for name, measure in self.graph.measures.items() if measure.recomputed}
        twin = program.model()
        touch(program.call(twin)).backward()
        self.trained = {name for name, p in twin.named_parameters() if p.grad is not None}

    def crossing(self, position: int) -> set[str]:
        """What exists at a place and is used behind it, parameters and buffers aside; in the place of what is computed
        again, what that is computed of."""
        found, waiting = set[str](), [self.nodes[name] for name in self.used(position)]
        while waiting:
            node = waiting.pop()
            if node.name in self.again:
                waiting += [source for source in node.all_input_nodes if source.op != "get_attr"]
            else:
                found.add(node.name)
        return found

    def used(self, position: int) -> set[str]:
        """What exists at a place and is used behind it, parameters and buffers aside."""
        found = set()
        for node in self.train.graph.nodes:
            born = self.positions.get(node, -1)
            last = max((self.positions.get(user, len(self.positions)) for user in node.users), default=-1)
            if node.op not in ("get_attr", "output") and born <= position < last:
                found.add(node.name)
        return found

    def uses(self, name: str) -> list[int]:
        nodes = [n for n in self.train.graph.find_nodes(op="get_attr") if str(n.target) == name]
        readers = [self.positions[user] for node in nodes for user in node.users]
        versions = [[moment[node.name].version for moment in self.four.moments] for node in nodes]
        writers = [p + 1 for seen in versions for p, (a, b) in enumerate(itertools.pairwise(seen)) if a != b]
        return [*readers, *writers]

    def carrying(self, position: int) -> set[str]:
        now = self.four.moments[position]
        return {name for name in self.crossing(position) if name in now and now[name].carries}

    def written_later(self, name: str, position: int) -> bool:
        return self.four.moments[-1][name].version > self.four.moments[position][name].version

    def illegal(self, position: int) -> str:
        crossing = self.crossing(position)
        whole = [n for n, p in self.model.named_parameters() if p.requires_grad] + sorted(self.written)
        for name in whole:
            if (uses := self.uses(name)) and min(uses) <= position < max(uses):
                return f"{name} is used on both sides"
        if any(not isinstance(self.four.values[name], Tensor | int | float) for name in crossing):
            return "tuple"
        if len(carrying := self.carrying(position)) not in (1, 2, 3):
            return f"{len(carrying)} carry"
        if max((use for name in self.trained for use in self.uses(name)), default=-1) <= position:
            return "nothing follows"
        if not any(map(self.readable, carrying)):
            return "no batch of vectors"
        now = self.four.moments[position]
        tensors = [name for name in crossing if name in now]
        for name in tensors:
            shared = [other for other in tensors if now[other].memory == now[name].memory]
            if len(shared) > 1 and any(self.written_later(other, position) for other in shared):
                return "shared memory is written"
        return ""

    def readable(self, name: str) -> bool:
        a, b = self.four.values[name].shape, self.seven.values[name].shape
        return len(a) >= 2 and (4, 7) in zip(a, b, strict=True)

    def parameters(self, begin: int, position: int) -> set[int]:
        """Ids of the trained parameters of a stage from one place to another."""
        uses = {name: self.uses(name) for name in self.trained}
        first = {name: min(at) for name, at in uses.items() if at}
        return {id(self.model.get_parameter(name)) for name, at in first.items() if begin <= at <= position}

    def check_reads(self, place: Candidate, carrying: set[str]) -> None:
        """For every stage that could end here: what its head reads sees all that a head can see."""
        seen = {name: self.four.moments[place.position][name].leads for name in carrying}
        readable = frozenset[int]().union(*(seen[name] for name in carrying if self.readable(name)))
        for begin in range(place.position + 1):
            inside, features = self.parameters(begin, place.position), place.features(begin)
            union = frozenset[int]().union(*(seen[name] for name in features))
            assert inside & union == inside & readable, f"{features} of {carrying} from {begin}"
            assert (begin <= place.blind) == bool(inside - readable)
            for name in features[1:]:
                assert inside & seen[name], f"{name} is read for nothing"

    def check_recomputed(self, place: Candidate) -> None:
        """What is not sent is what it was, when it is computed of what is sent; and less is sent than without."""
        assert place.cut is not None
        sent = {spec.name: self.four.values[spec.name] for spec in place.cut.crossing}
        for name in place.cut.recomputed:
            found = self.compute(self.nodes[name], sent)
            assert equal_values(found, self.four.values[name]), f"{name} at the cut after {place.node}"
            assert not any(moment[name].carries for moment in self.four.moments if name in moment)
        without = [self.graph.measures[name].value for name in self.used(place.position)]
        assert None in without or place.cut.num_bytes <= sum(spec.num_bytes for spec in without if spec is not None)

    def compute(self, node: fx.Node, sent: dict[str, Any]) -> Any:
        """A value of what was sent and what the model owns, at the end of the run."""
        if node.name in sent:
            return sent[node.name]
        if node.op == "get_attr":
            return attribute(self.train, node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self.compute(source, sent))
        assert callable(node.target), f"{node.name} was not sent"
        return node.target(*args, **kwargs)

    def copied(self, position: int) -> set[str]:
        """What is written into later, or lies in a parameter or buffer."""
        now = self.four.moments[position]
        owned = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        tensors = [name for name in self.crossing(position) if name in now]
        return {name for name in tensors if self.written_later(name, position) or now[name].memory in owned}


def equal_values(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(b, Tensor) else bool(a == b)


def check(program: Program) -> None:
    oracle = Oracle(program)
    assert [c.node for c in oracle.candidates] == [n.name for n in oracle.four.operations[:-1]]
    last: set[str] = set()
    for place in oracle.candidates:
        expected = oracle.illegal(place.position)
        legal = place.cut is not None or place.twin is not None
        assert legal == (not expected), f"{place.node}: {place.reason or 'legal'}, but it is {expected or 'legal'}"
        assert (place.reason == "") == (place.cut is not None), "whatever is no cut says why"
        crossing = oracle.crossing(place.position)
        if place.twin is not None:
            assert crossing == last, "a twin repeats the cut before it"
        if place.cut is not None:
            assert {spec.name for spec in place.cut.crossing} == crossing
            assert set(place.cut.recomputed) == oracle.used(place.position) & oracle.again
            oracle.check_recomputed(place)
            carrying = oracle.carrying(place.position)
            assert set(place.cut.carrying) == carrying
            oracle.check_reads(place, carrying)
            assert set(place.cut.copied) == oracle.copied(place.position), place.node
            last = crossing


@SWEEP
@given(programs())
def test_cuts_are_legal_where_few_gradients_cross(program: Program) -> None:
    """Legality, what crosses, what the head reads and what must be copied, by brute force on a real run."""
    check(program)


@pytest.mark.slow
@SLOW
@given(programs())
def test_cuts_are_legal_where_few_gradients_cross_for_many(program: Program) -> None:
    check(program)


def places(model: nn.Module, inputs: Any) -> dict[str, Candidate]:
    return {candidate.node: candidate for candidate in analyse(model, inputs)[1]}


def legal(model: nn.Module, inputs: Any) -> list[str]:
    return [name for name, candidate in places(model, inputs).items() if candidate.cut is not None]


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y: Tensor = self.last(h + self.second(h))
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.outer(self.inner(x).relu())
        return y


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.last = nn.Sequential(Block(), Block()), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.blocks(x))
        return y


def test_both_ends_of_a_skip_connection_cross() -> None:
    """The head reads the later one: all that leads to the earlier one leads to it, too."""
    found = places(Skip(), torch.randn(4, 4))
    assert found["linear"].cut is not None and found["add"].cut is not None
    cut = found["linear_1"].cut
    assert cut is not None
    assert cut.carrying == ("linear_1", "linear") and cut.features == ("linear_1",)


def test_a_head_reads_two_branches_where_neither_sees_all() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.last = nn.Linear(4, 5), nn.Linear(4, 6), nn.Linear(11, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(torch.cat([self.left(x), self.right(x)], 1))
            return y

    place = places(Branches(), torch.randn(4, 4))["linear_1"]
    assert place.cut is not None and place.cut.carrying == ("linear_1", "linear")
    assert place.features(0) == ("linear_1", "linear") and place.features(1) == ("linear_1",)
    built = build(Branches(), torch.randn(4, 4), 2)
    assert built.plan.cuts[0].after != "linear_1", "one tensor is preferred at equal balance"


def test_four_gradients_are_too_many() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.last = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            parts = [layer(x) for layer in self.layers]
            y: Tensor = self.last(parts[0] * parts[1] + parts[2] * parts[3])
            return y

    reason = places(Dense(), torch.randn(4, 4))["linear_3"].reason
    assert reason.startswith("4 tensors that carry a gradient cross, and heads read 3: linear, linear_1")


def test_a_parameter_that_no_head_could_see_is_not_cut_off() -> None:
    """mpnet's trainable relative bias crosses every cut: it has no batch, so it travels and no head reads it. Its
    parameter is trained where the features already depend on it, and no stage may end before."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 4))
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            bias = self.table.tanh()
            h = self.layers[0](x)
            for layer in self.layers[1:]:
                h = layer(h + bias)
            return h

    found = places(Bias(), torch.randn(4, 6, 4))
    assert found["linear"].cut is not None and found["linear"].blind == found["tanh"].position
    assert found["linear_1"].cut is not None and found["linear_1"].blind == -1
    assert set(found["linear_1"].cut.carrying) == {"linear_1", "tanh"}
    plan = build(Bias(), torch.randn(4, 6, 4), 3).plan
    assert [cut.after for cut in plan.cuts] == ["add", "add_1"], "the first stage reaches to where it uses the bias"


def test_no_split_keeps_modules_whole() -> None:
    graph, candidates = analyse(Blocks(), torch.randn(4, 4))
    free = {c.node for c in candidates if c.cut is not None}
    whole = keep_whole(graph, candidates, ["Block"])
    assert {c.node for c in whole if c.cut is not None} == {n for n in free if n.startswith("add")}
    inside = next(c for c in whole if c.node == "relu")
    assert inside.reason == "inside 'Block', which no_split keeps whole"
    named = keep_whole(graph, candidates, ["blocks.1"])
    assert {c.node for c in named if c.cut is None} - {c.node for c in candidates if c.cut is None} == {
        "linear_2",
        "relu_1",
        "linear_3",
    }
    with pytest.raises(CutError, match="no_split names 'Bloc'"):
        keep_whole(graph, candidates, ["Bloc"])


def test_a_shared_module_is_not_torn() -> None:
    """Trap 4: naive splitting put one parameter on two stages in 21 of 29 models that use one twice."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.shared(self.shared(self.first(x)).relu()))
            return y

    found = places(Twice(), torch.randn(4, 4))
    assert [name for name, c in found.items() if c.cut is not None] == ["linear", "linear_2"]
    for name in ("linear_1", "relu"):
        assert "parameter 'shared.weight' is used on both sides, by 'linear_1' and 'linear_2'" in found[name].reason


def test_tied_parameters_are_one_even_under_two_names() -> None:
    """An embedding tied to the classifier spans the whole model: no cut, and the reason names it."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.middle = nn.Embedding(5, 4), nn.Linear(4, 4)
            self.last = nn.Linear(4, 5, bias=False)
            self.last.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            y: Tensor = self.last(self.middle(self.embedding(tokens)).mean(1))
            return y

    found = places(Tied(), torch.zeros(4, 6, dtype=torch.int64))
    assert not [name for name, c in found.items() if c.cut is not None]
    assert all("weight' is used on both sides, by 'embedding' and 'linear_1'" in c.reason for c in found.values())


def test_cuts_lie_at_the_items_of_a_tuple() -> None:
    """Trap 3: behind chunk() or an LSTM the tuple is on its way until its items are taken."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.last = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.lstm(x)
            z: Tensor = self.last(y[:, -1])
            return z

    found = places(Recurrent(), torch.randn(4, 6, 4))
    kinds = {name: c for name, c in found.items() if c.cut is not None or "tuple" in c.reason}
    assert kinds["lstm"].reason == "'lstm' is a tuple: cut at its items"
    item = next(c for c in kinds.values() if c.cut is not None)
    assert item.node.startswith("getitem")
    assert item.module == "lstm"
    assert item.cut is not None
    assert item.cut.spec(item.cut.features[0]).shape == (4, 6, 5)


def test_what_is_written_later_is_copied() -> None:
    """Trap 2: the first operation behind a cut is often ReLU(inplace=True), which would overwrite what BatchNorm's
    stage saved; and a view of what is written is written as well."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    found = places(model, torch.randn(4, 4))
    copied = {name: c.cut.copied for name, c in found.items() if c.cut is not None}
    assert copied == {"linear": (), "batch_norm": ("batch_norm",), "relu_": ()}

    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            half = h.view(-1, 2, 4)
            half[:, 0] += 1
            y: Tensor = self.last(half.flatten(1))
            return y

    cut = places(View(), torch.randn(4, 4))["view"].cut
    assert cut is not None
    assert cut.copied == ("view",)


def test_a_side_tensor_that_is_written_later_is_copied() -> None:
    """Masks and scales travel beside the features; one that a later stage fills in place is another batch's too."""

    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            scale = x.abs().sum(1, keepdim=True)
            h = self.first(x) * scale
            scale += 1
            y: Tensor = self.last(h / scale)
            return y

    found = places(Side(), torch.randn(4, 4))
    assert found["mul"].cut is not None
    assert found["mul"].cut.copied == ("sum_1",)


def test_values_that_share_memory_do_not_cross_together_where_it_is_written() -> None:
    """Two copies would part what is one: the write through one name must be seen through the other."""

    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            side = x.abs()
            view = side[:, :1]
            h = self.first(x)
            view += 1
            y: Tensor = self.last(h * side.sum(1, keepdim=True))
            return y

    assert "share memory" in places(Alias(), torch.randn(4, 4))["linear"].reason


def test_a_buffer_that_is_counted_is_not_torn() -> None:
    """Read here, written there: on two stages one batch would see the count of another."""

    class Counter(nn.Module):
        step: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
            self.register_buffer("step", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x) / (1 + self.step)
            y = self.last(h.relu())
            self.step += 1
            z: Tensor = y
            return z

    found = places(Counter(), torch.randn(4, 4))
    assert "buffer 'step' is used on both sides" in found["relu"].reason
    assert found["linear"].cut is not None


def test_no_cut_where_nothing_is_trained() -> None:
    frozen = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    frozen[0].requires_grad_(False)
    found = places(frozen, torch.randn(4, 4))
    assert "nothing that is trained crosses" in found["relu"].reason
    assert found["linear_1"].cut is not None
    frozen[4].requires_grad_(False)
    assert places(frozen, torch.randn(4, 4))["relu_1"].reason == "no trainable parameter follows"


def test_no_cut_before_parameters_that_nothing_trains() -> None:
    """A layer behind the cut whose result is detached would be a stage that never learns."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.side = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z: Tensor = y * self.side(y).sigmoid().detach()
            return z

    assert places(Gated(), torch.randn(4, 4))["linear"].reason == "no trainable parameter follows"


def test_a_view_of_a_parameter_is_copied_when_it_crosses() -> None:
    """Learned queries: while the next stage still reads them, this stage's update of the next batch changes them."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.last = nn.Parameter(torch.randn(1, 5, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q = self.queries.expand(x.shape[0], 5, 4)
            y: Tensor = self.last((q * x[:, None]).sum(1))
            return y

    model = Queries()
    cut = places(model, torch.randn(4, 4))["expand"].cut
    assert cut is not None
    assert (cut.features, cut.copied) == (("expand",), ("expand",))


def test_a_float_of_the_batch_travels() -> None:
    """x / sqrt(rows): the number is no tensor and no integer, and was called a tuple."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            root = x.size(0) ** 0.5
            y: Tensor = self.last(self.first(x) / root).relu() / root
            return y

    built = build(Root(), torch.randn(4, 4), 2)
    x = torch.randn(9, 4)
    assert len(built.codes) == 2
    assert torch.equal(built.output(built.run(x)[-1]), built.model(x))


def test_features_know_the_batch_where_it_is_not_in_front() -> None:
    """(T, N, D) of a recurrent network or transformer: heads must pool over T, not over the rows."""

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.first(x.transpose(0, 1)).relu()).mean(0)
            return y

    found = places(Swapped(), torch.randn(4, 6, 4))
    assert found["relu"].cut is not None
    assert str(found["relu"].cut.spec("relu")) == "relu (6, N, 8) float32"


def test_rows_folded_into_another_dimension_are_no_features() -> None:
    """(N * T, D): one row of features per token, but one target per text."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.reshape(-1, 4)).relu()
            y: Tensor = self.last(h).view(x.size(0), -1, 3).mean(1)
            return y

    assert "no dimension of 'relu' [24, 8] is the batch alone" in places(Folded(), torch.randn(4, 6, 4))["relu"].reason


def test_a_side_input_as_long_as_a_feature_is_no_batch() -> None:
    """A vector of four weights: its length came out as the batch, and (N, 4) features as batched along both."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, weights: Tensor, x: Tensor) -> Tensor:
            y: Tensor = self.last((self.first(x).transpose(0, 1) * weights[:, None]).relu().transpose(0, 1))
            return y

    found = places(Weighted(), (torch.randn(4), torch.randn(6, 5)))
    assert found["relu"].cut is not None
    assert str(found["relu"].cut.spec("relu")) == "relu (4, N) float32"


def test_module_boundaries_are_named_as_the_user_names_them() -> None:
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())  # noqa: E731
    model = nn.Sequential()
    model.add_module("stem", block())
    model.add_module("body", nn.Sequential(block(), block()))
    model.add_module("last", nn.Linear(4, 3))
    found = places(model, torch.randn(4, 4))
    ended = {name: c.ended for name, c in found.items()}
    assert ended == {
        "linear": ("stem.0",),
        "relu": ("stem", "stem.1"),
        "linear_1": ("body.0.0",),
        "relu_1": ("body.0", "body.0.1"),
        "linear_2": ("body.1.0",),
        "relu_2": ("body", "body.1", "body.1.1"),
    }
    assert {name: c.cut.module for name, c in found.items() if c.cut is not None} == {
        name: modules[0] for name, modules in ended.items()
    }


def test_a_place_that_repeats_a_cut_is_its_twin() -> None:
    """BatchNorm counts its batches between two operations: before and after that the same tensor crosses."""
    found = places(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.randn(4, 4))
    assert (found["add_"].twin, found["add_"].cut) == ("linear", None)
    assert "the same cut as after 'linear'" in found["add_"].reason


class Encoder(nn.Module):
    """nn.TransformerEncoder with padding."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.embedding, self.encoder = nn.Embedding(9, 8, padding_idx=0), nn.TransformerEncoder(layer, 3)
        self.last = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == 0)
        y: Tensor = self.last(x.mean(1))
        return y


class Attentive(nn.Module):
    """As in transformers: attention_mask is 1 where a token counts, and blocks add a large negative number."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.key == "additive":
            mask = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
            attention_mask = mask.masked_fill(mask < 0, -1e9)
        for layer in self.layers:
            scores = layer(x) @ x.transpose(1, 2)
            if self.key == "additive":
                scores = scores + attention_mask[:, 0]
            else:
                scores = scores.masked_fill(attention_mask[:, None, :] == 0, -1e9)
            x = x + scores.softmax(-1) @ x
        y: Tensor = self.last(x.mean(1))
        return y


class Padding(nn.Module):
    """Keeps `tokens == 0` itself on the way through the layers."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens == 0 if self.key == "ignore" else tokens != 0
        x = self.embedding(tokens)
        for layer in self.layers:
            keep = ~mask if self.key == "ignore" else mask
            x = layer(x).relu() * keep[:, :, None]
        y: Tensor = self.last(x.mean(1))
        return y


TOKENS = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [1, 0, 0, 0, 0], [2, 3, 4, 5, 0]])


@pytest.mark.parametrize(
    ("kind", "key", "masks"),
    [
        (Encoder, "", 0),
        (Attentive, "keep", 1),
        (Attentive, "bool", 1),
        (Attentive, "additive", 1),
        (Padding, "ignore", 0),
        (Padding, "keep", 0),
    ],
)
def test_heads_are_told_which_tokens_count(kind: Any, key: str, masks: int) -> None:
    """Whatever form a mask has on its way, the head gets True where a token is no padding; else it learns padding."""
    attention = (TOKENS != 0).long() if key != "bool" else TOKENS != 0
    inputs = (TOKENS, attention) if masks else (TOKENS,)
    built = build(kind(key), inputs, 3)
    assert len(built.codes) == 3
    for cut, code, values in zip(built.plan.cuts, built.codes, built.run(inputs), strict=False):
        assert cut.mask is not None, f"{kind.__name__} {key}: no mask at {cut.after}"
        assert code.mask is not None
        assert torch.equal(values[code.mask], TOKENS != 0)


def test_a_mask_of_another_thing_is_left_alone() -> None:
    """(N, N) or (T, T) bool tensors cross too: a causal mask says nothing about padding."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.last = nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            later = torch.ones(5, 5, dtype=torch.bool).triu(1)
            for layer in self.layers:
                x = x + (layer(x) @ x.transpose(1, 2)).masked_fill(later, -1e9).softmax(-1) @ x
            y: Tensor = self.last(x.mean(1))
            return y

    assert [cut.mask for cut in build(Causal(), torch.cat([TOKENS, TOKENS[:1]]), 3).plan.cuts] == [None, None]


def test_parameters_are_the_users_own() -> None:
    model = Skip()
    graph, _ = analyse(model, torch.randn(4, 4))
    found = {str(n.target): attribute(graph.train, n) for n in graph.train.graph.find_nodes(op="get_attr")}
    assert all(found[name] is parameter for name, parameter in model.named_parameters())


def test_a_buffer_written_in_a_chain_is_not_cut_off() -> None:
    """Each block goes on writing where the last one stopped: in the next stage that was a copy, and the user's buffer
    ended half written."""

    class Chain(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.register_buffer("count", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[:3]:
                x = layer(x)
                self.count.mul_(0.9).add_(x.detach().mean(0))
            y: Tensor = self.layers[3](x)
            return y

    found = places(Chain(), torch.randn(4, 4))
    assert found["linear"].cut is not None, "before the first write"
    assert "buffer 'count' is used on both sides" in found["linear_1"].reason
