"""The files of a checkpoint: each rank's own, and those that make one of them."""

from __future__ import annotations

import json
import os
import pickle
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autodecouple.errors import CheckpointError
from autodecouple.executors.ranks import Notes
from autodecouple.parts import WEIGHTS, Part

INDEX, PLAN, SUMS = f"{WEIGHTS}.index.json", "plan.json", "sums.json"
INTERVAL, PATIENCE = 0.02, 10.0
"""Seconds until a file that another host has written is seen here: network file systems look only now and then."""


@dataclass(frozen=True)
class Record:
    """What one rank wrote: for the metadata; the checksums of its files; which weights, and their bytes."""

    written: Any
    sums: Mapping[str, tuple[int, int]]
    weights: Mapping[str, str]
    weight_bytes: int


def write_part(part: Part, folder: Path) -> Record:
    """Write this rank's files, and flush them."""
    from autodecouple import storage

    written = storage.write(dict(part.flat), folder, part.rank)
    weights = {name[len("model.") :]: value for name, value in part.flat.items() if name.startswith("model.")}
    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    files = sorted(folder.glob(f"__{part.rank}_*.distcp"))
    if part.weights is not None:
        file = folder / part.weights
        storage.write_weights(tensors, part.aliases, file)
        file.chmod(files[0].stat().st_mode)  # it is made for the owner's eyes only
        files.append(file)
    flush(files)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return Record(written, _sums(files), dict.fromkeys(tensors, part.weights or ""), num_bytes)


def hand_over(record: Record, folder: Path, notes: Notes) -> None:
    """Tell rank 0 what this one wrote, by a file beside it: that shows whether both see the same folder."""
    (folder / f"__{notes.ranks.rank}.part").write_bytes(pickle.dumps(record))
    notes.leave(f"part/{notes.ranks.rank}")


def finish(record: Record, plan: str, folder: Path, notes: Notes) -> None:
    """Make one checkpoint of all parts, of which `record` is the first, when the others are there."""
    from autodecouple import storage

    records = [record, *(_take(rank, folder, notes) for rank in range(1, notes.ranks.size))]
    before = set(folder.iterdir())
    storage.finish([record.written for record in records], folder)
    (folder / PLAN).write_text(plan, encoding="utf8")
    weights = {name: file for record in records for name, file in record.weights.items()}
    if len(set(weights.values())) > 1:
        index = {"metadata": {"total_size": sum(record.weight_bytes for record in records)}, "weight_map": weights}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf8")
    sums = _sums(sorted(set(folder.iterdir()) - before))
    sums |= {name: value for record in records for name, value in record.sums.items()}
    (folder / SUMS).write_text(json.dumps(sums, indent=2, sort_keys=True), encoding="utf8")
    flush([file for file in folder.iterdir() if file not in before])
    flush([folder])


def _take(rank: int, folder: Path, notes: Notes) -> Record:
    """What another rank wrote, once it has."""
    notes.hear(f"part/{rank}")
    file, stop = folder / f"__{rank}.part", time.monotonic() + PATIENCE
    while not file.exists():
        if time.monotonic() > stop:
            raise CheckpointError(
                f"rank {rank} has written its part of {folder.parent}, but rank 0 does not see it: all ranks need the"
                " same folder, on a file system that their hosts share. Without one, write what state_dict() returns,"
                " which holds everything on every rank"
            )
        time.sleep(INTERVAL)
    record: Record = pickle.loads(file.read_bytes())
    file.unlink()
    return record


def _sums(files: Iterable[Path]) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_size, checksum(file)) for file in files}


def checksum(file: Path) -> int:
    """CRC-32: it is to find damage, not forgery."""
    value = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            value = zlib.crc32(part, value)
    return value


def flush(paths: Iterable[Path]) -> None:
    """To the disk: a rename may be written before the data of what it renames."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
