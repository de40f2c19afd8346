"""Checkpoints: folders that are whole or not there, written at once or behind the training.

    checkpoint/
      .metadata, __0_0.distcp   everything, by torch.distributed.checkpoint, under the names of flat.py
      model.safetensors         the model's own weights, for any other program
      plan.json                 the plan, for compile(plan=...)
      sums.json                 size and checksum of every file: written last

A new one is written beside the old and put in its place by renaming. Killed at any moment, one of them is whole:

    .checkpoint.new  write, flush ----------------------+ rename
    checkpoint       old -------------------+ rename    +--> new ------
    .checkpoint.old                         +--> old ------------+ remove
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from autodecouple.errors import CheckpointError
from autodecouple.flat import flatten, unflatten

WEIGHTS, PLAN, SUMS = "model.safetensors", "plan.json", "sums.json"
OWN = (".metadata", "__*.distcp", WEIGHTS, PLAN, SUMS)


def check_target(path: Path) -> None:
    """Raises CheckpointError where no checkpoint can be written, or would take the place of something else."""
    if not path.parent.is_dir():
        raise CheckpointError(f"the folder {path.parent} is not there: make it before saving {path.name}")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file, and a checkpoint is a folder: choose another name")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"nothing can be written into {path.parent}: save {path.name} elsewhere")
    found = sorted(os.listdir(path)) if path.exists() else []
    if others := [name for name in found if not any(fnmatch(name, own) for own in OWN)]:
        raise CheckpointError(
            f"{path} holds what is no part of a checkpoint, and would be replaced: {', '.join(others[:8])}. Choose a"
            " folder that is not there yet"
        )


def write(flat: Mapping[str, Any], path: Path) -> None:
    """Write beside the target and rename. Raises CheckpointError; the checkpoint of before is whole then."""
    new = path.with_name(f".{path.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
        new.mkdir()
        _write_files(flat, new)
        _flush(new)
        _put_in_place(new, path)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"{path} could not be written, and what was there before still is: {type(error).__name__}: {error}"
        ) from error


def _write_files(flat: Mapping[str, Any], folder: Path) -> None:
    from autodecouple import storage

    storage.write(dict(flat), folder)
    weights = {name: value for name, value in flat.items() if name.startswith("model.")}
    tensors = {name[len("model.") :]: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    (folder / PLAN).write_text(flat["progress"]["plan"], encoding="utf8")
    storage.write_weights(tensors, flat["progress"]["aliases"], folder / WEIGHTS)
    (folder / WEIGHTS).chmod((folder / PLAN).stat().st_mode)  # it is made for the owner's eyes only
    sums = {file.name: [file.stat().st_size, _sum(file)] for file in sorted(folder.iterdir())}
    (folder / SUMS).write_text(json.dumps(sums, indent=2), encoding="utf8")


def _sum(file: Path) -> int:
    """CRC-32: it is to find damage, not forgery."""
    value = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            value = zlib.crc32(part, value)
    return value


def _flush(folder: Path) -> None:
    """To the disk: a rename may be written before the data of what it renames."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(new: Path, path: Path) -> None:
    """Two renames; between them the old one stands beside, where `load` looks for it."""
    old = _beside(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed here, below
        os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint; raises CheckpointError for one that is not whole."""
    from autodecouple import storage

    folder = path if path.exists() else _beside(path)
    if not folder.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if not folder.is_dir():
        raise CheckpointError(
            f"{path} is a file, and a checkpoint is a folder. What torch.save() wrote of a state_dict() goes into"
            " load_state_dict(torch.load(...)); files that save() of an earlier version wrote cannot be read any more"
        )
    try:
        _check_sums(folder)
        return unflatten(storage.read(folder))
    except Exception as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {type(error).__name__}: {error}") from error


def _check_sums(folder: Path) -> None:
    """Damage within tensors would be read without a word."""
    for name, (size, value) in json.loads((folder / SUMS).read_text(encoding="utf8")).items():
        file = folder / name
        if file.stat().st_size != size or _sum(file) != value:
            raise ValueError(f"{name} is damaged")


class Writer:
    """Writes checkpoints, at once or in a thread of its own, one after the other."""

    def __init__(self) -> None:
        self._under_way: Future[None] | None = None

    def save(self, state: Mapping[str, Any], path: Path, background: bool) -> None:
        """Raises CheckpointError before anything is written where `path` cannot be; later ones come from `wait`."""
        self.wait()
        check_target(path)
        flat = flatten(state)
        if not background:
            write(flat, path)
            return
        copied = _copied(flat)
        pool = ThreadPoolExecutor(1, thread_name_prefix="autodecouple-checkpoint")
        self._under_way = pool.submit(write, copied, path)
        pool.shutdown(wait=False)  # the thread ends with its one task; the interpreter waits for that

    def wait(self) -> None:
        """Until the checkpoint under way is written; raises what went wrong, once."""
        if self._under_way is None:
            return
        try:
            self._under_way.result()
        finally:
            if self._under_way.done():  # Ctrl-C may come while it is not
                self._under_way = None


def _copied(flat: Mapping[str, Any]) -> dict[str, Any]:
    """On the CPU, so that training may go on at once."""
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for name, value in flat.items()
    }
