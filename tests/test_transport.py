"""Values from lane to lane: in order, alive while they are read, and unchanged.

Without a GPU the streams and events of torch.cuda are replaced by ones that write down what they are told; tensors stay
on the CPU. What only a device can show is at the end, marked `gpu`.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from training_tools import assert_same, compiled, delays, make_batches, make_model, sgd, train

import autodecouple
from autodecouple.errors import InputError
from autodecouple.executors import executor, streams, transport
from autodecouple.executors.transport import CpuQueue, CudaQueue, Queues, lend_to_caller, pack, pack_from_caller
from autodecouple.schedules import GPipe, Streaming
from autodecouple.stage import Stage

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@dataclass(eq=False)
class FakeStream:
    name: str
    log: list[tuple[str, Any]] = field(default_factory=list)

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(("wait", event))

    def wait_stream(self, stream: FakeStream) -> None:
        self.log.append(("wait stream", stream))

    def synchronize(self) -> None:
        self.log.append(("synchronize", None))


@dataclass(eq=False)
class FakeEvent:
    """Done once it was waited for, or when a test says so."""

    enable_timing: bool = False
    done: bool = False
    stream: FakeStream | None = None
    waited: int = 0

    def record(self, stream: FakeStream) -> None:
        self.stream = stream
        stream.log.append(("record", self))

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.waited += 1
        self.done = True

    def elapsed_time(self, other: FakeEvent) -> float:
        return 5.0


class FakeCuda:
    """The parts of torch.cuda that hand values over, with one caller's stream per device."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.made: list[FakeStream] = []
        self.callers: dict[torch.device, FakeStream] = {}
        self.entered = threading.local()
        patch.setattr(torch.cuda, "Stream", self._stream)
        patch.setattr(torch.cuda, "Event", FakeEvent)
        patch.setattr(torch.cuda, "current_stream", self.current)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "stream", self._enter)

    def _stream(self, device: torch.device) -> FakeStream:
        self.made.append(FakeStream(f"stream {len(self.made)}"))
        return self.made[-1]

    def current(self, device: torch.device) -> FakeStream:
        return self.callers.setdefault(device, FakeStream(f"caller of {device}"))

    @contextlib.contextmanager
    def _enter(self, stream: FakeStream) -> Iterator[None]:
        self.entered.stream = stream
        yield
        self.entered.stream = None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def make_queue(num_ahead: int = 8) -> CudaQueue:
    """A queue whose values stay on the CPU."""
    return CudaQueue(CPU, num_ahead)


def log_of(queue: CudaQueue) -> list[tuple[str, Any]]:
    assert isinstance(queue.stream, FakeStream)
    return queue.stream.log


# ---------------------------------------------------------------- order


def test_a_reader_waits_for_the_writer(cuda: FakeCuda) -> None:
    """The writer's event is recorded behind its work; the reader's stream waits for it before anything else."""
    writer, reader = make_queue(), make_queue()
    with writer.entered():
        parcel = writer.send({"h": torch.ones(2)})
    (event,) = parcel.events
    assert event.stream is writer.stream
    with reader.entered():
        values = reader.receive(parcel)
    assert torch.equal(values["h"], torch.ones(2))
    kinds = log_of(reader)[2:]  # after the start of the clock
    assert kinds[0] == ("wait", event) and kinds[1][0] == "record"
    assert event.waited == 0  # the host waits for nobody


def test_all_tensors_of_a_parcel_are_waited_for_at_once(cuda: FakeCuda) -> None:
    """torchgpipe 0.0.3 waited for the first of a tuple only; here the event covers all that was queued."""
    writer, reader = make_queue(), make_queue()
    parcel = writer.send((torch.ones(1), {"a": torch.ones(2), "n": 3}))
    received = reader.receive(parcel)
    assert len(parcel.events) == 1 and len(parcel.versions) == 2
    assert received[1]["n"] == 3


def test_a_new_stream_waits_for_the_parameters(cuda: FakeCuda) -> None:
    """They were made, and perhaps are still being copied, on the caller's stream."""
    queue = make_queue()
    assert log_of(queue)[0] == ("wait stream", cuda.current(CPU))


def test_a_processor_waits_for_a_gpu(cuda: FakeCuda) -> None:
    """A copy to the CPU must find complete values: there the host has to wait."""
    parcel = make_queue().send(torch.ones(2))
    CpuQueue(CPU).receive(parcel)
    assert parcel.events[0].waited == 1  # type: ignore[attr-defined]


def test_a_batch_waits_for_what_the_caller_has_queued(cuda: FakeCuda) -> None:
    """On every device of the pipeline, also where the batch itself is on the CPU: an evaluation queued just before may
    still be reading the weights that this batch will change."""
    other = torch.device("cuda", 1)
    parcel = pack_from_caller(torch.ones(2), {GPU, other, CPU})
    assert {event.stream for event in parcel.events} == {cuda.current(GPU), cuda.current(other)}  # type: ignore[attr-defined]
    assert pack_from_caller(torch.ones(2), {CPU}).events == ()


def test_outputs_are_lent_to_the_caller_s_stream(cuda: FakeCuda) -> None:
    """The allocator gives memory back to the stream it came from as soon as nobody holds it, though the caller's own
    stream may be half way through reading."""

    class OnGpu(Tensor):
        lent: Any = None

        @property
        def is_cuda(self) -> bool:  # type: ignore[override]
            return True

        def record_stream(self, stream: Any) -> None:
            self.lent = stream

    output = {"logits": torch.ones(2).as_subclass(OnGpu), "n": 1}
    assert lend_to_caller(output) is output
    assert output["logits"].lent is cuda.current(CPU)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- life


def test_what_is_read_lives_until_the_device_has_read_it(cuda: FakeCuda) -> None:
    """The sender forgets it at once; freed any earlier, its memory would be filled anew while it is read."""
    writer, reader = make_queue(), make_queue()
    sent = torch.ones(4)
    gone = weakref.ref(sent)
    parcel = writer.send([sent])
    with reader.entered():
        reader.receive(parcel)
    del sent, parcel
    gc.collect()
    assert gone() is not None
    event = log_of(reader)[-1][1]
    with reader.entered():
        pass
    assert gone() is not None  # the event is not over
    event.done = True
    with reader.entered():
        pass
    gc.collect()
    assert gone() is None


def test_what_an_error_interrupts_is_kept_as_well(cuda: FakeCuda) -> None:
    """The kernels that were queued before it will still read."""
    writer, reader = make_queue(), make_queue()
    sent = torch.ones(4)
    gone = weakref.ref(sent)
    with contextlib.suppress(ValueError), reader.entered():
        reader.receive(writer.send([sent]))
        raise ValueError
    del sent
    gc.collect()
    assert gone() is not None
    with reader.entered():
        pass
    log_of(reader)[-1][1].done = True
    with reader.entered():
        pass
    gc.collect()
    assert gone() is None


def test_the_host_runs_ahead_of_the_device_by_a_bounded_amount(cuda: FakeCuda) -> None:
    """With a device that never finishes, at most `num_ahead` readings are kept: then the host waits for the oldest."""
    writer, reader = make_queue(), make_queue(num_ahead=2)
    alive = []
    for number in range(6):
        sent = torch.full((4,), float(number))
        alive.append(weakref.ref(sent))
        with reader.entered():
            reader.receive(writer.send([sent]))
        del sent
        gc.collect()
        assert sum(ref() is not None for ref in alive) == min(number + 1, 2)
    events = [event for kind, event in log_of(reader)[2:] if kind == "record"]
    assert [event.waited for event in events] == [1, 1, 1, 1, 0, 0]  # in order, and no more than needed


def test_draining_frees_everything(cuda: FakeCuda) -> None:
    reader = make_queue()
    sent = torch.ones(4)
    gone = weakref.ref(sent)
    with reader.entered():
        reader.receive(pack([sent]))
    del sent
    reader.synchronize()
    gc.collect()
    assert gone() is None and log_of(reader)[-1] == ("synchronize", None)


def test_a_clock_counts_from_the_host_s_start(cuda: FakeCuda) -> None:
    """Spans of several devices stand on one axis."""
    queue = make_queue()
    mark = queue.mark()
    assert queue.seconds(mark) == pytest.approx(queue._host_start + 0.005)
    assert mark.waited == 1  # type: ignore[attr-defined]


# ---------------------------------------------------------------- a whole run on recorders


def record_lanes(patch: pytest.MonkeyPatch) -> None:
    """Let the lanes of new pipelines have recording streams, over tensors on the CPU."""

    def make_queues(stages: list[Stage]) -> Queues:
        return {CPU: make_queue()}

    patch.setattr(streams, "make_queues", make_queues)


@pytest.mark.parametrize(
    ("loss", "schedule"), [("supcon", Streaming(queue_depth=3)), ("bp", GPipe(num_micro_batches=2))]
)
def test_every_hand_over_of_a_run_is_ordered(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, loss: str, schedule: Any
) -> None:
    """Each lane waits for an event that was recorded before, on another lane's stream, whenever something arrives;
    and the arithmetic is that of the CPU."""
    record_lanes(monkeypatch)
    batches = make_batches("norm", [4] * 3)
    expected = train(compiled("norm", 3, loss, executor="inline", schedule=schedule, optimizer=sgd), batches)
    with delays(1):
        found = train(compiled("norm", 3, loss, schedule=schedule, optimizer=sgd), batches)
    assert_same(found.state, expected.state)
    assert_same(found.losses, expected.losses)
    lanes = cuda.made[:3]
    assert len(cuda.made) == 3  # made once, and kept
    for index, lane in enumerate(lanes):
        sources = [event.stream for kind, event in lane.log if kind == "wait"]
        forward = [source for source in sources if source is (lanes[index - 1] if index else None)]
        backward = [source for source in sources if source is (lanes[index + 1] if index < 2 else None)]
        slices = schedule.num_micro_batches
        assert len(forward) == (3 * slices if index else 0)
        assert len(backward) == (3 * slices if index < 2 and loss == "bp" else 0)


def _shares(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.data_ptr() == b.data_ptr()


def test_what_a_backward_reads_is_kept_until_it_is_done(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd drops the features that a first layer saved when the backward is *queued*. They came from another
    stream, which got their memory back while the backward was still to run."""
    record_lanes(monkeypatch)
    kept: list[Any] = []
    keep = CudaQueue.keep

    def remember(self: CudaQueue, values: Any) -> None:
        kept.append(values)
        keep(self, values)

    monkeypatch.setattr(CudaQueue, "keep", remember)
    received: list[dict[str, Any]] = []
    backward, forward = Stage.backward, Stage.forward
    seen_at_backward: list[bool] = []

    def forward_noting(self: Stage, work: Any, micro_batch: int, values: dict[str, Any], *rest: Any) -> Any:
        if self.index == 1:
            received.append(values)
        return forward(self, work, micro_batch, values, *rest)

    def backward_noting(self: Stage, work: Any, micro_batch: int, gradient: Any, **options: Any) -> Any:
        if self.index == 1:
            names = received[-1].keys()
            held = [values for values in kept if isinstance(values, dict) and names == values.keys()]
            same = [values for values in held if all(_shares(values[name], received[-1][name]) for name in names)]
            seen_at_backward.append(len(same) == 2)  # once for the forward, and again for the backward
        return backward(self, work, micro_batch, gradient, **options)

    monkeypatch.setattr(Stage, "forward", forward_noting)
    monkeypatch.setattr(Stage, "backward", backward_noting)
    train(compiled("norm", 2), make_batches("norm", [4] * 2))
    assert seen_at_backward == [True, True]


def test_a_batch_is_discarded_on_its_lane_s_own_stream(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers go back behind the kernels that changed them: on the default stream they would race with those."""
    record_lanes(monkeypatch)
    discard = Stage.discard
    found: list[Any] = []

    def noting(self: Stage, work: Any) -> None:
        found.append(getattr(cuda.entered, "stream", None))
        discard(self, work)

    monkeypatch.setattr(Stage, "discard", noting)

    def broken(output: Tensor, target: Tensor) -> Tensor:
        raise ValueError("boom")

    decoupled = compiled("norm", 2, criterion=broken)
    with pytest.raises(ValueError, match="boom"):
        decoupled.train_step(*make_batches("norm", [4])[0])
        decoupled.synchronize()
    decoupled.close()
    assert found and all(stream in cuda.made for stream in found)


# ---------------------------------------------------------------- unchanged


def test_a_parcel_notices_what_was_written_into_it() -> None:
    """Through views, too, for they share their count; a new tensor, or a read, changes nothing."""
    x = torch.ones(4)
    parcel = pack({"x": x, "half": x[:2], "n": 3})
    x + 1
    transport.check_unchanged(parcel)
    x[3] = 7
    with pytest.raises(InputError, match="changed in place before a stage had read it"):
        transport.check_unchanged(parcel)


def test_an_inference_tensor_can_be_sent() -> None:
    """It counts no versions: data made under inference_mode must not be refused for that."""
    with torch.inference_mode():
        x = torch.ones(4)
    transport.check_unchanged(pack(x))


# ---------------------------------------------------------------- on devices

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs are visible")


@contextlib.contextmanager
def device_delays(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that keep a stream busy before every action, so that whoever does not wait reads too early."""
    perform = executor.Job.perform

    def late(job: Any, action: Any, stage: Stage, queue: Any) -> None:
        with queue.entered():
            torch.cuda._sleep(2_000_000 * ((action.stage + job.index) % 3))
        perform(job, action, stage, queue)

    patch.setattr(executor.Job, "perform", late)
    yield
    patch.undo()


def check_on_devices(devices: list[str], patch: pytest.MonkeyPatch) -> None:
    """Streaming on GPUs under delays against the same stages one after the other on one GPU."""

    def run(where: list[str], how: str) -> Any:
        model = make_model("norm").to(where[0])
        batches = make_batches("norm", [8] * 12)
        decoupled = autodecouple.compile(model, len(devices), devices=where, executor=how, optimizer=sgd)
        with decoupled:
            steps = [decoupled.train_step(x.to(where[0]), y.to(where[0])) for x, y in batches]
            return [step.losses for step in steps], decoupled.to("cpu").state_dict()["model"]

    expected = run([devices[0]] * len(devices), "inline")
    with device_delays(patch):
        found = run(devices, "streams")
    for a, b in zip(found[0], expected[0], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_streams_of_one_gpu_equal_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    check_on_devices(["cuda:0"] * 3, monkeypatch)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_and_the_processor_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    check_on_devices(["cuda:0", "cpu"], monkeypatch)


@pytest.mark.multigpu
@needs_two
def test_two_gpus_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    check_on_devices(["cuda:0", "cuda:1"], monkeypatch)


@pytest.mark.gpu
@needs_gpu
def test_memory_does_not_grow_with_the_batches() -> None:
    """Streams are made once, and what they have read is freed: reserved memory is flat after the first batches."""
    decoupled = autodecouple.compile(make_model("norm").cuda(), 3, devices=["cuda:0"] * 3)
    x, y = (value.cuda() for value in make_batches("norm", [64])[0])
    with decoupled:
        reserved = []
        for _ in range(3):
            for _ in range(30):
                decoupled.train_step(x, y)
            decoupled.synchronize()
            reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] == reserved[1]
