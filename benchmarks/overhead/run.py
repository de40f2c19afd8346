"""What the runtime costs: the same stages trained by a loop written by hand, inline, and by one lane of streams.

python benchmarks/overhead/run.py [--networks vgg small] [--rounds 15] [--clock cpu] [--profile] [--json FILE]
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import autodecouple
import plain
from tools import networks
from tools import rounds as turns
from tools.networks import Batch, Network

NETWORKS = {
    "vgg": networks.vgg(0.5, rows=64),
    "transformer": networks.transformer(150, layers=4),
    "resnet18": networks.resnet18(0.5, rows=64),
    "small": networks.resnet18(0.1, rows=8),  # a few milliseconds a batch: here microseconds show
    "small text": networks.transformer(12, length=8, rows=8),
}
WAYS = ("plain", "inline", "streams")
WARM_UP = 3
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""What passes by, and what the processor works for this process, all its threads together."""


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    outcome: dict[str, Any] = {"machine": turns.machine(), "settings": {**vars(args), "json": None}}
    rows = []
    for name in args.networks:
        outcome[name] = found = measure(NETWORKS[name], args)
        rows.append((name, f"{found['plain'] * 1e3:.1f}", *(describe(found, way) for way in WAYS[1:])))
        apart = f"apart by at most {found['apart']:.0e}" if found["apart"] else "equal to the last bit"
        print(f"{name}: parameters after it {apart}", flush=True)
    print("\n" + turns.table(("network", "by hand, ms a batch", *WAYS[1:]), rows))
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=2), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each way in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: also on a busy machine")
    parser.add_argument("--profile", action="store_true", help="also say which functions of the runtime take time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def measure(network: Network, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds in which the three take turns; all begin with the same weights and see the same batches."""
    with ExitStack() as stack:
        made = {way: stack.enter_context(compiled(network, args.stages, way)) for way in WAYS}
        ways = {way: trainer(found, way, network.batches()) for way, found in made.items()}
        for train in ways.values():
            train(WARM_UP)
        clock = CLOCKS[args.clock]
        slowest = max(seconds(train, WARM_UP, clock) for train in ways.values()) / WARM_UP
        count = max(1, round(args.seconds / slowest))
        rounds = [{way: seconds(t, count, clock) / count for way, t in ways.items()} for _ in range(args.rounds)]
        apart = difference(*(found.model for found in made.values()))
        actions = sum(len(lane) for lane in made["inline"].plan.lanes) * 4  # forward, loss, backward, update
        if args.profile:
            profile(ways["inline"], count)
    return summary(rounds, actions) | {"apart": apart, "batches": count, "seconds_per_batch": rounds}


def compiled(network: Network, n_stages: int, way: str) -> autodecouple.Decoupled:
    """One lane for all stages."""
    return autodecouple.compile(
        network.build(),
        n_stages,
        example_inputs=network.batches(1)[0][0],
        optimizer=networks.sgd,
        devices=["cpu"],
        executor="streams" if way == "streams" else "inline",
    )


Train = Callable[[int], None]
"""Trains on so many batches, to their end."""


def trainer(found: autodecouple.Decoupled, way: str, data: Sequence[Batch]) -> Train:
    def by_hand(count: int) -> None:
        for batch in itertools.islice(numbers, count):
            plain.train(found.stages, names, batch, *data[batch % len(data)])

    def by_runtime(count: int) -> None:
        for batch in itertools.islice(numbers, count):
            found.train_step(*data[batch % len(data)])
        found.synchronize()

    numbers, names = itertools.count(), [spec.name for spec in found.plan.inputs]
    return by_hand if way == "plain" else by_runtime


def seconds(train: Train, count: int, clock: Callable[[], float]) -> float:
    start = clock()
    train(count)
    return clock() - start


def difference(*models: nn.Module) -> float:
    """The largest between their parameters and buffers."""
    first, *others = (model.state_dict() for model in models)
    return max(float((value - other[key]).abs().max()) for key, value in first.items() for other in others)


def summary(rounds: list[dict[str, float]], actions: int) -> dict[str, Any]:
    """Seconds per batch; share of it that each executor adds, median, least and most of the rounds; and per action."""
    found: dict[str, Any] = {way: turns.median(rounds, way) for way in WAYS}
    for way in WAYS[1:]:
        added = sorted(turn[way] / turn["plain"] - 1 for turn in rounds)
        found[f"{way} adds"] = [statistics.median(added), added[0], added[-1]]
        found[f"{way} per action"] = (found[way] - found["plain"]) / actions
    return found


def describe(found: dict[str, Any], way: str) -> str:
    middle, low, high = found[f"{way} adds"]
    return f"{middle:+.1%} ({low:+.1%} to {high:+.1%}), {found[f'{way} per action'] * 1e6:.0f} us an action"


def profile(train: Train, count: int) -> None:
    """The functions of the runtime by the time they take themselves; the profiler itself makes small ones larger."""
    with cProfile.Profile() as profiler:
        train(count)
    pstats.Stats(profiler).sort_stats("tottime").print_stats("autodecouple|contextlib|_pytree", 25)


if __name__ == "__main__":
    main()
