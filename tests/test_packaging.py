"""What is shipped is what stands in the tree: every package listed, real files in place of the symlink."""

from __future__ import annotations

import ast
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
OPTIONAL = {"integrations"}
"""Packages whose needs are extras."""


def _walk() -> list[Path]:
    """Folders of the package, through the symlink."""
    walk = os.walk(ROOT / "autodecouple", followlinks=True)
    return [Path(folder) for folder, _, _ in walk if Path(folder).name != "__pycache__"]


def test_every_package_is_listed() -> None:
    """An unlisted package imports fine from a checkout, and is absent from the wheel."""
    found = {".".join(f.relative_to(ROOT).parts) for f in _walk() if (f / "__init__.py").is_file()}
    assert found == set(PACKAGES)


def test_data_files_are_listed() -> None:
    """Whatever is not Python must match a pattern of package-data, or the wheel lacks it."""
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    files = [file for folder in _walk() for file in folder.iterdir() if file.is_file() and file.suffix != ".py"]
    lost = [f for f in files if not any(f.match(p) for p in patterns.get(".".join(f.relative_to(ROOT).parts[:-1]), []))]
    assert not lost


def test_every_import_is_a_declared_dependency() -> None:
    names = {text.split(">")[0] for text in PYPROJECT["project"]["dependencies"]} | {"autodecouple"}
    files = [file for folder in _walk() if folder.name not in OPTIONAL for file in folder.glob("*.py")]
    nodes = [node for file in files for node in ast.parse(file.read_text(encoding="utf8")).body]
    targets = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    targets |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert {target.split(".")[0] for target in targets} <= names | sys.stdlib_module_names


def test_a_second_copy_of_passes_is_refused() -> None:
    """`import passes` from the root would make a second `Graph` that is no instance of the first."""
    run = subprocess.run([sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "import autodecouple.passes, not passes" in run.stderr


def _build(kind: str, source: Path, out: Path) -> Path:
    """Call the build backend as pip does, without the isolated environment that it would fetch."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    out.mkdir()
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, check=True, capture_output=True, text=True)
    return next(out.iterdir())


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One wheel built from the tree, one from the sdist, both from a copy, since a build litters its source."""
    folder = tmp_path_factory.mktemp("build")
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    tree = shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=skip)
    with tarfile.open(_build("sdist", tree, folder / "sdist")) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(folder / "unpacked", filter="data")
    unpacked = next((folder / "unpacked").iterdir())
    return {"tree": _build("wheel", tree, folder / "a"), "sdist": _build("wheel", unpacked, folder / "b")}


@pytest.mark.slow
def test_wheels_hold_real_files(wheels: dict[str, Path]) -> None:
    expected = {str(f.relative_to(ROOT)) for folder in _walk() for f in folder.iterdir() if f.is_file()}
    for origin, wheel in wheels.items():
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if ".dist-info/" not in m.filename]
        assert {m.filename for m in members} == expected, origin
        assert not [m.filename for m in members if stat.S_ISLNK(m.external_attr >> 16)], origin


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["tree", "sdist"])
def test_wheels_import_from_elsewhere(wheels: dict[str, Path], origin: str, tmp_path: Path) -> None:
    zipfile.ZipFile(wheels[origin]).extractall(tmp_path / "site")
    code = "import autodecouple.passes, autodecouple.cli; print(autodecouple.passes.__file__, autodecouple.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.split()[0]).is_relative_to(tmp_path / "site")
