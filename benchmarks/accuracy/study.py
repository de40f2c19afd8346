"""The papers' other tables, one command for each.

python benchmarks/accuracy/study.py depth --quick --data DIR --seeds 0 1 2 --json FILE
python benchmarks/accuracy/study.py {noise,ablation,alpha,gradients,cost} ...

Started again with the same file it goes on with the runs that are not there yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy import cost, data, norms, studies
from accuracy.recipes import Recipe
from accuracy.run import SIZES
from accuracy.studies import Ground, Line


def main(arguments: list[str] | None = None) -> str:
    """The table."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    ground = Ground(Loader(args.data, args.hold_out), args.hold_out, args.json, _show)
    found = {"gradients": _gradients, "cost": _cost}.get(args.table, _accuracy)(args, ground)
    print(f"\n{found}")
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*studies.STUDIES, "gradients", "cost"])
    parser.add_argument("--quick", action="store_true", help="narrow networks, few rows and epochs, for a processor")
    parser.add_argument("--data", metavar="DIR", help=f"folder of the files; else that of {data.FOLDER}")
    parser.add_argument("--methods", nargs="+", help="of depth, noise, gradients and cost")
    parser.add_argument("--lines", nargs="+", help="only these: 12 of depth, 20%% of noise")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="results; a second start goes on from there")
    parser.add_argument("--hold-out", type=int, default=0, metavar="ROWS", help="test on the last training rows")
    parser.add_argument("--threads", type=int, default=1)
    for field, kind in SIZES.items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=kind, help="instead of the recipe's")
    return parser.parse_args(arguments)


def _accuracy(args: argparse.Namespace, ground: Ground) -> str:
    study = studies.STUDIES[args.table](args.quick, args.methods or studies.METHODS)
    study = dataclasses.replace(study, lines=chosen(study.lines, args))
    return studies.markdown(study, studies.run(study, args.seeds, ground))


def _gradients(args: argparse.Namespace, ground: Ground) -> str:
    (line,) = chosen([norms.line(args.quick, args.methods or norms.METHODS)], args)
    return "\n\n".join(norms.markdown(norms.run(line, seed, ground)) for seed in args.seeds)


def _cost(args: argparse.Namespace, ground: Ground) -> str:
    lines = chosen(cost.lines(args.quick, args.methods or cost.METHODS), args)
    tables = {line.name: cost.markdown(cost.run(line, args.seeds[0], ground)) for line in lines}
    return "\n\n".join(f"{name}\n\n{found}" for name, found in tables.items())


def chosen(lines: Sequence[Line], args: argparse.Namespace) -> tuple[Line, ...]:
    """Those asked for, with what the command changes in their recipes."""
    given = {field: value for field in SIZES if (value := getattr(args, field)) is not None}
    return tuple(
        dataclasses.replace(line, recipe=dataclasses.replace(line.recipe, **given))
        for line in lines
        if not args.lines or line.name in args.lines
    )


class Loader:
    """Rows of recipes, read once for all that read the same."""

    def __init__(self, folder: str | None, hold_out: int) -> None:
        self._folder, self._hold_out = folder, hold_out
        self._known: dict[tuple[Any, ...], data.Data] = {}

    def __call__(self, recipe: Recipe) -> data.Data:
        key = recipe.dataset, recipe.train_rows, recipe.test_rows, recipe.words, recipe.length
        if key not in self._known:
            name, train_rows, test_rows, words, length = key
            loaded = data.load(name, self._folder, train_rows, test_rows, words=words, length=length)
            self._known[key] = loaded.held_out(self._hold_out) if self._hold_out else loaded
        return self._known[key]


def _show(said: str) -> None:
    print(said, flush=True)


if __name__ == "__main__":
    main()
