"""Plans and timelines as tables for the terminal."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from autodecouple.plans import Plan
from autodecouple.timeline import Timeline
from autodecouple.view import units
from autodecouple.view.summary import Place, Summary, Table, summarize, summarize_cuts

WIDTH = 140
"""Columns where no terminal says otherwise: wide enough that a usual plan needs no wrapping."""


def plan_table(plan: Plan, *, color: bool = False, width: int | None = None) -> str:
    """The plan as a table of its stages, then balance, speedup, bottleneck and warnings.

    color: with ANSI escapes; width: in columns, by default that of the terminal, or `WIDTH` where there is none.
    """
    return render(summarize(plan), color=color, width=width)


def timeline_table(timeline: Timeline, *, color: bool = False, width: int | None = None) -> str:
    """The timeline as tables of its lanes (busy, bubble) and its stages (median of each action), then the makespan."""
    return render(summarize(timeline), color=color, width=width)


def cuts_table(places: Sequence[Place], *, color: bool = False, width: int | None = None) -> str:
    """Every place where one might cut, with what would cross or the reason why it is not legal."""
    return render(summarize_cuts(places), color=color, width=width)


def render(summary: Summary, *, color: bool = False, width: int | None = None) -> str:
    """The tables one above the other, then notes and warnings; no spaces at the ends of lines."""
    terminal = shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout.isatty() else WIDTH
    file = io.StringIO()
    console = Console(
        file=file, width=width or terminal, force_terminal=color, color_system="standard" if color else None,
        emoji=False, markup=False, highlight=False, legacy_windows=False, force_jupyter=False,
    )  # fmt: skip
    console.print(_summary(summary))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _summary(summary: Summary) -> RenderableType:
    notes = [_text(note) for note in summary.notes]
    warnings = [_text(f"warning: {warning}", style="yellow") for warning in summary.warnings]
    return Group(*map(_table, summary.tables), *notes, *warnings)


def _table(table: Table) -> RenderableType:
    """A title above a rich table."""
    grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns:
        side: Literal["left", "right"] = "right" if column.number else "left"
        grid.add_column(_text(column.title), justify=side, no_wrap=column.number, overflow="fold", vertical="top")
    for row in table.rows:
        grid.add_row(*map(_text, row))
    return Group(_text(table.title, style="bold"), grid)


def _text(text: str, style: str = "") -> Text:
    """As Text, brackets in names are not read as markup."""
    return Text(units.clean(text), style=style)
