"""Values that go to another process arrive as they were, with their memory's layout; shared memory lives as long as it
is read."""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import pickle
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autodecouple.errors import InputError
from autodecouple.executors.executor import Programs
from autodecouple.executors.lane import neighbours, pairs
from autodecouple.executors.memory import borrow, share
from autodecouple.executors.pipes import PipeReceiver, PipeSender
from autodecouple.executors.wire import ALIGNMENT, SLOTS, Decoder, Encoder, Message, Packed
from autodecouple.plans import Cut, Plan, StageSpec, TensorSpec
from autodecouple.schedules import Streaming

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any dtype, dense or not: permuted, sliced, expanded, shifted against their memory, or empty."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    tensor = torch.arange(max(1, torch.Size(shape).numel()) + 7).to(draw(st.sampled_from(DTYPES)))
    tensor = tensor[draw(st.integers(0, 7)) :][: torch.Size(shape).numel()].reshape(shape)
    if shape:
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
        tensor = tensor[draw(st.integers(0, 1)) :: draw(st.integers(1, 3))]
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor.conj() if tensor.is_complex() and draw(st.booleans()) else tensor


def through(decoder: Decoder, packed: Packed) -> Message:
    """As the two sides of a connection do it, with memory of 64 bytes' alignment."""
    header = list(packed.header)
    if header[-1]:
        decoder.learn(header, packed.description)
    rooms = [torch.zeros(layout.room, dtype=torch.uint8) for layout in decoder.layouts(header)]
    for room, layout, memory in zip(rooms, decoder.layouts(header), packed.payload, strict=True):
        room[layout.shift :].copy_(memory)
    return decoder.decode(header, iter(rooms))


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)


@given(st.recursive(tensors() | st.integers() | st.none() | st.text(max_size=3), nested, max_leaves=5))
def test_values_arrive_as_they_were(values: Any) -> None:
    message = Message("activations", 7, 2, 1, 8, 3, values)
    found = through(Decoder(), Encoder().encode(message))
    assert (found.kind, found.batch, found.stage, found.micro_batch) == ("activations", 7, 2, 1)
    assert (found.rows, found.count) == (8, 3)
    same(found.values, values)


def same(a: Any, b: Any) -> None:
    if isinstance(b, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
        dense = sum((n - 1) * s for n, s in zip(b.shape, b.stride(), strict=True)) < 4 * max(1, b.numel())
        if dense and b.numel() and not b.is_conj():  # a kernel adds up in an order that depends on both
            assert a.stride() == b.stride() and (a.data_ptr() - b.data_ptr()) % ALIGNMENT == 0
    elif isinstance(b, (list, dict)):
        assert len(a) == len(b)
        for key in b if isinstance(b, dict) else range(len(b)):
            same(a[key], b[key])
    else:
        assert a == b


def test_a_description_is_sent_once_and_again_when_something_changes() -> None:
    encoder, decoder = Encoder(), Decoder()
    lengths = []
    for rows in (8, 8, 3, 8, 3, 5):
        x = torch.randn(rows, 2)
        packed = encoder.encode(Message("activations", 0, values={"x": x}))
        lengths.append(len(packed.description) > 0)
        assert torch.equal(through(decoder, packed).values["x"], x)
    assert lengths == [True, False, True, False, False, True]


def test_more_descriptions_than_slots() -> None:
    """Sentences of any length: the table is bounded, and stays the same on both sides."""
    encoder, decoder = Encoder(), Decoder()
    for rows in [*range(1, 3 * SLOTS), *range(1, 9), 2 * SLOTS]:
        x = torch.randn(rows)
        assert torch.equal(through(decoder, encoder.encode(Message("signal", 0, values=x))).values, x)


def test_what_cannot_be_sent() -> None:
    with pytest.raises(InputError, match="batch 4 cannot be sent to another process"):
        Encoder().encode(Message("activations", 4, values={"x": threading.Lock()}))


# ---------------------------------------------------------------- memory


def test_shared_tensors_stay_what_they_were() -> None:
    """Objects, values, strides, ties and views within a module; a tensor can still be saved without all others."""
    layer = nn.Linear(3, 5)
    layer.register_buffer("view", layer.weight.data[1:3].t())
    layer.register_buffer("last", torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last))
    layer.register_buffer("empty", torch.empty(0))
    tied = nn.Linear(3, 5)
    tied.weight = layer.weight
    modules = nn.ModuleList([layer, tied])
    tensors = [*modules.parameters(), *modules.buffers()]
    before = [(id(t), t.detach().clone(), t.stride(), t.data_ptr() % ALIGNMENT) for t in tensors]
    share(tensors)
    for tensor, (name, value, stride, shift) in zip(tensors, before, strict=True):
        assert id(tensor) == name and torch.equal(tensor, value) and tensor.stride() == stride
        assert not tensor.numel() or tensor.data_ptr() % ALIGNMENT == shift
    layer.view.fill_(7.0)  # type: ignore[operator]
    assert torch.equal(layer.weight[1:3], torch.full((2, 3), 7.0)) and tied.weight is layer.weight
    assert len(pickle.dumps(tied.bias)) < 2000


def test_lent_memory_comes_back_with_its_last_reader() -> None:
    released: list[str] = []
    memory = borrow(mmap.mmap(-1, 4096), 1024, lambda: released.append("now"))
    weight = torch.randn(256, 2, requires_grad=True)
    part = memory.view(torch.float32)[:256].detach()
    del memory
    loss = (part @ weight).sum()
    del part
    gc.collect()
    assert released == []  # the graph has saved it
    loss.backward()
    gc.collect()
    assert released == ["now"]


def pipe(depth: int = 2) -> tuple[PipeSender, PipeReceiver]:
    writing, reading = multiprocessing.Pipe()
    return PipeSender(1, writing, depth), PipeReceiver(0, reading)


def test_slots_are_used_again_and_never_while_they_are_read() -> None:
    """A head may keep a batch's labels for as long as it likes."""
    sender, receiver = pipe()
    kept, expected, addresses = [], [], set()
    for batch in range(40):
        x = torch.randn(1 + batch % 7, 3)
        sender.send(Message("activations", batch, values={"x": x, "n": batch}))
        found = receiver.receive().values
        assert found["n"] == batch and torch.equal(found["x"], x)
        addresses.add(found["x"].data_ptr())
        if batch % 10 == 0:
            kept.append(found["x"])
            expected.append(x)
        del found
        receiver.done(batch)
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
    assert len(addresses) < 20
    sender.close()
    receiver.close()


def test_a_sender_waits_for_room() -> None:
    sender, receiver = pipe(depth=1)
    sent: list[int] = []

    def send() -> None:
        for batch in range(5):
            sender.send(Message("activations", batch, values=torch.ones(3)))
            sent.append(batch)

    thread = threading.Thread(target=send)
    thread.start()
    for batch in range(5):
        assert receiver.receive().batch == batch
        assert len(sent) <= batch + 2
        receiver.done(batch)
    thread.join(10)
    assert sent == list(range(5))
    sender.close()
    receiver.close()


# ---------------------------------------------------------------- routes


def test_lanes_are_linked_where_something_goes() -> None:
    """To the next lane and back; and from a head that encodes the signal to the lane with the next one that does."""
    x = TensorSpec("x", (8, 4), "float32")
    cuts = [Cut(f"n{i}", (x,), ("x",), ("x",), detached=i != 1, encodes=i != 1) for i in range(3)]
    stages = [StageSpec(i, (f"n{i}",), "o", lane=i) for i in range(4)]
    program = Programs(Plan(tuple(stages), tuple(cuts)), Streaming()).full
    near = {(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)}
    assert pairs(program) == near | {(0, 2)}  # stage 1 is coupled to 2 and has no head, stage 3 reads the target
    assert [neighbours(program, lane) for lane in range(4)] == [{1, 2}, {0, 2}, {0, 1, 3}, {2}]
