"""Who may import whom: read from the source, so that no import order can hide a cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import autodecouple

PACKAGE = Path(__file__).resolve().parent.parent / "autodecouple"

# From the bottom up: a module imports from its own row and the rows above it here, never from one below.
LAYERS: tuple[set[str], ...] = (
    {"errors", "_version"},
    {"plans", "timeline", "schedules", "devices", "waits"},
    {"simulator", "cost", "view"},
    {"graph", "objectives", "passes", "randomness", "shards", "signals", "synced", "two_views"},
    {"halves", "hops", "replication", "stage", "stage_state", "stashing", "work"},
    {"backends"},
    {"executors"},
    {"options", "pipeline", "refusals", "optimizers", "states", "flat", "replanning", "walk", "exits"},
    {"parts", "storage", "files", "checkpoints", "epochs", "loops", "fitting"},
    {"api", "decoupled"},
    {"__init__"},
    {"integrations"},
    {"cli", "__main__", "doctor", "targets", "terminal"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
NO_TORCH = set().union(*LAYERS[:3])
STRANGERS = {("objectives", "schedules"), ("schedules", "objectives")}
LAZY = {("plans", "view"), ("timeline", "view")}
"""A plan and a timeline draw themselves: allowed inside a function only, where no cycle can come of it."""


@dataclass(frozen=True)
class Import:
    """`importer` and `imported` are units: the first name below `autodecouple`; other packages keep their own name."""

    importer: str
    imported: str
    where: str
    inside_function: bool = False
    ours: bool = True


def _unit(module: str) -> str:
    """`autodecouple.passes.trace` -> `passes`; `autodecouple` -> `__init__`."""
    return [*module.split("."), "__init__"][1]


def _name(file: Path) -> str:
    """The dotted name that a file is imported by; a package's own file ends in `__init__`."""
    return ".".join(("autodecouple", *file.relative_to(PACKAGE).with_suffix("").parts))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _statements(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements that run, each with whether it stands inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside
        elif _is_type_checking(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield from _statements(ast.Module([other], []), inside)
        else:
            yield from _statements(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def _targets(statement: ast.Import | ast.ImportFrom, module: str) -> list[str]:
    """Dotted names that a statement in `module` imports; `from autodecouple import x` gives `autodecouple.x`."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    base = statement.module or ""
    if statement.level:
        base = ".".join([*module.split(".")[: -statement.level], *filter(None, [statement.module])])
    return [f"{base}.{alias.name}" for alias in statement.names] if base == "autodecouple" else [base]


def imports_of(source: str, module: str) -> Iterator[Import]:
    """What `source` imports when it stands in `module` (`autodecouple.passes.trace`)."""
    for statement, inside in _statements(ast.parse(source)):
        where = f"{module}:{statement.lineno}"
        for target in _targets(statement, module):
            ours = target.split(".")[0] == "autodecouple"
            imported = _unit(target) if ours else target.split(".")[0]
            yield Import(_unit(module), imported, where, inside, ours)


def complaint(item: Import) -> str | None:
    """Why an import breaks the rule, or None."""
    pair = (item.importer, item.imported)
    if not item.ours:
        forbidden = item.imported == "torch" and item.importer in NO_TORCH
        return f"{item.where}: {item.importer} must work without torch" if forbidden else None
    if pair in STRANGERS:
        return f"{item.where}: {item.importer} must not know {item.imported}"
    if pair in LAZY and item.inside_function:
        return None
    # A name that is no module is a public one (`from autodecouple import Plan`), which only the rows below it may use.
    if RANK.get(item.importer, len(LAYERS)) < RANK.get(item.imported, RANK["__init__"]):
        return f"{item.where}: {item.importer} is below {item.imported} and must not import it"
    return None


def _files() -> list[Path]:
    folders = [PACKAGE, *(folder for folder in PACKAGE.iterdir() if folder.is_dir())]
    return sorted(file for folder in folders for file in folder.glob("*.py"))


def test_every_module_has_its_layer() -> None:
    unknown = {_unit(_name(file)) for file in _files()} - set(RANK)
    assert not unknown, f"enter {', '.join(sorted(unknown))} in LAYERS of {Path(__file__).name}, at the right height"


@pytest.mark.parametrize("file", _files(), ids=_name)
def test_imports_point_downwards(file: Path) -> None:
    found = imports_of(file.read_text(encoding="utf8"), _name(file))
    complaints = [text for item in found if (text := complaint(item))]
    assert not complaints, "\n".join(complaints)


def test_no_module_has_the_name_of_a_public_function() -> None:
    """`autodecouple.plan` would be the function or the module, depending on what was imported last."""
    functions = {name for name in autodecouple.__all__ if name.islower() and not name.startswith("_")}
    modules = {file.stem for file in _files()} | {folder.name for folder in PACKAGE.iterdir() if folder.is_dir()}
    assert not functions & modules


@pytest.mark.parametrize(
    ("module", "source", "right"),
    [
        ("plans", "from autodecouple.errors import PlanError", True),
        ("plans", "import torch", False),
        ("plans", "def draw():\n    import torch", False),
        ("plans", "from autodecouple.view import text", False),
        ("plans", "def draw():\n    from autodecouple.view import text", True),
        ("plans", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", True),
        ("plans", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import torch", False),
        ("cost", "from torch import nn", False),
        ("simulator", "from autodecouple.schedules.actions import Op", True),
        ("objectives.supcon", "from . import heads", True),
        ("objectives.supcon", "from ..plans import Plan", True),
        ("objectives.supcon", "from ..schedules import actions", False),
        ("objectives.supcon", "from .. import schedules", False),
        ("objectives.__init__", "from .supcon import SupCon", True),
        ("schedules.gpipe", "from autodecouple import objectives", False),
        ("passes.trace", "import torch.fx", True),
        ("passes.trace", "from autodecouple import Plan", False),
        ("passes.trace", "from autodecouple.stage import Stage", False),
        ("stage", "from autodecouple.executors.inline import Inline", False),
        ("api", "import autodecouple", False),
        ("cli", "import autodecouple", True),
        ("__init__", "from autodecouple.api import compile", True),
    ],
)
def test_the_rule_itself(module: str, source: str, right: bool) -> None:
    found = [complaint(item) for item in imports_of(source, f"autodecouple.{module}")]
    assert (not any(found)) is right, found
