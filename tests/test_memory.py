"""Memory: the plan's bytes per stage against peaks that a dispatch mode sees while the stages really train."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from graph_strategies import Program, programs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stage_builder import SMALL, build
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import autodecouple
from autodecouple.errors import PartitionError
from autodecouple.executors.job import Job
from autodecouple.graph import Graph, attribute
from autodecouple.objectives import LoCo, Objective
from autodecouple.passes.candidates import Candidate, find_cuts
from autodecouple.passes.measure import annotate
from autodecouple.passes.measuring.crossing import Crossing
from autodecouple.passes.measuring.lifetimes import Footprint, Lifetimes, footprint_of
from autodecouple.passes.measuring.memory import MemoryWalk
from autodecouple.passes.measuring.stage_costs import StageCosts
from autodecouple.passes.measuring.stage_memory import StageMemory
from autodecouple.passes.partition import choose_cuts
from autodecouple.passes.trace import capture
from autodecouple.randomness import Randomness
from autodecouple.stage import Stage

SWEEP = settings(max_examples=10, suppress_health_check=list(HealthCheck))
SLOW = settings(max_examples=100, suppress_health_check=list(HealthCheck))


class Tracker(TorchDispatchMode):
    """Bytes of all memory that was shown to it or that an operation touched, while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.peak = 0

    def show(self, values: Any) -> None:
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.alive:
                self._add(leaf.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.alive.add(storage._cdata)
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.show((args, kwargs, out))
        return out


@contextmanager
def tracked(stages: Iterable[Stage]) -> Iterator[list[Tracker]]:
    """One tracker per stage, which sees what the stage owns, what it is sent and what its actions make."""
    trackers = [Tracker() for _ in stages]
    perform, forward = Job.perform, Stage.forward

    def tracked_perform(job: Job, action: Any, stage: Stage, queue: Any) -> None:
        with trackers[stage.index]:
            perform(job, action, stage, queue)

    def tracked_forward(stage: Stage, work: Any, micro_batch: int, received: Any, randomness: Any) -> Any:
        trackers[stage.index].show(received)
        return forward(stage, work, micro_batch, received, randomness)

    for stage, tracker in zip(stages, trackers, strict=True):
        modules = [stage.code.body, *([stage.code.head] if stage.code.head is not None else [])]
        tracker.show([[*module.parameters(), *module.buffers()] for module in modules])
        tracker.show(stage.optimizer.state_dict()["state"] if stage.optimizer is not None else {})
    with mock.patch.object(Job, "perform", tracked_perform), mock.patch.object(Stage, "forward", tracked_forward):
        yield trackers


def peaks(
    model: nn.Module, x: Tensor, n_stages: int, loss: str | Objective = "supcon", recompute: bool = False
) -> list[tuple[int, int]]:
    """(planned, seen) bytes of every stage in the second step: the optimizer has its state by then."""
    target = torch.arange(x.shape[0]) % 3
    with autodecouple.compile(
        model, n_stages, loss, example_inputs=(x,), schedule="sequential", devices=["cpu"], recompute=recompute
    ) as decoupled:
        decoupled.train_step(x, target)
        gc.collect()
        with tracked(decoupled.stages) as trackers:
            decoupled.train_step(x, target)
        planned = [stage.memory_bytes for stage in decoupled.plan.stages]
        return list(zip(planned, (tracker.peak for tracker in trackers), strict=True))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.skip(x)).relu_()


def resnet() -> nn.Module:
    blocks = [Residual(8, 8), Residual(8, 16, 2), Residual(16, 32, 2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    classifier = [nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 3)]
    return nn.Sequential(*layers, *classifier)


class Encoder(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 128, dropout, batch_first=True)
        self.embed = nn.Embedding(100, 32)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.last = nn.Linear(32, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.last(self.encoder(self.embed(tokens)).mean(1))
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(100, 16), nn.Linear(32, 3)
        self.first, self.second = nn.LSTM(16, 32, batch_first=True), nn.LSTM(32, 32, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        h, _ = self.first(self.embed(tokens))
        h, _ = self.second(h.relu())
        y: Tensor = self.last(h[:, -1])
        return y


class UNet(nn.Module):
    """Its features cross the cuts beside the way down and up."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down, self.deep, self.middle = self._pair(3, width), self._pair(width, width), self._pair(width, width)
        self.up, self.top = self._pair(2 * width, width), self._pair(2 * width, width)
        self.last = nn.Conv2d(width, 3, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Module:
        first = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        return nn.Sequential(*first, nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)
        deep = self.deep(nn.functional.max_pool2d(down, 2))
        middle = self.middle(nn.functional.max_pool2d(deep, 2))
        up = self.up(torch.cat([nn.functional.interpolate(middle, scale_factor=2.0), deep], 1))
        top = self.top(torch.cat([nn.functional.interpolate(up, scale_factor=2.0), down], 1))
        y: Tensor = self.last(top).mean((2, 3))
        return y


def perceptron(width: int = 256) -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(5)]
    return nn.Sequential(*blocks, nn.Linear(width, 3))


def frozen_trunk() -> nn.Module:
    """Large weights that nobody trains, before and between layers that are trained."""
    frozen = [nn.Linear(256, 256), nn.Linear(256, 256)]
    for layer in frozen:
        layer.requires_grad_(False)
    trained = [nn.Linear(256, 64), nn.Linear(64, 256), nn.Linear(256, 64)]
    layers = (frozen[0], nn.ReLU(), trained[0], nn.ReLU(), trained[1], frozen[1], nn.ReLU(), trained[2], nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(64, 3))


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n_stages: int
    tokens: bool = False

    def inputs(self, rows: int) -> Tensor:
        return torch.randint(100, (rows, *self.shape)) if self.tokens else torch.randn(rows, *self.shape)


CASES = {
    "resnet": Case(resnet, (3, 16, 16), 4),
    "vgg": Case(vgg, (3, 32, 32), 3),
    "encoder": Case(lambda: Encoder(0.0), (16,), 3, tokens=True),
    "dropout": Case(lambda: Encoder(0.1), (16,), 3, tokens=True),
    "lstm": Case(Recurrent, (20,), 3, tokens=True),
    "unet": Case(UNet, (3, 16, 16), 4),
    "perceptron": Case(perceptron, (256,), 3),
    "frozen": Case(frozen_trunk, (256,), 2),
}


def check_peaks(name: str, rows: int, loss: str = "supcon", recompute: bool = False) -> None:
    case = CASES[name]
    for index, (planned, seen) in enumerate(peaks(case.make(), case.inputs(rows), case.n_stages, loss, recompute)):
        assert abs(planned / seen - 1) < 0.15, f"stage {index} of {name}, {rows} rows: planned {planned}, seen {seen}"


@pytest.mark.parametrize("name", ["resnet", "dropout", "lstm", "unet", "frozen"])
def test_peaks_are_within_fifteen_percent(name: str) -> None:
    """Every stage, where activations count most."""
    check_peaks(name, 32)


def test_peaks_of_heads_with_recurrent_blocks() -> None:
    """The fused LSTM's workspace once counted in stages only: such heads were planned at a third of their memory."""
    check_peaks("lstm", 16, "downstream")


@pytest.mark.parametrize("name, loss", [("resnet", "loco"), ("dropout", "loco"), ("unet", LoCo(first=True))])
def test_peaks_of_overlapping_stages_are_bounded(name: str, loss: str | Objective) -> None:
    """What is kept for a second way back is counted whole, though some of it is not there at the worst moment."""
    case = CASES[name]
    for index, (planned, seen) in enumerate(peaks(case.make(), case.inputs(32), case.n_stages, loss)):
        assert 0.95 < planned / seen < 1.4, f"stage {index} of {name}: planned {planned}, seen {seen}"


@pytest.mark.parametrize("name", ["vgg", "perceptron"])
def test_peaks_of_a_small_batch(name: str) -> None:
    """Weights, gradients and the optimizer count most."""
    check_peaks(name, 4)


@pytest.mark.parametrize("name, loss", [("resnet", "supcon"), ("dropout", "bp"), ("unet", "supcon")])
def test_peaks_where_the_forward_runs_twice(name: str, loss: str) -> None:
    check_peaks(name, 32, loss, recompute=True)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("loss", ["supcon", "bp", "early_exit"])
@pytest.mark.parametrize("rows", [3, 16, 96, 384])
@pytest.mark.parametrize("name", CASES)
def test_peaks_for_many_batches_and_losses(name: str, rows: int, loss: str, recompute: bool) -> None:
    check_peaks(name, rows, loss, recompute)


def check_activations(program: Program, n_stages: int) -> None:
    """By autograd's own account of what it saves in a real run."""
    built = build(program.model(), program.inputs(), n_stages)
    received = built.values(program.inputs())
    for spec, code in zip(built.plan.stages, built.codes, strict=True):
        kept: list[Any] = []

        def save(x: Tensor, kept: list[Any] = kept) -> Tensor:
            kept.append(weakref.ref(x.untyped_storage()))
            return x.detach()

        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            values = built.stage(spec.index, received, Randomness(0))
        ends = [x for n in (*code.sends, *code.head_inputs, *received) if isinstance(x := values[n], Tensor)]
        storages = [*(ref() for ref in kept), *(x.untyped_storage() for x in ends)]
        sizes = {storage._cdata: storage.nbytes() for storage in storages if storage is not None}
        for owned in (*code.body.parameters(), *code.body.buffers()):
            sizes.pop(owned.untyped_storage()._cdata, None)
        assert spec.activation_bytes == sum(sizes.values()), f"stage {spec.index} of {built.plan}"
        received = {n: v.detach() if isinstance(v := values[n], Tensor) else v for n in code.sends}


@pytest.mark.slow
@SWEEP
@given(programs(without=("lstm",)), st.integers(1, 4))
def test_activations_are_what_autograd_saves(program: Program, n_stages: int) -> None:
    check_activations(program, n_stages)


@pytest.mark.slow
@SLOW
@given(programs(without=("lstm",)), st.integers(1, 6))
def test_activations_are_what_autograd_saves_for_many(program: Program, n_stages: int) -> None:
    check_activations(program, n_stages)


class Replay:
    """One stage's forward and backward, memory by memory: what the walk must say, by definition."""

    def __init__(self, graph: Graph, start: int, stop: int, sent: set[str], read: set[str]) -> None:
        self.nodes = graph.operations[start:stop]
        self.measures = graph.measures
        self.prints: dict[str, Footprint] = {name: footprint_of(m) for name, m in graph.measures.items()}
        self.graph, self.start, self.stop, self.sent, self.read = graph, start, stop, sent, read
        self.positions = {node: position for position, node in enumerate(graph.operations)}
        self.born = {s: (p, size) for p, n in self._placed() for s, size in self.prints[n.name].born}
        self.born |= self._born_again()
        self.held = {s for name in sent for s in graph.measures[name].storages} & set(self.born)
        self.saved = {
            s: [p for p, n in self._placed() if s in self.prints[n.name].saved and self._has_backward(n)]
            for s in self.born
        }

    def _born_again(self) -> dict[int, tuple[int, int]]:
        """Of what was computed before the stage and is not sent: where the stage computes it, and its size."""
        found = {}
        for node in self.graph.operations[: self.start]:
            for storage, size in self.prints[node.name].born if self.measures[node.name].recomputed else ():
                users = [user for n in self._holders(storage) for user in n.users]
                at = [min(self.positions.get(user, 2**60), len(self.positions) - 1) for user in users]
                inside = [use for use in at if self.start <= use < self.stop]
                found |= {storage: (min(inside), size)} if inside else {}
        return found

    def _holders(self, storage: int) -> list[fx.Node]:
        return [n for n in self.graph.operations if storage in self.measures[n.name].storages]

    def _uses(self, node: fx.Node, again: bool = False) -> list[int]:
        """Where a value is read; of one that crosses, or with `again`, also where what is made of it again is read."""
        found = [self.positions.get(user, 2**60) for user in node.users]
        if again or not self.measures[node.name].recomputed:
            users = [user for user in node.users if user in self.positions and self.measures[user.name].recomputed]
            found += [use for user in users for use in self._uses(user, again=True)]
        return found

    def _placed(self) -> list[tuple[int, fx.Node]]:
        return list(enumerate(self.nodes, self.start))

    def _has_backward(self, node: fx.Node) -> bool:
        measure = self.measures[node.name]
        return measure.gradient_since is not None and measure.in_loss and measure.depends >= self.start

    def _working(self, node: fx.Node) -> int:
        return sum(size for threshold, size in self.prints[node.name].backward_bytes if threshold >= self.start)

    def weights(self, behind: int) -> int:
        """Gradients of the parameters whose last use lies behind a position."""
        total = 0
        for name, uses in self.graph.parameter_uses().items():
            if uses and self.start <= min(uses) < self.stop and max(uses) > behind:
                node = next(n for n in self.graph.train.graph.find_nodes(op="get_attr") if n.target == name)
                value = attribute(self.graph.train, node)
                total += value.numel() * value.element_size()
        return total

    def forward(self, saving: bool = True) -> int:
        return max(self._forward(p, saving) + self.prints[n.name].forward_bytes for p, n in self._placed())

    def _forward(self, now: int, saving: bool) -> int:
        """Memory that is needed at a position, or later, or by the backward."""
        total = 0
        for storage, (birth, size) in self.born.items():
            needed = any(use >= now for n in self._holders(storage) for use in self._uses(n)) or birth == now
            saved = saving and (self.saved[storage] or self._saved_later(storage))
            total += size if birth <= now and (needed or saved) else 0
        return total

    def _saved_later(self, storage: int) -> bool:
        behind = self.graph.operations[self.stop :]
        return any(storage in self.prints[n.name].saved and self._has_backward(n) for n in behind)

    def backward(self) -> int:
        return max(self._saved(p) + self._waiting(p) + self._working(n) + self.weights(p) for p, n in self._placed())

    def _saved(self, now: int) -> int:
        return sum(size for s, (_, size) in self.born.items() if s in self.held or any(p <= now for p in self.saved[s]))

    def _waiting(self, now: int) -> int:
        """Gradients that come from behind a position for values from before it, and those of the head, which stay."""
        total = 0
        for birth, node in self._placed():
            value = self.measures[node.name].value
            if value is None or not self._has_backward(node):
                continue
            users = [u for u in node.users if u in self.positions and self._has_backward(u)]
            uses = [self.positions[user] for user in users if self.positions[user] < self.stop]
            waits = birth < now and (node.name in self.read or any(use > now for use in uses))
            stays = node.name in self.read and now < max([birth, *(use + 1 for use in uses)])
            total += value.num_bytes * (waits + stays)
        return total


class Unshared(MemoryWalk):
    """Every gradient in memory of its own."""

    def _operands(self, position: int) -> list[int]:
        return []


def check_walk(graph: Graph) -> None:
    """Every pair of cuts."""
    legal = [candidate for candidate in find_cuts(graph) if candidate.cut is not None]
    with mock.patch.object(Crossing, "_parts", lambda crossing, position: []):
        walk = Unshared(Lifetimes(graph), legal)
        crossing, last = walk.crossing, len(legal)
        for begin, start in enumerate(crossing.starts):
            stages = walk.stages(begin, begin, last)
            kept, copies = crossing.received(begin), crossing.copies(begin, last).tolist()
            for end in range(begin, last + 1):
                replay = replayed(graph, legal, start, end)
                found = int(stages.forward[end - begin]), int(stages.backward[end - begin]) - copies[end - begin]
                assert found == (kept + replay.forward(), kept + replay.backward()), f"{start} to {crossing.ends[end]}"
                again = int(stages.passing[end - begin]) - crossing.overwritten(begin)
                assert again == kept + replay.forward(saving=False), f"{start} to {crossing.ends[end]}, saving nothing"
                assert same(walk.stages(begin, end, end), stages, end - begin), "one alone or among others"


def replayed(graph: Graph, legal: Sequence[Candidate], start: int, end: int) -> Replay:
    """The stage from a position to end number `end`."""
    if end == len(legal):
        outputs = {leaf.name for leaf in graph.outputs if isinstance(leaf, fx.Node)}
        return Replay(graph, start, len(graph.operations), outputs, outputs)
    crossing = {spec.name for spec in legal[end].cut.crossing}
    return Replay(graph, start, legal[end].position + 1, crossing, set(legal[end].features(start)))


def same(alone: StageMemory, among: StageMemory, index: int) -> bool:
    names = [field.name for field in dataclasses.fields(StageMemory)]
    return all(getattr(alone, name).tolist() == [int(getattr(among, name)[index])] for name in names)


class Branches(nn.Module):
    """Values that wait for one another and cross together, parameters that stand twice, one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.wide, self.last = nn.Linear(24, 8), nn.Linear(16, 3)
        self.layers[1].weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.layers[0](x).tanh()
        b = self.layers[1](a).relu() * a
        c = self.layers[2](b).sigmoid()
        d = self.wide(torch.cat([a, b, self.layers[3](c).relu_()], 1))
        e = self.layers[4](self.layers[4](d).tanh()) * c
        y: Tensor = self.last(torch.cat([e.exp(), d], 1))
        return y


def test_memory_is_what_a_replay_of_every_stage_gives() -> None:
    check_walk(annotate(capture(Branches(), torch.randn(6, 8))))


@SWEEP
@given(programs(without=("lstm",)))
def test_memory_is_what_a_replay_of_every_stage_gives_for_any(program: Program) -> None:
    check_walk(annotate(capture(program.model(), program.inputs())))


def test_the_limit_counts_what_the_plan_prints() -> None:
    """One number: a stage that the plan prints with m bytes is allowed at m, and not at one byte less."""
    graph = annotate(capture(resnet(), torch.randn(8, 3, 16, 16)))
    legal = [candidate for candidate in find_cuts(graph) if candidate.cut is not None]
    costs = StageCosts(graph, legal)
    for cut in range(len(legal)):
        for begin, end, spec in zip((0, cut + 1), (cut, len(legal)), costs.plan([cut], [SMALL]).stages, strict=True):
            assert int(costs.needs(spec.index, [SMALL], begin, (end, end))) == spec.memory_bytes


def test_a_stage_is_allowed_at_what_it_takes_and_at_no_byte_less() -> None:
    graph = annotate(capture(resnet(), torch.randn(8, 3, 16, 16)))
    candidates = find_cuts(graph)
    places = [candidate.node for candidate in candidates if candidate.cut is not None]
    for place in places[:: len(places) // 4]:
        plan = choose_cuts(graph, candidates, 2, [SMALL], cut_at=[place])
        most = max(stage.memory_bytes for stage in plan.stages)
        assert choose_cuts(graph, candidates, 2, [SMALL], cut_at=[place], memory_limit=most) == plan
        with pytest.raises(PartitionError, match=f"memory_limit={most - 1} bytes"):
            choose_cuts(graph, candidates, 2, [SMALL], cut_at=[place], memory_limit=most - 1)


def test_dropout_keeps_one_byte_per_element() -> None:
    """It kept a mask of floats: as much again as the value that it masks."""
    x, kept = torch.randn(50, 40, requires_grad=True), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        Randomness(0).dropout(x, 0.3, "dropout")
    assert sum(t.untyped_storage().nbytes() for t in kept) == x.numel()


def test_memory_that_is_saved_twice_counts_once() -> None:
    """The ReLU's result is saved by itself and by the layer behind it; so is what both branches read."""
    built = build(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(4, 8), 1)
    assert built.plan.stages[0].activation_bytes == 4 * (4 * 8 + 4 * 16 + 4 * 3), "the input, the ReLU's, the output"


def test_frozen_weights_have_neither_gradient_nor_state() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 3, bias=False))
    model[0].requires_grad_(False)
    stage = build(model, torch.randn(2, 64), 1).plan.stages[0]
    assert (stage.frozen_bytes, stage.parameter_bytes) == (4 * 64 * 64, 4 * 64 * 3)
    assert stage.optimizer_bytes == 2 * stage.parameter_bytes
    assert stage.memory_bytes < stage.frozen_bytes + 8 * stage.parameter_bytes
