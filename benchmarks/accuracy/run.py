"""Test accuracy of local objectives beside backprop: one table per network and data set.

python benchmarks/accuracy/run.py cifar10-vgg --quick --data DIR --methods bp auto --seeds 0 1 2 --json FILE

Started again with the same file it goes on with the runs that are not there yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy import data, recipes, tables, training


def main(arguments: list[str] | None = None) -> list[training.Result]:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    recipe = choose(args)
    rows = data.load(
        recipe.dataset, args.data, recipe.train_rows, recipe.test_rows, words=recipe.words, length=recipe.length
    )
    if args.hold_out:
        rows = rows.held_out(args.hold_out)
    title = f"{args.table}{' (quick)' if args.quick else ''}"
    print(f"{title}: {len(rows.train_y):,} training rows, {len(rows.test_y):,} test rows, {recipe}\n", flush=True)
    sizes = {"train_rows": len(rows.train_y), "test_rows": len(rows.test_y), "hold_out": args.hold_out}
    book = tables.Book(title, dataclasses.asdict(recipe) | sizes, args.json)

    def run(method: str, n_stages: int, seed: int) -> training.Result:
        return training.train(recipe, rows, method, n_stages, seed, each_epoch=args.each_epoch)

    results = tables.fill(book, itertools.product(args.methods, args.stages, args.seeds), run, _show)
    print(f"\n{tables.markdown(results)}")
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=recipes.FULL)
    parser.add_argument("--quick", action="store_true", help="narrow networks, few rows and epochs, for a processor")
    parser.add_argument("--data", metavar="DIR", help=f"folder of the files; else that of {data.FOLDER}")
    parser.add_argument("--methods", nargs="+", default=tables.METHODS, help="with fields: downstream:blocks=3")
    parser.add_argument("--stages", nargs="+", type=int, default=[4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="results; a second start goes on from there")
    parser.add_argument("--hold-out", type=int, default=0, metavar="ROWS", help="test on the last training rows")
    parser.add_argument("--each-epoch", action="store_true", help="test after every epoch")
    parser.add_argument("--threads", type=int, default=1)
    for field, kind in SIZES.items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=kind, help="instead of the recipe's")
    return parser.parse_args(arguments)


SIZES: dict[str, type] = {
    "train_rows": int,
    "test_rows": int,
    "epochs": int,
    "batch": int,
    "width": float,
    "rate": float,
    "length": int,
    "words": int,
}
"""Fields of a recipe that the command may change, with their types."""


def choose(args: argparse.Namespace) -> recipes.Recipe:
    recipe = (recipes.QUICK if args.quick else recipes.FULL)[args.table]
    given = {field: value for field in SIZES if (value := getattr(args, field)) is not None}
    return dataclasses.replace(recipe, **given)


def _show(result: training.Result) -> None:
    losses = " ".join(f"{loss:.3f}" for loss in result.losses)
    print(
        f"{result.method} K={result.n_stages} seed {result.seed}: {result.accuracy:.2%} in {result.seconds:.0f} s,"
        f" {result.peak_bytes / 2**20:.0f} MiB, losses {losses}",
        flush=True,
    )


if __name__ == "__main__":
    main()
