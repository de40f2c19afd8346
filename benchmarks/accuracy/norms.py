"""Gradient norms at every module while a deep LSTM is trained: backprop beside local losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from accuracy.gradients import GradientNorms, ends, layers
from accuracy.journal import Outcome, once
from accuracy.studies import Ground, Line, depth
from accuracy.training import BACKPROP, train
from tools.rounds import table

METHODS = (BACKPROP, "early_exit")
MODULES = "12"


def run(line: Line, seed: int, ground: Ground) -> dict[str, Outcome]:
    """By method: accuracy, and by module the norm of every batch's gradient."""
    settings = ground.settings(line) | {"table": "gradients", "seed": seed, "n_stages": line.n_stages}
    found = {}
    for method in line.columns.values():
        found[method] = once(
            ground.path, settings | {"method": method}, lambda method=method: watched(line, method, seed, ground)
        )
        ground.show(f"{method}: {found[method]['accuracy']:.2%}")
    return found


def watched(line: Line, method: str, seed: int, ground: Ground) -> Outcome:
    watching: list[GradientNorms] = []

    def watch(model: nn.Module) -> None:
        watching.append(GradientNorms(layers(model)))

    result = train(line.recipe, ground.rows(line, seed), method, line.n_stages, seed, watch=watch)
    norms = {name: [float(f"{norm:.4g}") for norm in each] for name, each in watching[0].close().items()}
    return {"accuracy": result.accuracy, "norms": norms}


def line(quick: bool, methods: Sequence[str] = METHODS) -> Line:
    (only,) = depth(quick, methods).named([MODULES]).lines
    return only


def markdown(found: Mapping[str, Outcome]) -> str:
    """A row per module: medians over the first and the last tenth of the batches."""
    modules = list(next(iter(found.values()))["norms"])
    head = [f"{method}, {when}" for method in found for when in ("first tenth", "last tenth")]
    rows = [(module, *(_cell(found[method]["norms"].get(module, []), i) for method in found for i in (0, 1)))
            for module in modules]  # fmt: skip
    accuracies = [cell for each in found.values() for cell in ("", f"{each['accuracy']:.1%}")]
    return table(("module", *head), [*rows, ("(test accuracy)", *accuracies)])


def _cell(norms: Sequence[float], which: int) -> str:
    return f"{ends(norms)[which]:.1e}" if norms else ""
