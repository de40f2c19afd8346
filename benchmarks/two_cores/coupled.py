"""Pipelines of backprop by others: torchgpipe (threads) and torch.distributed.pipelining (processes)."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.pipelining as pp
from torch import multiprocessing, nn

from entry import Entry, Unavailable
from tools import networks, steps
from tools.balance import balance
from tools.networks import Batch

LANES = 2
MICRO_BATCHES = 4


def torchgpipe(entry: Entry) -> float:
    """Two partitions on the processor, one thread each, activations kept: its fastest setting."""
    try:
        from torchgpipe import GPipe
    except ImportError as error:
        raise Unavailable(f"{error}; pip install 'autodecouple[benchmarks]'") from error
    batches, row = _prepare(entry)
    sizes = balance(row, batches[0][0], LANES)
    model = GPipe(row, sizes, devices=["cpu"] * LANES, chunks=MICRO_BATCHES, checkpoint="never")
    return steps.seconds_per_batch(steps.backprop(model, batches), entry.warm_up, entry.batches)


def processes(entry: Entry, *, kind: Any, stages_per_rank: int = 1) -> float:
    """torch.distributed.pipelining: two gloo processes of one thread each."""
    batches, row = _prepare(entry)
    sizes = balance(row, batches[0][0], LANES * stages_per_rank)
    found = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meet = f"file://{Path(folder) / 'meet'}"
        multiprocessing.spawn(_rank, (meet, entry, kind, sizes, found), nprocs=LANES)
    return found.get()


def _rank(rank: int, meet: str, entry: Entry, kind: Any, sizes: list[int], found: Any) -> None:
    """The life of one process; the last rank has the loss, and all finish a step together, so any clock will do."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=LANES)
    batches, row = _prepare(entry)
    own = range(rank, len(sizes), LANES)  # stages deal out in turns, as the interleaved schedules want them
    parts = _parts(row, sizes)
    stages = [pp.PipelineStage(parts[index], index, len(sizes), torch.device("cpu")) for index in own]
    loss = nn.CrossEntropyLoss()
    schedule = kind(stages if len(stages) > 1 else stages[0], MICRO_BATCHES, loss)
    seconds = steps.seconds_per_batch(_step(rank, stages, schedule, batches), entry.warm_up, entry.batches)
    dist.barrier()
    if rank == 0:
        found.put(seconds)
    dist.destroy_process_group()


def _step(rank: int, stages: list[pp.PipelineStage], schedule: Any, batches: list[Batch]) -> steps.Step:
    optimizer = networks.sgd([p for stage in stages for p in stage.submod.parameters()])
    stream = itertools.cycle(batches)

    def step() -> None:
        x, y = next(stream)
        inputs = (x,) if rank == 0 else ()
        schedule.step(*inputs, target=y if rank == LANES - 1 else None, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _prepare(entry: Entry) -> tuple[list[Batch], nn.Sequential]:
    return entry.network.batches(), networks.in_a_row(entry.network.build())


def _parts(row: nn.Sequential, sizes: list[int]) -> list[nn.Sequential]:
    ends = list(itertools.accumulate(sizes))
    return [row[end - size : end] for end, size in zip(ends, sizes, strict=True)]
