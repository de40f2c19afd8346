"""The public spellings: whatever fails here breaks somebody's script."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

import autodecouple
from autodecouple import errors

# The one list to edit when a name is added; a name goes only with a new minor version and a line in the changelog.
PUBLIC = {
    "autodecouple": {
        "capture", "compile", "plan", "simulate",
        "DataParallel", "Decoupled", "Device", "Plan", "Timeline",
        "SupCon", "DeInfoReg", "EarlyExit", "Associated", "Downstream",
    },
    "autodecouple.schedules": {"Sequential", "Streaming", "MicroBatched", "GPipe", "OneFOneB"},
}  # fmt: skip

REQUIRED = inspect.Parameter.empty
KEYWORDS: dict[str, dict[str, Any]] = {
    "compile": {
        "model": REQUIRED, "criterion": ..., "optimizer": ..., "n_stages": ..., "loss": ..., "example_inputs": None,
        "scheduler": None, "devices": None, "plan": None, "schedule": "streaming", "cost": "flops",
    },
    "plan": {"model": REQUIRED, "example_inputs": ..., "n_stages": ...},
    "simulate": {"plan": REQUIRED, "schedule": "streaming", "batches": ...},
}  # fmt: skip
"""Parameters and their defaults; `...` leaves the default open."""

MEMBERS = {
    "Decoupled": {"train_step", "synchronize", "fit", "model", "exits", "__call__"},
    "Plan": {"to_json", "from_json", "balance", "speedup", "_repr_mimebundle_"},
    "Timeline": {"makespan", "bubble", "busy", "_repr_mimebundle_"},
}


@pytest.mark.parametrize("module", PUBLIC)
def test_documented_names_are_there(module: str) -> None:
    loaded = importlib.import_module(module)
    missing = [name for name in sorted(PUBLIC[module]) if not hasattr(loaded, name)]
    assert not missing


def test_all_is_the_documented_list() -> None:
    assert {name for name in autodecouple.__all__ if not name.startswith("_")} == PUBLIC["autodecouple"]


@pytest.mark.parametrize("function", KEYWORDS)
def test_keywords(function: str) -> None:
    parameters = inspect.signature(getattr(autodecouple, function)).parameters
    for name, default in KEYWORDS[function].items():
        assert name in parameters, f"{function}() has no parameter {name!r}"
        if default is not ...:
            assert parameters[name].default == default, name
    assert next(iter(parameters)) == next(iter(KEYWORDS[function]))


@pytest.mark.parametrize("kind", MEMBERS)
def test_members(kind: str) -> None:
    missing = [name for name in sorted(MEMBERS[kind]) if not hasattr(getattr(autodecouple, kind), name)]
    assert not missing


def test_one_except_clause_catches_them_all() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]
    assert len(kinds) > 1 and all(issubclass(kind, errors.AutodecoupleError) for kind in kinds)


def test_version_is_a_version() -> None:
    assert autodecouple.__version__.count(".") == 2
