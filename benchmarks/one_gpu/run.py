"""Time and peak memory on one GPU: backprop, compiled and checkpointed, and K stages on one lane.

python benchmarks/one_gpu/run.py [--networks resnet18 transformer small] [--only REGEX] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from contestants import BASE, STAGES, Build, Ground, Running, contestants
from tools import networks
from tools import rounds as turns

NETWORKS = {
    "resnet18": networks.resnet18(rows=1024),
    "transformer": networks.transformer(512, layers=12, rows=64),
    "small": networks.resnet18(0.1, rows=8),  # its kernels take less time than their launches
}
TINY = {
    "resnet18": networks.resnet18(0.05, rows=4),
    "transformer": networks.transformer(12, layers=2, length=6, rows=4),
    "small": networks.resnet18(0.05, rows=2),
}
WARM_UP = 6
"""Batches before anything counts: libraries load, code is compiled, graphs are recorded."""
Outcome = dict[str, Any]


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    outcome: Outcome = {"machine": turns.machine() | {"device": name_of(device)}, "settings": {**vars(args)}}
    for name in args.networks:
        network = (TINY if args.tiny else NETWORKS)[name]
        outcome[name] = found = measure(Ground(device, network, args.compiler, args.on_nonfinite), args)
        print(f"\n## {name}\n\n{report(found)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=2, default=str), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--stages", nargs="+", type=int, default=list(STAGES))
    parser.add_argument("--only", default="", metavar="REGEX", help="contestants, beside backprop")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of backprop in a round; all do its batches")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", default="inductor", help="what torch.compile hands its graphs to")
    parser.add_argument("--on-nonfinite", default="ignore", help="of our stages; backprop does not look at its loss")
    parser.add_argument("--tiny", action="store_true", help="small networks, to see whether everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def measure(ground: Ground, args: argparse.Namespace) -> Outcome:
    """Memory of each contestant alone, then rounds in which all take turns."""
    builds = {name: build for name, build in contestants(args.stages).items() if is_wanted(name, args.only)}
    alone = {name: look(build, ground) for name, build in builds.items()}
    fit = {name: build for name, build in builds.items() if "unavailable" not in alone[name]}
    rounds = race(fit, ground, args.rounds, args.seconds)
    for name in fit:
        alone[name] |= {"seconds": turns.median(rounds, name), "time": asdict(ratio(rounds, name))}
        if alone[name]["peak_bytes"] is not None:
            alone[name]["memory"] = alone[name]["peak_bytes"] / alone[BASE]["peak_bytes"]
    return {"contestants": alone, "rounds": rounds}


def is_wanted(name: str, only: str) -> bool:
    return name == BASE or re.search(only, name) is not None


def look(build: Build, ground: Ground) -> Outcome:
    """Peak memory of a contestant that has the device for itself, what ran otherwise than asked, or why it fails."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found: Outcome = {"peak_bytes": peak_bytes(build, ground)}
        except Exception as error:  # of memory, of a compiler; the others go on
            found = {"unavailable": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    collect(ground)
    return found | {"eagerly": sorted({str(w.message) for w in said if "eager" in str(w.message)})}


def peak_bytes(build: Build, ground: Ground) -> int | None:
    """Of the allocator, after the warm-up; a processor does not tell."""
    running = build(ground)
    train(running, WARM_UP)
    if ground.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ground.device)
    train(running, 3)
    running.close()
    return torch.cuda.max_memory_allocated(ground.device) if ground.device.type == "cuda" else None


def collect(ground: Ground) -> None:
    """Give back what the last contestant held."""
    gc.collect()
    if ground.device.type == "cuda":
        torch.cuda.empty_cache()


def train(running: Running, batches: int) -> float:
    """Seconds of so many batches, to their end."""
    start = time.perf_counter()
    for _ in range(batches):
        running.step()
    running.finish()
    return time.perf_counter() - start


def race(builds: Mapping[str, Build], ground: Ground, rounds: int, seconds: float) -> list[dict[str, float]]:
    """Seconds per batch; all stand ready, and each does as many batches as backprop does in `seconds`."""
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were said before
        ready: dict[str, Running] = {}
        for name, build in builds.items():
            ready[name] = build(ground)
            stack.callback(ready[name].close)
            train(ready[name], WARM_UP)
        count = max(1, round(seconds / (train(ready[BASE], 3) / 3)))
        return [{name: train(running, count) / count for name, running in ready.items()} for _ in range(rounds)]


def ratio(rounds: list[dict[str, float]], name: str) -> turns.Ratio:
    """Its time over backprop's."""
    return turns.faster(rounds, BASE, name)


def report(found: Outcome) -> str:
    rows = [(name, *columns(each)) for name, each in found["contestants"].items()]
    return turns.table(("contestant", "ms a batch", "x backprop's time", "peak MB", "x backprop's memory"), rows)


def columns(each: Outcome) -> tuple[str, ...]:
    if "unavailable" in each:
        return (each["unavailable"], "", "", "")
    peak, time_ = each["peak_bytes"], each["time"]
    shown = f"{time_['median']:.2f} ({time_['low']:.2f} to {time_['high']:.2f})"
    memory = (f"{peak / 1e6:.0f}", f"{each['memory']:.2f}") if peak is not None else ("", "")
    return (f"{each['seconds'] * 1e3:.2f}{' *' if each['eagerly'] else ''}", shown, *memory)


if __name__ == "__main__":
    main()
