"""The Fashion-MNIST table: local objectives beside backprop of the same network.

python benchmarks/fashion_mnist/run.py --data DIR [--seeds 0 1 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import compare
import vision

METHODS = ("bp", "supcon:pool=4", "deinforeg:pool=4", "early_exit:pool=4")
SETTINGS = (
    "--dataset fashion-mnist --model vgg --width 0.25 --rows 10000 --stages 4 --epochs 6 --batch-size 128 --threads 1"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    runs = [run(args.data, seed) for seed in args.seeds]
    print(f"\n{table(runs)}")
    if args.json:
        args.json.write_text(json.dumps([[asdict(row) for row in rows] for rows in runs], indent=2), encoding="utf-8")


def run(data: str, seed: int) -> list[compare.Result]:
    return vision.main([*SETTINGS.split(), "--data", data, "--seed", str(seed), "--loss", *METHODS])


def table(runs: list[list[compare.Result]]) -> str:
    """Markdown: accuracy of each seed, and their mean."""
    rows = []
    for results in zip(*runs, strict=True):
        each = ", ".join(f"{result.accuracy:.2%}" for result in results)
        mean = statistics.mean(result.accuracy for result in results)
        rows.append(f"| {results[0].method} | {mean:.2%} | {each} | {results[0].num_parameters:,} |")
    return "\n".join(["| method | test accuracy | of each seed | parameters trained |", "|---|---:|---|---:|", *rows])


if __name__ == "__main__":
    main()
