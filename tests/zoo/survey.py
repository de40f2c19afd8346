"""What became of every entry of the zoo: `python tests/zoo/survey.py [--only REGEX] [--jobs 2] [--json F]`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import re
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

LIMIT_SECONDS = 600


def one(name: str) -> dict[str, Any]:
    """The outcome of one entry, as data."""
    import torch

    from zoo.catalogue import catalogue
    from zoo.check import Outcome, check

    torch.set_num_threads(1)
    entry = next(entry for entry in catalogue() if entry.name == name)
    signal.alarm(LIMIT_SECONDS)
    try:
        outcome = check(entry)
    except BaseException as error:
        outcome = Outcome(name, entry.family, failures=(("crash", f"{type(error).__name__}: {error}"),))
    finally:
        signal.alarm(0)
    return {**dataclasses.asdict(outcome), "passed": outcome.passed}


def _stop(*_: object) -> None:
    raise TimeoutError(f"more than {LIMIT_SECONDS} s")


def _prepare() -> None:
    signal.signal(signal.SIGALRM, _stop)


def run(names: list[str], jobs: int) -> Iterator[dict[str, Any]]:
    """In processes of their own, which end now and then: what models leave behind goes with them."""
    with multiprocessing.get_context("spawn").Pool(jobs, _prepare, maxtasksperchild=25) as pool:
        for outcome in pool.imap_unordered(one, names):
            mark = "ok  " if outcome["passed"] else "FAIL"
            steps = ", ".join(step for step, _ in outcome["failures"])
            print(
                f"{mark} {outcome['name']:44} {outcome['stages']} stages {outcome['seconds']:6.1f} s  {steps}",
                flush=True,
            )
            yield outcome


def table(outcomes: list[dict[str, Any]]) -> str:
    """A line per family, and a line per exception."""
    lines = [f"{'family':14} {'models':>6} {'captured':>8} {'4 stages':>8} {'passed':>6} {'balance':>8}"]
    families = sorted({o["family"] for o in outcomes})
    for family in [*families, "all"]:
        rows = [o for o in outcomes if family in (o["family"], "all")]
        split = [o for o in rows if o["stages"] == 4]
        balance = statistics.median(o["balance"] for o in split) if split else 0.0
        counts = [len(rows), sum(o["captured"] for o in rows), len(split), sum(o["passed"] for o in rows)]
        lines.append(f"{family:14} {counts[0]:6} {counts[1]:8} {counts[2]:8} {counts[3]:6} {balance:8.2f}")
    for outcome in sorted(outcomes, key=lambda o: o["name"]):
        lines += [f"{outcome['name']}: {step}: {text}" for step, text in outcome["failures"]]
    return "\n".join(lines)


def main() -> None:
    from zoo.catalogue import catalogue

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression for names of entries")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the outcomes")
    options = parser.parse_args()
    outcomes = list(run([entry.name for entry in catalogue() if re.search(options.only, entry.name)], options.jobs))
    print(table(outcomes))
    if options.json:
        options.json.write_text(json.dumps(outcomes, indent=1))


if __name__ == "__main__":
    main()
