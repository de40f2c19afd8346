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
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.entry import Entry

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

LIMIT_SECONDS = 600


def one(name: str, answer: Connection) -> None:
    """Send the outcome of one entry, as data."""
    import torch

    from zoo.catalogue import catalogue
    from zoo.check import Outcome, check

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(LIMIT_SECONDS)
    entry = next(entry for entry in catalogue() if entry.name == name)
    try:
        outcome = check(entry)
    except BaseException as error:
        outcome = Outcome(name, entry.family, failures=(("crash", f"{type(error).__name__}: {error}"),))
    answer.send({**dataclasses.asdict(outcome), "passed": outcome.passed})


def _stop(*_: object) -> None:
    raise TimeoutError(f"more than {LIMIT_SECONDS} s")


def run(entries: Sequence[Entry], jobs: int) -> Iterator[dict[str, Any]]:
    """Each in a process of its own, a copy of this one: what a model leaves behind, or a crash, stays there."""
    context = multiprocessing.get_context("fork")
    waiting, running = deque(entries), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            entry, (mine, theirs) = waiting.popleft(), context.Pipe(duplex=False)
            process = context.Process(target=one, args=(entry.name, theirs))
            process.start()
            theirs.close()
            running[mine] = entry, process
        for mine in wait(list(running)):
            entry, process = running.pop(mine)
            try:
                outcome = mine.recv()
            except EOFError:  # it ended without an answer
                process.join()
                outcome = crashed(entry, process.exitcode)
            process.join()
            yield outcome


def crashed(entry: Entry, code: int | None) -> dict[str, Any]:
    from zoo.check import Outcome

    outcome = Outcome(entry.name, entry.family, failures=(("crash", f"the process ended with {code}"),))
    return {**dataclasses.asdict(outcome), "passed": False}


def line(outcome: dict[str, Any]) -> str:
    mark = "ok  " if outcome["passed"] else "FAIL"
    steps = ", ".join(step for step, _ in outcome["failures"])
    return f"{mark} {outcome['name']:44} {outcome['stages']} stages {outcome['seconds']:6.1f} s  {steps}"


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
    outcomes = []
    for outcome in run([entry for entry in catalogue() if re.search(options.only, entry.name)], options.jobs):
        outcomes.append(outcome)
        print(line(outcome), flush=True)
    print(table(outcomes))
    if options.json:
        options.json.write_text(json.dumps(outcomes, indent=1))


if __name__ == "__main__":
    main()
