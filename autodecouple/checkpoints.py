"""Checkpoints: folders that are whole or not there, written at once or behind the training.

    checkpoint/
      .metadata, __<rank>_0.distcp   everything, by torch.distributed.checkpoint, under the names of flat.py
      model.safetensors              the model's own weights, for any other program: of several ranks
                                     model-0000<i>-of-0000<n>.safetensors and model.safetensors.index.json
      plan.json                      the plan, for compile(plan=...)
      sums.json                      size and checksum of every file: written last

Every rank writes its own part; rank 0 makes one checkpoint of them when all are there. A new one is written beside the
old and put in its place by renaming. Killed at any moment, all or any of the ranks, one of them is whole:

    rank 1                          write, flush --+
    rank 0              .c.new  make, write, flush +--> metadata, sums --+ rename
    checkpoint c        old -------------------------------------+ rename +--> new ------
                        .c.old                                   +--> old ------+ remove
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from autodecouple.errors import CheckpointError
from autodecouple.executors.ranks import ALONE, Notes, Ranks
from autodecouple.files import INDEX, PLAN, SUMS, Record, checksum, finish, hand_over, write_part
from autodecouple.flat import unflatten
from autodecouple.parts import WEIGHTS, Part

OWN = (".metadata", "__*.distcp", WEIGHTS, "model-*-of-*.safetensors", INDEX, PLAN, SUMS)
INTERVAL = 0.02


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


def write(part: Part, path: Path, notes: Notes) -> None:
    """Write this rank's part beside the target; rank 0 puts all of them in its place.

    Raises CheckpointError, on every rank; the checkpoint of before is whole then.
    """
    new = _beside(path, "new")
    with _told(path, notes):
        record = write_part(part, new)
        if part.rank > 0:
            hand_over(record, new, notes)
        notes.first("placed", lambda: _place(record, part, new, path, notes))
    with contextlib.suppress(RuntimeError):  # it is written, whatever becomes of the others
        notes.part()


@contextlib.contextmanager
def _told(path: Path, notes: Notes) -> Iterator[None]:
    """What fails on one rank fails on all, as CheckpointError, and leaves nothing behind."""
    try:
        yield
    except BaseException as error:
        text = notes.fail(_why(error, path, notes.ranks))
        if notes.ranks.rank == 0:
            shutil.rmtree(_beside(path, "new"), ignore_errors=True)
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(text) from error


def _why(error: BaseException, path: Path, ranks: Ranks) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    where = f"rank {ranks.rank}: " if ranks.size > 1 else ""
    return f"{path} could not be written, and what was there before still is: {where}{type(error).__name__}: {error}"


def _place(record: Record, part: Part, new: Path, path: Path, notes: Notes) -> str:
    finish(record, part.flat["progress"]["plan"], new, notes)
    _put_in_place(new, path)
    return str(path)


def _put_in_place(new: Path, path: Path) -> None:
    """Two renames; between them the old one stands beside, where `load` looks for it."""
    old = _beside(path, "old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed here, below
        os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, which: str) -> Path:
    return path.with_name(f".{path.name}.{which}")


def exists(path: Path) -> bool:
    """Whether there is a checkpoint, if only beside its place: a process may be killed between the two renames."""
    return path.exists() or _beside(path, "old").exists()


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint; raises CheckpointError for one that is not whole."""
    from autodecouple import storage

    folder = path if path.exists() else _beside(path, "old")
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
        if file.stat().st_size != size or checksum(file) != value:
            raise ValueError(f"{name} is damaged")


class Writer:
    """Writes checkpoints, at once or in a thread of its own, one after the other."""

    def __init__(self) -> None:
        self._under_way: Future[None] | None = None
        self._ranks = ALONE
        self._count = 0

    def save(self, part: Part, path: Path, background: bool, ranks: Ranks = ALONE) -> None:
        """Raises CheckpointError before anything is written where `path` cannot be; later ones come from `wait`.

        Of several ranks all call this; where it is written says rank 0.
        """
        self.wait()
        self._count += 1
        self._ranks, notes = ranks, Notes(ranks, self._count)
        behind = dataclasses.replace(notes, in_front=False)
        try:
            path = self._begin(path, notes)
            if not background:
                write(part, path, notes)
        except (Exception, KeyboardInterrupt):
            ranks.check()  # what has ended the training is the error to see
            raise
        if background:
            self._write_behind(part.copied(), path, behind)

    def _begin(self, path: Path, notes: Notes) -> Path:
        """Check the target and make the folder beside it, once for all ranks."""

        def act() -> str:
            check_target(path)
            new = _beside(path, "new")
            shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
            new.mkdir()
            return str(path)

        with _told(path, notes):
            return Path(notes.first("path", act))

    def _write_behind(self, part: Part, path: Path, notes: Notes) -> None:
        pool = ThreadPoolExecutor(1, thread_name_prefix="autodecouple-checkpoint")
        self._under_way = pool.submit(write, part, path, notes)
        pool.shutdown(wait=False)  # the thread ends with its one task; the interpreter waits for that

    def wait(self) -> None:
        """Until the checkpoint under way is written; raises what went wrong, once."""
        if self._under_way is None:
            return
        try:
            while not self._under_way.done():
                concurrent.futures.wait([self._under_way], INTERVAL)
                self._ranks.check()
            self._under_way.result()
        finally:
            if self._under_way.done():  # Ctrl-C may come while it is not
                self._under_way = None
