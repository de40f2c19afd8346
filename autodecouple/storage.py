"""How a state lies in a folder: torch.distributed.checkpoint for all of it, safetensors for the model's weights.

Imported only where something is saved or loaded, since torch.distributed.checkpoint takes a second to import.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from autodecouple.errors import CheckpointError

Flat = dict[str, Any]
_AS_IT_IS = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
"""Flattening, either way, takes plain data apart and loses empty dicts."""


@dataclass(frozen=True)
class Written:
    """What one rank wrote, as the metadata of the whole needs it."""

    plan: SavePlan
    results: list[WriteResult]


def write(flat: Flat, folder: Path, rank: int = 0) -> Written:
    """Write one rank's tensors and plain data with torch.distributed.checkpoint.

    Its steps one by one: `dcp.save` of several ranks waits inside collectives, which a rank that is killed never ends,
    and of one it warns every time. The ranks' names differ, so none has to know of the others'. Raises CheckpointError
    for data that could not be read again.
    """
    for name, value in flat.items():
        _check_plain(name, value)
    planner, writer = DefaultSavePlanner(**_AS_IT_IS), _writer(folder)
    planner.set_up_planner(flat, writer.storage_meta(), is_coordinator=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plan = planner.finish_plan(writer.prepare_global_plan([plan] * (rank + 1))[rank])  # files are named by the place
    return Written(plan, writer.write_data(plan, planner).wait())


def finish(parts: Sequence[Written], folder: Path) -> None:
    """Write the metadata of all ranks' parts, which makes them one checkpoint."""
    _, metadata = DefaultSavePlanner(**_AS_IT_IS).create_global_plan([part.plan for part in parts])
    _writer(folder).finish(metadata, [part.results for part in parts])


def _writer(folder: Path) -> FileSystemWriter:
    writer = FileSystemWriter(folder, sync_files=False)
    writer.set_up_storage_writer(True)
    return writer


def read(folder: Path) -> Flat:
    """Everything that `write` wrote; tensors come to the CPU. Runs no code that a file might hold."""
    planner, reader = _Planner(**_AS_IT_IS), _Reader(folder)
    metadata = reader.read_metadata()
    flat = {name: _room(item) for name, item in metadata.state_dict_metadata.items()}
    planner.set_up_planner(flat, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, True)
    plans = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    plan = planner.finish_plan(reader.prepare_global_plan(plans)[0])
    reader.read_data(plan, planner).wait()
    return flat


def write_weights(weights: Mapping[str, torch.Tensor], aliases: Mapping[str, str], path: Path) -> None:
    """Write a file of safetensors, which every version of torch can read, and `safetensors.torch.load_model` loads."""
    tensors = {name: value.detach().contiguous() for name, value in weights.items()}
    own = {name: first for name, first in aliases.items() if first in tensors}
    save_file(tensors, path, metadata={"format": "pt", **own})


def _room(item: Any) -> torch.Tensor | None:
    if not isinstance(item, TensorStorageMetadata):
        return None  # plain data
    return torch.empty(item.size, dtype=item.properties.dtype)


def _check_plain(name: str, value: Any) -> None:
    """Numbers, text and their containers can be read again; what would run code on reading cannot."""
    if isinstance(value, torch.Tensor):
        return
    try:
        torch.save(value, buffer := io.BytesIO())
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{name} holds what a checkpoint cannot: numbers, tensors, text and containers of them can be read again"
            f" ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As it stands in the file, by an unpickler that knows nothing else."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"its metadata is a {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Of torch.distributed.checkpoint's own records, and what they are made of."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "torch.distributed.checkpoint.metadata": _RECORDS,
            "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
            "torch.serialization": ("_get_layout",),
            "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
            "torch": ("Size", *_DTYPES),
        }
        if name not in known.get(module, ()):
            raise pickle.UnpicklingError(f"its metadata names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


_RECORDS = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")  # fmt: skip
_DTYPES = tuple(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
