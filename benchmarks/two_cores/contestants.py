"""Who takes part: every way of training, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch.distributed.pipelining as pp

import coupled
import ours
from autodecouple.schedules import MicroBatched, Sequential, Streaming
from entry import Entry
from tools import networks, steps

BASE = "bp1"
"""Backprop on one thread: what every ratio is to."""


@dataclass(frozen=True)
class Contestant:
    """A way of training.

    kind:    "backprop", "coupled" (pipelines of backprop) or "ours"
    threads: of torch in its process; `ours` divides them among its lanes
    run:     seconds per batch; raises `Unavailable` where it cannot run here
    """

    kind: str
    title: str
    threads: int
    run: Callable[[Entry], float]


def backprop(entry: Entry, micro_batches: int = 1) -> float:
    model = networks.in_a_row(entry.network.build())
    step = steps.backprop(model, entry.network.batches(), micro_batches)
    return steps.seconds_per_batch(step, entry.warm_up, entry.batches)


def _ours() -> dict[str, Contestant]:
    """Each executor with whole batches and with micro-batches, which stay in the caches as small batches do."""
    ways = {
        "sequential": ("one thread, stage after stage", 1, "inline", Sequential()),
        "threads": ("two threads", 2, "streams", Streaming()),
        "processes": ("two processes", 2, "processes", Streaming()),
    }
    found = {}
    for name, (title, lanes, executor, schedule) in ways.items():
        run = partial(ours.train, lanes=lanes, executor=executor)
        found[name] = Contestant("ours", f"autodecouple, {title}", lanes, partial(run, schedule=schedule))
        for count in (2, 4):
            small = partial(run, schedule=MicroBatched(count))
            found[f"{name}_mb{count}"] = Contestant("ours", f"... {count} micro-batches", lanes, small)
    return found


CONTESTANTS: Mapping[str, Contestant] = {
    BASE: Contestant("backprop", "backprop, one thread", 1, backprop),
    "bp1_mb4": Contestant("backprop", "... 4 micro-batches", 1, partial(backprop, micro_batches=4)),
    "bp2": Contestant("backprop", "backprop, two threads", 2, backprop),
    "torchgpipe": Contestant("coupled", "torchgpipe, two CPU partitions", 1, coupled.torchgpipe),
    "gpipe": Contestant("coupled", "torch pipelining, GPipe", 1, partial(coupled.processes, kind=pp.ScheduleGPipe)),
    "1f1b": Contestant("coupled", "torch pipelining, 1F1B", 1, partial(coupled.processes, kind=pp.Schedule1F1B)),
    "zero_bubble": Contestant(
        "coupled",
        "torch pipelining, interleaved zero bubble",
        1,
        partial(coupled.processes, kind=pp.ScheduleInterleavedZeroBubble, stages_per_rank=2),
    ),
    **_ours(),
}
