"""Messages between processes: a small header, a description where it is new, and the bytes of the tensors.

header       kind, batch, stage, micro-batch, rows, count, slot of the description, its length or 0
description  the values with a layout in place of every tensor; the same from batch to batch, so it is sent once and
             again only when something changes: the smaller last batch, another sequence length
payload      each tensor's memory as it lies there, so that the other side computes the same to the last bit
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autodecouple.errors import InputError

KINDS = ("activations", "signal", "gradient", "sync", "end", "result", "state", "failure")
NUM_FIELDS = 8
"""Numbers in a header."""
SLOTS = 64
"""Descriptions that both sides remember; with more than that in turn, the oldest is sent again."""
ALIGNMENT = 64
"""Bytes, to a multiple of which torch aligns memory on a CPU."""
SPARSE = 4
"""A tensor whose memory spans more than this many times its elements is packed tight instead of sent as it lies."""


@dataclass(frozen=True)
class Message:
    """Values on their way to another lane.

    kind, stage, micro_batch: which value, as in a job's parcels; batch: its number; rows, count: of the batch, and its
    micro-batches; values: tensors in any nested structure, and whatever else can be pickled; events: after which those
    on devices are complete
    """

    kind: str
    batch: int
    stage: int = 0
    micro_batch: int | None = None
    rows: int = 0
    count: int = 1
    values: Any = None
    events: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A tensor without its elements, which lie within `num_bytes` of memory.

    shift: bytes from a multiple of 64 to their beginning; where it is another, kernels that load many elements at once
           add them up in another order
    device: the type of where they lie
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    shift: int
    num_bytes: int
    device: str = "cpu"

    @property
    def room(self) -> int:
        """Bytes to set aside, from a multiple of 64 on."""
        return self.shift + self.num_bytes if self.num_bytes else 0

    def over(self, room: torch.Tensor) -> torch.Tensor:
        """The tensor in the room set aside for it."""
        memory = room[self.shift :]
        tensor = torch.empty(0, dtype=self.dtype, device=room.device)
        offset = memory.storage_offset() // tensor.element_size()
        return tensor.set_(memory.untyped_storage(), offset, self.shape, self.stride)


@dataclass(frozen=True)
class Packed:
    """A message ready to be sent: `description` is empty where the other side knows it."""

    header: tuple[int, ...]
    description: bytes
    layouts: Sequence[Layout]
    payload: Sequence[torch.Tensor]


class Encoder:
    """The sending side of one connection."""

    def __init__(self) -> None:
        self._slots: dict[bytes, int] = {}

    def encode(self, message: Message) -> Packed:
        """Raises InputError for values that cannot leave their process."""
        payload: list[torch.Tensor] = []
        described = pytree.tree_map_only(torch.Tensor, lambda tensor: _spread(tensor, payload), message.values)
        try:
            description = pickle.dumps(described)
        except Exception as error:
            raise InputError(
                f"batch {message.batch} cannot be sent to another process: {error}. Give tensors, numbers, strings and"
                " lists or dicts of them"
            ) from error
        slot, known = self._slot(description)
        sliced = -1 if message.micro_batch is None else message.micro_batch
        fields = (KINDS.index(message.kind), message.batch, message.stage, sliced, message.rows, message.count)
        header = (*fields, slot, 0 if known else len(description))
        return Packed(header, b"" if known else description, layouts_in(described), payload)

    def _slot(self, description: bytes) -> tuple[int, bool]:
        if description in self._slots:
            return self._slots[description], True
        slot = len(self._slots)
        if slot == SLOTS:
            oldest = next(iter(self._slots))
            slot = self._slots.pop(oldest)
        self._slots[description] = slot
        return slot, False


class Decoder:
    """The receiving side of one connection: `layouts` says what to receive, `decode` makes the message of it."""

    def __init__(self) -> None:
        self._slots: dict[int, Any] = {}

    def learn(self, header: Sequence[int], description: bytes) -> None:
        self._slots[header[6]] = pickle.loads(description)

    def layouts(self, header: Sequence[int]) -> list[Layout]:
        return layouts_in(self._slots[header[6]])

    def decode(self, header: Sequence[int], rooms: Iterator[torch.Tensor]) -> Message:
        values = pytree.tree_map_only(Layout, lambda layout: layout.over(next(rooms)), self._slots[header[6]])
        kind, batch, stage, sliced, rows, count = header[:6]
        return Message(KINDS[kind], batch, stage, None if sliced < 0 else sliced, rows, count, values)


def _spread(tensor: torch.Tensor, payload: list[torch.Tensor]) -> Layout:
    """The tensor's layout; its memory goes to the payload."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if _span(tensor) > SPARSE * max(1, tensor.numel()):
        tensor = tensor.contiguous()
    size = tensor.element_size()
    num_bytes = _span(tensor) * size
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    memory.set_(tensor.untyped_storage(), tensor.storage_offset() * size, (num_bytes,), (1,))
    payload.append(memory)
    shift = tensor.data_ptr() % ALIGNMENT
    return Layout(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, shift, num_bytes, tensor.device.type)


def layouts_in(described: Any) -> list[Layout]:
    return [leaf for leaf in pytree.tree_leaves(described) if isinstance(leaf, Layout)]


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last that the tensor uses."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
