"""Tensors that lie on devices travel beside gloo: the same logic over groups on the CPU, and streams that are noted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from rank_tools import run_ranks
from training_tools import Encoding, assert_same, compiled, delays, make_batches, sgd, train

from autodecouple.executors import carriers, distributed
from autodecouple.executors.carriers import PairCarrier, can_use_nccl, pair_carrier
from autodecouple.executors.gloo import GlooLinks
from autodecouple.executors.lane import _ready
from autodecouple.executors.transport import pack
from autodecouple.executors.wire import Message
from autodecouple.executors.world import World

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")


@contextlib.contextmanager
def carried(sent: list[int]) -> Iterator[None]:
    """As on GPUs of their own, but over gloo: a group for each direction, which takes all tensors."""

    def over_gloo(world: World, peers: Sequence[int], device: torch.device) -> PairCarrier:
        return pair_carrier(world, peers, device, World.group)

    send = PairCarrier.send

    def counted(self: PairCarrier, lane: int, parts: Sequence[torch.Tensor], events: Sequence[Any]) -> Any:
        sent.append(len(parts))
        return send(self, lane, parts, events)

    with (
        mock.patch.object(distributed, "can_use_nccl", lambda world, device: True),
        mock.patch.object(distributed, "nccl_carrier", over_gloo),
        mock.patch.object(distributed, "nccl_group", World.group),
        mock.patch.object(PairCarrier, "send", counted),
    ):
        yield


CASES: dict[str, tuple[int, int, Any]] = {
    "a lane each": (3, 3, "early_exit"),
    "signals and gradients go far and back": (3, 4, [Encoding(), "bp", Encoding()]),
}


@pytest.mark.dist
@pytest.mark.parametrize(
    "case", ["signals and gradients go far and back", pytest.param("a lane each", marks=pytest.mark.slow)]
)
def test_a_carrier_brings_the_same(case: str) -> None:
    """To the last bit, with several in flight both ways, smaller batches between, and lanes that start late."""
    size, n_stages, loss = CASES[case]
    batches = make_batches("dropout", [8, 8, 3, 8, 5, 8, 8, 8])
    expected = train(compiled("dropout", n_stages, loss, executor="inline", optimizer=sgd), batches)

    def rank(number: int) -> Any:
        sent: list[int] = []
        with carried(sent), delays(number):
            decoupled = compiled("dropout", n_stages, loss, devices=None, executor="distributed", optimizer=sgd)
            own = batches if number == 0 else [(None, None)] * len(batches)
            return train(decoupled, own).state, sum(sent)  # type: ignore[arg-type]

    for outcome in run_ranks(size, rank):
        assert outcome.error is None and outcome.exit_code == 0, outcome.message
        assert_same(outcome.value[0], expected.state)
        assert outcome.value[1] > 0 or loss == "early_exit"  # the last lane has nobody to send to


@pytest.mark.dist
def test_an_error_ends_what_is_carried() -> None:
    compiled("norm", 2, executor="inline").close()

    def rank(number: int) -> Any:
        with carried([]):
            decoupled = compiled("norm", 2, "early_exit", devices=None, executor="distributed")
            for index, (x, y) in enumerate(make_batches("norm", [8] * 50)):
                if number == 1 and index == 3:
                    raise ValueError("boom")
                decoupled.train_step(x, y)

    outcomes = run_ranks(2, lambda number: _closing(rank, number))
    assert [outcome.error for outcome in outcomes] == ["PeerError", "ValueError"]
    assert "boom" in outcomes[0].message and outcomes[0].seconds < 30


def _closing(rank: Any, number: int) -> None:
    """A script that ends with its error."""
    import sys

    try:
        rank(number)
    except ValueError as error:
        sys.last_value = error
        distributed._end_all()
        raise


@pytest.mark.dist
def test_only_what_the_carrier_takes_goes_there() -> None:
    """What lies on the processor, labels say, goes through gloo, in the order of the values."""

    def rank(number: int) -> Any:
        world = World.current()
        sent: list[int] = []
        carrier = pair_carrier(world, [1 - number], CPU, World.group)
        carrier.takes = lambda kind: kind == "meta"  # type: ignore[method-assign]
        links = GlooLinks(world.group(), [1 - number], 2, carrier)
        links.send(1 - number, Message("activations", 0, values={"a": torch.ones(3), "b": torch.zeros(0)}))
        found = links.receive(1 - number)
        links.end(0)
        return found.values["a"].tolist(), found.events, sent

    for outcome in run_ranks(2, rank):
        assert outcome.value == ([1.0, 1.0, 1.0], (), [])


def part_together(world: World) -> None:
    """Rank 0 goes last: it takes the store with it, in which others may still be reading."""
    if world.rank:
        world.store.set(f"read {world.rank}", "")
    else:
        world.store.wait([f"read {rank}" for rank in range(1, world.size)])


@pytest.mark.dist
def test_without_a_gpu_for_each_process_gloo_takes_all() -> None:
    def one(number: int) -> Any:
        world = World.current()
        found = can_use_nccl(world, CPU)
        part_together(world)
        return found

    assert [outcome.value for outcome in run_ranks(2, one)] == [False, False]

    def two(number: int) -> Any:
        properties = mock.Mock(uuid="the same" if number < 2 else "another")
        with (
            mock.patch.object(carriers.dist, "is_nccl_available", lambda: True),
            mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties),
        ):
            world = World.current()
            found = can_use_nccl(world, torch.device("cuda:0"))
            part_together(world)
            return found

    assert [outcome.value for outcome in run_ranks(2, two)] == [False, False]
    assert [outcome.value for outcome in run_ranks(2, lambda number: two(number + 1))] == [True, True]


# ---------------------------------------------------------------- streams, noted


class Note:
    """Something with streams and events that notes what is done with it."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.device = log, name, torch.device("cuda:0")

    def wait_event(self, event: Note) -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    def record_event(self) -> Note:
        self.log.append(f"{self.name} records")
        return Note(self.log, "the end")

    def synchronize(self) -> None:
        self.log.append(f"the thread waits for {self.name}")

    def wait(self) -> None:
        self.log.append(f"{self.name} is behind")


class Group:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def send(self, parts: Sequence[Any], lane: int, tag: int) -> Note:
        self.log.append(f"send {parts[0].numel()} to {lane}")
        return Note(self.log, "what is sent")

    def recv(self, parts: Sequence[Any], lane: int, tag: int) -> Note:
        self.log.append(f"receive {parts[0].numel()} from {lane}")
        return Note(self.log, "what is received")


@contextlib.contextmanager
def noted(log: list[str]) -> Iterator[None]:
    @contextlib.contextmanager
    def within(what: Any) -> Iterator[None]:
        log.append(f"in {what.name if isinstance(what, Note) else what}")
        yield

    with (
        mock.patch.object(torch.cuda, "Stream", lambda device: Note(log, "the stream")),
        mock.patch.object(torch.cuda, "stream", within),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
    ):
        yield


def test_on_a_gpu_no_thread_waits_before_it_has_to() -> None:
    """What is sent waits, on a stream of its own, for the lane's event; what is received comes with one."""
    log: list[str] = []
    with noted(log):
        carrier = PairCarrier({1: Group(log)}, {1: Group(log)}, torch.device("cuda:0"))
        assert carrier.takes("cuda") and not carrier.takes("cpu")
        landing = carrier.send(1, [torch.ones(3)], [Note(log, "the lane")])
        assert log == [
            "in the stream", "the stream waits for the lane", "send 3 to 1", "what is sent is behind",
            "the stream records",
        ]  # fmt: skip
        log.clear()
        landing.wait()
        assert log == ["the thread waits for the end"]
        log.clear()
        (event,) = carrier.receive(1, lambda: [torch.ones(2), torch.ones(0)])
        assert event.name == "the end"
        assert log == ["in the stream", "receive 2 from 0", "what is received is behind", "the stream records"]


def test_values_stay_on_a_device_that_the_links_take() -> None:
    """Those behind events without a wait, others complete on the CPU; the caller's own are copied either way."""
    log: list[str] = []
    mine, other = torch.ones(2), torch.ones(3)
    parcel = pack({"mine": mine, "other": other}, Note(log, "the lane"))  # type: ignore[arg-type]
    lent = frozenset({mine.untyped_storage().data_ptr()})
    kept = _ready(parcel, lent, lambda kind: True)
    assert not log and len(kept.events) == 1
    assert kept.values["other"] is other and kept.values["mine"] is not mine
    moved = _ready(parcel, lent, lambda kind: False)
    assert log == ["the thread waits for the lane"] and moved.events == ()
    assert moved.values["other"] is other and torch.equal(moved.values["mine"], mine)
