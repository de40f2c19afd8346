"""Memory that several processes see: of a model's tensors, and of values on their way from lane to lane."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from autodecouple.executors.wire import ALIGNMENT


def share(tensors: Iterable[torch.Tensor]) -> None:
    """Move tensors to memory that processes forked from here on share; they stay the same objects.

    Anonymous memory instead of torch's `share_memory_()`, which takes files in /dev/shm: containers allow few there.
    """
    by_storage: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.numel():
            by_storage[tensor.untyped_storage().data_ptr()].append(tensor)
    groups = list(by_storage.values())
    if not groups:
        return
    storages = [group[0].untyped_storage() for group in groups]
    shifts = [storage.data_ptr() % ALIGNMENT for storage in storages]
    *offsets, total = offsets_of([shift + old.nbytes() for shift, old in zip(shifts, storages, strict=True)])
    memory = mmap.mmap(-1, total)
    for group, old, shift, offset in zip(groups, storages, shifts, offsets, strict=True):
        new = torch.frombuffer(memory, dtype=torch.uint8, offset=offset + shift, count=old.nbytes())
        storage = new.untyped_storage()
        storage.copy_(old)
        for tensor in group:
            moved = torch.empty(0, dtype=tensor.dtype)
            tensor.data = moved.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def offsets_of(sizes: Sequence[int]) -> list[int]:
    """Where parts of these sizes begin, one after the other and aligned; and the end of the last."""
    padded = (-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    return list(itertools.accumulate(padded, initial=0))


def make_file(num_bytes: int) -> int:
    """The descriptor of a file that lives in memory only, for two processes to map."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("autodecouple")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def parts_of(memory: torch.Tensor, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
    """Parts of these sizes, where `offsets_of` puts them; the memory begins at a page."""
    return (memory[offset : offset + size] for offset, size in zip(offsets_of(sizes), sizes, strict=False))


def borrow(mapped: mmap.mmap, num_bytes: int, released: Callable[[], Any]) -> torch.Tensor:
    """The first bytes of mapped memory; `released` is called when no tensor on them is left, anywhere.

    A tensor's storage holds what it was made from, here an object of its own for each time the memory is lent.
    """
    lease = (ctypes.c_char * num_bytes).from_buffer(mapped)
    weakref.finalize(lease, released).atexit = False
    return torch.frombuffer(lease, dtype=torch.uint8)
