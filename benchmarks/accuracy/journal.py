"""A JSON file of outcomes that a second start goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Outcome = dict[str, Any]


def once(path: Path | None, settings: dict[str, Any], make: Callable[[], Outcome]) -> Outcome:
    """The outcome that the file has for exactly these settings, or a new one, which is entered; None keeps nothing.

    The file is whole at any time, and may hold what others have entered with settings of their own.
    """
    plain = json.loads(json.dumps(settings))
    for entry in _entries(path):
        if entry["settings"] == plain and "outcome" in entry:
            return dict(entry["outcome"])
    outcome = make()
    if path is not None:
        entries = [*_entries(path), {"settings": plain, "outcome": outcome}]  # read again: others may have written
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        draft.replace(path)
    return outcome


def _entries(path: Path | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else []
    return found
