"""Backprop, coupled pipelines and autodecouple on two cores, in rounds that take turns.

python benchmarks/two_cores/run.py [--only REGEX] [--networks vgg transformer resnet18] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contestants import BASE, CONTESTANTS
from entry import NETWORKS, Entry
from tools import rounds as turns

WORKER = Path(__file__).resolve().with_name("worker.py")
Outcome = dict[str, Any]


def main() -> None:
    args = parse()
    outcome = {"machine": turns.machine(), "rounds": args.rounds}
    for name in args.networks:
        entry = prepare(Entry(name, args.tiny, cost=args.cost), args.seconds)
        print(f"\n## {name}: {args.rounds} rounds of {entry.batches} batches\n", flush=True)
        outcome[name] = summary(entry, *play(entry, chosen(args.only), args))
        print(report(outcome[name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=2), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--only", default="", metavar="REGEX", help="contestants, beside backprop on one thread")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of backprop on one thread; all do its batches")
    parser.add_argument("--cost", default="flops", help="what balances our stages")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of a contestant in a round")
    parser.add_argument("--tiny", action="store_true", help="small networks, to see whether everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def chosen(only: str) -> list[str]:
    return [name for name in CONTESTANTS if name == BASE or re.search(only, name)]


def prepare(entry: Entry, seconds: float) -> Entry:
    """The same number of batches for all: what backprop on one thread does in so many seconds."""
    once = play_once(BASE, replace(entry, warm_up=1, batches=2), timeout=600)
    if "seconds" not in once:
        raise SystemExit(f"backprop itself fails: {once['unavailable']}")
    return replace(entry, batches=max(8, math.ceil(seconds / once["seconds"])))


def play(entry: Entry, names: list[str], args: argparse.Namespace) -> tuple[list[dict[str, float]], dict[str, str]]:
    """Seconds per batch of every round, and who was missing why."""
    rounds: list[dict[str, float]] = []
    missing: dict[str, str] = {}
    for number in range(args.rounds):
        found: dict[str, float] = {}
        for name in names:
            if name in missing:
                continue
            outcome = play_once(name, entry, args.timeout)
            print(f"round {number + 1}, {name}: {outcome}", file=sys.stderr, flush=True)
            if "seconds" in outcome:
                found[name] = outcome["seconds"]
            else:
                missing[name] = outcome["unavailable"]
        rounds.append(found)
    return rounds, missing


def play_once(name: str, entry: Entry, timeout: float) -> Outcome:
    """A contestant in a fresh process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(CONTESTANTS[name].threads)}
    command = [sys.executable, str(WORKER), name, json.dumps(asdict(entry))]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"unavailable": f"not done after {timeout:g} s"}
    if done.returncode:
        return {"unavailable": f"failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}"}
    found: Outcome = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(entry: Entry, rounds: list[dict[str, float]], missing: dict[str, str]) -> Outcome:
    names = [name for name in CONTESTANTS if name not in missing and any(name in found for found in rounds)]
    rows = entry.network.rows
    return {
        "entry": asdict(entry),
        "contestants": {
            name: {
                "samples_per_second": rows / turns.median(rounds, name),
                "ratio": asdict(turns.faster(rounds, name, BASE)),
            }
            for name in names
        },
        "unavailable": missing,
        "best": best(rounds, names),
        "seconds_per_batch": rounds,
    }


def best(rounds: list[dict[str, float]], names: list[str]) -> dict[str, Any]:
    """Our fastest beside the others' fastest, each in the median of its ratios to backprop on one thread."""
    found: dict[str, Any] = {}
    for kind in ("ours", "coupled"):
        of_kind = [name for name in names if CONTESTANTS[name].kind == kind]
        if of_kind:
            found[kind] = max(of_kind, key=lambda name: turns.faster(rounds, name, BASE).median)
    if "ours" in found:
        others = {"backprop, one thread": BASE, "backprop, two threads": "bp2", "coupled": found.get("coupled")}
        found["over"] = {
            title: asdict(turns.faster(rounds, found["ours"], other))
            for title, other in others.items()
            if other in names
        }
    return found


def report(found: Outcome) -> str:
    rows = [
        (CONTESTANTS[name].title, f"{row['samples_per_second']:.1f}", turns.Ratio(**row["ratio"]))
        for name, row in found["contestants"].items()
    ]
    lines = [turns.table(("contestant", "samples/s", "times backprop on one thread"), rows), ""]
    lines += [f"{CONTESTANTS[name].title}: not available ({why})" for name, why in found["unavailable"].items()]
    for title, ratio in found["best"].get("over", {}).items():
        lines.append(f"best of ours ({found['best']['ours']}) over {title}: {turns.Ratio(**ratio)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
