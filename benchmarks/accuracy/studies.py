"""The papers' other tables of accuracy: which runs each line has, and Markdown of what they gave.

depth      more and more LSTM modules, a stage per two of them
noise      a share of the training labels wrong
ablation   the terms of DeInfoReg's loss on and off
alpha      the weight of DeInfoReg's cross-entropy
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accuracy.data import Data
from accuracy.noise import mislabel
from accuracy.recipes import FULL, Recipe
from accuracy.tables import Book, fill
from accuracy.training import BACKPROP, Result, train
from autodecouple import DeInfoReg
from tools.rounds import table

METHODS = (BACKPROP, "early_exit", "deinforeg", "supcon")
"""Of depth and noise; `early_exit` is what `auto` chooses for texts."""
DEPTHS = (2, 4, 6, 8, 10, 12, 14)
SHARES = (0.0, 0.2, 0.4)
ALPHAS = (0.0, 0.001, 0.01, 0.1, 1.0)
TERMS = {"variance": "V", "invariance": "I", "covariance": "Cov", "alpha": "CE"}
"""The weights of DeInfoReg, and what its paper calls their terms."""


@dataclass(frozen=True)
class Line:
    """A line of a table: a network that is trained by a method for each of its columns.

    columns:      heading: method
    wrong_labels: share of the training labels
    """

    name: str
    recipe: Recipe
    columns: Mapping[str, str]
    n_stages: int = 4
    wrong_labels: float = 0.0


@dataclass(frozen=True)
class Study:
    """A table: `about` is what its lines differ in."""

    about: str
    lines: tuple[Line, ...]

    def named(self, names: Sequence[str]) -> Study:
        """With these lines alone."""
        return dataclasses.replace(self, lines=tuple(line for line in self.lines if line.name in names))


def depth(quick: bool, methods: Sequence[str] = METHODS) -> Study:
    """Two LSTM modules have a stage each, more a stage per two."""
    recipe = TEXTS_QUICK if quick else dataclasses.replace(FULL["imdb-lstm"], length=350, cut_at=())
    columns = {method: method for method in methods}
    return Study("LSTM modules", tuple(_deep(recipe, modules, columns) for modules in DEPTHS))


TEXTS_QUICK = Recipe("lstm", "ag_news", 32, 8_000, None, 5, 64, "adam", 3e-3, "one_cycle", words=5_000, length=24)
"""Short texts: a step of a sequence takes its time however narrow the network is."""


def _deep(recipe: Recipe, modules: int, columns: Mapping[str, str]) -> Line:
    return Line(str(modules), dataclasses.replace(recipe, layers=modules), columns, max(2, modules // 2))


def noise(quick: bool, methods: Sequence[str] = METHODS) -> Study:
    recipe = TEXTS_QUICK if quick else FULL["ag_news-lstm"]
    columns = {method: method for method in methods}
    return Study("wrong labels", tuple(Line(f"{s:.0%}", recipe, columns, wrong_labels=s) for s in SHARES))


def ablation(quick: bool, methods: Sequence[str] = ()) -> Study:
    """All terms, all but one, one alone; in the full form pairs, too."""
    kept = (kept for count in ((4, 3, 1) if quick else (4, 3, 2, 1)) for kept in itertools.combinations(TERMS, count))
    lines = {" + ".join(TERMS[weight] for weight in each): without(each) for each in kept}
    return _of_deinforeg("terms", quick, lines)


def without(kept: Sequence[str]) -> str:
    """DeInfoReg with these weights as they are and the others 0."""
    off = [f"{weight}=0" for weight in TERMS if weight not in kept]
    return f"deinforeg:{','.join(off)}" if off else "deinforeg"


def alpha(quick: bool, methods: Sequence[str] = ()) -> Study:
    lines = {f"{each:g}": "deinforeg" if each == DeInfoReg.alpha else f"deinforeg:alpha={each:g}" for each in ALPHAS}
    return _of_deinforeg("alpha", quick, lines)


def _of_deinforeg(about: str, quick: bool, lines: Mapping[str, str]) -> Study:
    """Variants, and backprop; with Adam, for which the scale of a term that is alone does not matter."""
    images = dataclasses.replace(FULL["cifar10-vgg"], optimizer="adam", rate=1e-3, decay=0.0)
    recipe = TEXTS_QUICK if quick else images
    methods = {**lines, f"({BACKPROP})": BACKPROP}
    return Study(about, tuple(Line(name, recipe, {"test accuracy": method}) for name, method in methods.items()))


STUDIES: dict[str, Callable[[bool, Sequence[str]], Study]] = {
    "depth": depth, "noise": noise, "ablation": ablation, "alpha": alpha
}  # fmt: skip

Found = dict[tuple[str, str], dict[int, Result]]
"""By line and column: a result per seed."""


@dataclass(frozen=True)
class Ground:
    """What a table is made on.

    load:     gives the rows of a recipe; hold_out: so many of its training rows stand in for the test rows
    path:     of the file with the results, None for none; show: is told of each run
    """

    load: Callable[[Recipe], Data]
    hold_out: int = 0
    path: Path | None = None
    show: Callable[[str], None] = print

    def settings(self, line: Line) -> dict[str, Any]:
        """Without wrong labels those of `run.py`, whose results then are the same."""
        rows = self.load(line.recipe)
        sizes = {"train_rows": len(rows.train_y), "test_rows": len(rows.test_y), "hold_out": self.hold_out}
        noise = {"wrong_labels": line.wrong_labels} if line.wrong_labels else {}
        return dataclasses.asdict(line.recipe) | sizes | noise

    def rows(self, line: Line, seed: int) -> Data:
        rows = self.load(line.recipe)
        if not line.wrong_labels:
            return rows
        return dataclasses.replace(rows, train_y=mislabel(rows.train_y, line.wrong_labels, rows.num_classes, seed))


def run(study: Study, seeds: Sequence[int], ground: Ground) -> Found:
    """Train what the file lacks, all lines with the first seed before the second."""
    found: Found = {(line.name, column): {} for line in study.lines for column in line.columns}
    for seed, line in itertools.product(seeds, study.lines):
        for column, method in line.columns.items():
            found[line.name, column][seed] = _train(line, method, seed, ground)
    return found


def _train(line: Line, method: str, seed: int, ground: Ground) -> Result:
    def make(method: str, n_stages: int, seed: int) -> Result:
        return train(line.recipe, ground.rows(line, seed), method, n_stages, seed)

    def show(result: Result) -> None:
        ground.show(f"{line.name}: {method}, seed {seed}: {result.accuracy:.2%} in {result.seconds:.0f} s")

    (result,) = fill(Book(line.name, ground.settings(line), ground.path), [(method, line.n_stages, seed)], make, show)
    return result


def markdown(study: Study, found: Found) -> str:
    """Test accuracy in percent: the mean, and the deviation where there are several seeds."""
    columns = list(dict.fromkeys(column for line in study.lines for column in line.columns))
    rows = ((line.name, *(_cell(found.get((line.name, column), {})) for column in columns)) for line in study.lines)
    return table((study.about, *columns), rows)


def _cell(results: Mapping[int, Result]) -> str:
    accuracies = [100 * result.accuracy for result in results.values()]
    if len(accuracies) < 2:
        return f"{accuracies[0]:.1f}" if accuracies else ""
    return f"{statistics.mean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f}"
