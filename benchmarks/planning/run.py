"""How long planning takes as the graph grows: captured graphs of 1,000 to 100,000 nodes, cut into eight stages.

python benchmarks/planning/run.py [--nodes 1000 10000 100000] [--stages 8] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from large_graphs import residual_tower

from autodecouple.errors import PartitionError
from autodecouple.graph import Graph
from autodecouple.objectives import Objective, SupCon
from autodecouple.options import Wish
from autodecouple.passes.candidates import Candidate, find_cuts
from autodecouple.passes.measuring.stage_costs import StageCosts
from autodecouple.passes.partition import choose_cuts
from autodecouple.passes.partitioning.runs import minimise_slowest
from autodecouple.pipeline import decide


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    graphs = {size: residual_tower(size // 2) for size in args.nodes}  # half of its nodes name parameters
    measure(residual_tower(50), 2, None)  # what is done once per process: imports, FLOPs of operations
    found: dict[int, list[dict[str, float]]] = {size: [] for size in args.nodes}
    for _ in range(args.rounds):
        for size, graph in graphs.items():  # interleaved: whatever else runs here slows all sizes alike
            found[size].append(measure(graph, args.stages, args.limit if size <= args.limited_nodes else None))
    rows = [row(size, graphs[size], found[size]) for size in args.nodes]
    for line in rows:
        print(", ".join(f"{name} {value}" for name, value in line.items()), flush=True)
    if args.json:
        about = {"stages": args.stages, "rounds": args.rounds, "limit": args.limit, "torch": torch.__version__}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        args.json.write_text(json.dumps({**about, "peak_MiB": peak, "sizes": rows}, indent=2))


def measure(graph: Graph, n_stages: int, limited: float | None) -> dict[str, float]:
    """Seconds of each step, of a graph that nothing is known of yet but its measures; wall time and process time.

    plan:      all of `autodecouple.plan` on a capture: cuts, lanes and what the stages take
    cuts:      of it, finding the legal cuts
    partition: of it, choosing among them
    search:    of that, the search for the optimum alone
    limited:   choosing under a memory limit that the fastest plan does not keep: this share of what it takes
    unmet:     choosing under a limit that no plan keeps
    """
    seconds: dict[str, float] = {}
    objectives = [SupCon()] * (n_stages - 1)
    fresh = dataclasses.replace(graph)
    wish = Wish.checked(n_stages, objectives, ["cpu"] * n_stages)
    timed(seconds, "plan", lambda: decide(fresh, find_cuts(fresh), wish))
    candidates = timed(seconds, "cuts", lambda: find_cuts(fresh))
    plan = timed(seconds, "partition", lambda: choose_cuts(fresh, candidates, n_stages, objectives))
    legal = [candidate for candidate in candidates if candidate.cut is not None]
    costs = StageCosts(fresh, legal)
    runs = [costs.runs(stage, objectives) for stage in range(n_stages)]
    timed(seconds, "search", lambda: minimise_slowest(runs, [0] * len(legal)))
    if limited is not None:
        needs = [stage.memory_bytes for stage in plan.stages]
        for step, limit in (("limited", int(limited * max(needs))), ("unmet", min(needs) // 2)):
            timed(seconds, step, lambda: attempt(fresh, candidates, n_stages, objectives, limit))  # noqa: B023
    return seconds


def attempt(
    graph: Graph, candidates: Sequence[Candidate], n_stages: int, objectives: Sequence[Objective], limit: int
) -> None:
    with contextlib.suppress(PartitionError):
        choose_cuts(graph, candidates, n_stages, objectives, memory_limit=limit)


def timed(seconds: dict[str, float], step: str, work: Callable[[], Any]) -> Any:
    gc.collect()
    wall, process = time.perf_counter(), time.process_time()
    found = work()
    seconds[step], seconds[f"{step}_process"] = time.perf_counter() - wall, time.process_time() - process
    return found


def row(size: int, graph: Graph, rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the rounds."""
    medians = {step: round(statistics.median(found[step] for found in rounds), 3) for step in rounds[0]}
    legal = sum(candidate.cut is not None for candidate in find_cuts(graph))
    return {"nodes": len(graph.train.graph.nodes), "operations": len(graph.operations), "cuts": legal, **medians}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=0.9, help="of the memory that the fastest plan takes")
    parser.add_argument("--limited-nodes", type=int, default=20_000, help="largest graph that is cut under a limit")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
