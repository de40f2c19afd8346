"""Predicted speed of 2 to 64 devices from stage times measured on this machine, beside one device as measured.

python benchmarks/predicted/run.py [--networks vgg resnet18 transformer] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import autodecouple
import two_lanes
from autodecouple.errors import PartitionError
from autodecouple.graph import Graph
from case import Case
from tools import networks
from tools import rounds as turns
from tools.networks import Batch, Network

NETWORKS = {"vgg": networks.vgg, "resnet18": networks.resnet18, "transformer": networks.transformer}
TINY = {"vgg": {"width": 0.05}, "resnet18": {"width": 0.05}, "transformer": {"width": 12, "length": 8}}
SCHEDULES = ("barrier", "gpipe", "1f1b", "pipedream", "streaming")


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    outcome: dict[str, Any] = {"machine": turns.machine(), "settings": {**vars(args), "json": None}}
    for name in args.networks:
        print(f"\n## {name}\n", flush=True)
        outcome[name] = measure(network(name, args), args)
        print(report(outcome[name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=2), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--devices", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[4, 16], help="of GPipe and 1F1B: the best")
    parser.add_argument("--rows", type=int, default=64, help="of a batch")
    parser.add_argument("--batches", type=int, default=3, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cost", default="flops", help="what balances the stages")
    parser.add_argument("--tiny", action="store_true", help="small networks, to see whether everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def network(name: str, args: argparse.Namespace) -> Network:
    return NETWORKS[name](rows=args.rows, **(TINY[name] if args.tiny else {}))


def measure(found: Network, args: argparse.Namespace) -> dict[str, Any]:
    data = found.batches()
    graph = autodecouple.capture(found.build(), data[0][0])
    outcome: dict[str, Any] = {"devices": {}}
    for count in args.devices:
        try:
            outcome["devices"][count] = devices(graph, data, count, args)
        except PartitionError as error:
            outcome["refused"] = str(error).split(". ")[0]
            break
    outcome["two lanes"] = two_lanes.compare(graph, data, 4 * args.batches, args.rounds, args.cost)
    return outcome


def devices(graph: Graph, data: Sequence[Batch], count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Speed of so many devices, a stage on each, over that of one as the same round had it."""
    case = Case.make(graph, count, data, args.batches, args.micro_batches, args.cost)
    with ExitStack() as stack:
        for pipeline in case.pipelines:
            stack.enter_context(closing(pipeline))
        rounds = [best_of(case.round()) for _ in range(args.rounds)]
    ratios = {name: asdict(turns.faster(rounds, name, "backprop")) for name in SCHEDULES}
    return {"balance": case.local.plan.balance, "ratios": ratios, "seconds_per_batch": rounds}


def best_of(found: dict[str, float]) -> dict[str, float]:
    """Each schedule with the number of micro-batches that suits it."""
    return {name: min(s for key, s in found.items() if key.split()[0] == name) for name in ("backprop", *SCHEDULES)}


def report(found: dict[str, Any]) -> str:
    rows = [
        (count, f"{case['balance']:.2f}", *(turns.Ratio(**case["ratios"][name]) for name in SCHEDULES))
        for count, case in found["devices"].items()
    ]
    lines = [turns.table(("devices", "balance", *SCHEDULES), rows), ""]
    if "refused" in found:
        lines.append(found["refused"])
    for source in ("predicted", "from inline"):
        ratio = turns.faster(found["two lanes"], "measured", source)
        lines.append(f"two lanes: makespan {source} / measured {ratio}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
