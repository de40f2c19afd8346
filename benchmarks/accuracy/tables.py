"""Tables of results: which runs they have, a file that a second start goes on from, and Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accuracy.training import BACKPROP, Result

METHODS = (
    BACKPROP, "auto", "downstream", "infopro", "dgl", "predsim", "supcon", "deinforeg", "associated", "early_exit",
    "infonce",
)  # fmt: skip

Key = tuple[str, int, int]
"""Method, stages and seed."""


@dataclass(frozen=True)
class Book:
    """The results of a table in a JSON file: those of other settings lie there, too, and are not looked at.

    title:    of the table; settings: all that the results depend on beside method, stages and seed
    path:     None keeps nothing
    """

    title: str
    settings: dict[str, Any]
    path: Path | None = None

    def read(self) -> dict[Key, Result]:
        entries = [entry for entry in self._entries() if entry["settings"] == self._plain]
        return {(r["method"], r["n_stages"], r["seed"]): _result(r) for r in (entry["result"] for entry in entries)}

    def add(self, result: Result) -> None:
        """The file is whole at any time."""
        if self.path is None:
            return
        entry = {"title": self.title, "settings": self._plain, "result": asdict(result)}
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps([*self._entries(), entry], indent=1), encoding="utf-8")
        draft.replace(self.path)

    @property
    def _plain(self) -> Any:
        """As JSON gives it back."""
        return json.loads(json.dumps(self.settings))

    def _entries(self) -> list[dict[str, Any]]:
        if self.path is None or not self.path.exists():
            return []
        found: list[dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))
        return found


def _result(fields: dict[str, Any]) -> Result:
    return Result(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def fill(
    book: Book, runs: Iterable[Key], run: Callable[[str, int, int], Result], show: Callable[[Result], None]
) -> list[Result]:
    """The results of all runs; those that the book has are not made again. Backprop has one stage."""
    found = book.read()
    asked = dict.fromkeys((method, 1 if method == BACKPROP else n_stages, seed) for method, n_stages, seed in runs)
    results = []
    for key in asked:
        if key not in found:
            found[key] = run(*key)
            book.add(found[key])
            show(found[key])
        results.append(found[key])
    return results


def markdown(results: Sequence[Result]) -> str:
    """A row per method and number of stages: mean and deviation over the seeds; time and memory beside backprop's."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.method, result.n_stages), []).append(result)
    base = next((group for (method, _), group in groups.items() if method == BACKPROP), None)
    head = "| method | K | test accuracy | behind `bp` | seconds | peak memory | heads' share of FLOPs | seeds |"
    rows = [_row(group, base) for group in groups.values()]
    return "\n".join([head, "|---|---:|---:|---:|---:|---:|---:|---:|", *rows])


def _row(group: Sequence[Result], base: Sequence[Result] | None) -> str:
    first, accuracies = group[0], [result.accuracy for result in group]
    deviation = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(group) > 1 else ""
    cells = [
        f"`{first.method}`",
        str(first.n_stages),
        f"{100 * statistics.mean(accuracies):.2f}{deviation}",
        _behind(group, base),
        f"{statistics.mean(result.seconds for result in group):.0f}",
        f"{statistics.mean(result.peak_bytes for result in group) / 2**20:.0f} MiB",
        f"{first.head_share:.0%}",
        str(len(group)),
    ]
    return f"| {' | '.join(cells)} |"


def _behind(group: Sequence[Result], base: Sequence[Result] | None) -> str:
    """Points, over the seeds that both have."""
    known = {result.seed: result.accuracy for result in base or ()}
    gaps = [100 * (known[result.seed] - result.accuracy) for result in group if result.seed in known]
    return f"{statistics.mean(gaps):+.2f}" if gaps and group is not base else ""
