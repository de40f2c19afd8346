"""Data sets of the accuracy tables: tensors in memory, in a fixed order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import data as files

FOLDER = "AUTODECOUPLE_DATA"
"""The environment variable that names the folder of the files."""

TEXTS = ("imdb", "ag_news")
NAMES = ("cifar10", "fashion_mnist", *TEXTS)

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Training and test rows.

    Images are float32 (N, C, H, W), channels last in memory, mean 0 and deviation 1 per channel of the training rows;
    texts int64 (N, T) with 0 as padding and 1 for what the vocabulary lacks; targets int64 (N,).

    words: size of the vocabulary, which is made of the training rows alone; None for images
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    words: int | None = None

    def held_out(self, rows: int) -> Data:
        """The last training rows in place of the test rows: what settings are chosen on."""
        x, y = self.train_x, self.train_y
        return replace(self, train_x=x[:-rows], train_y=y[:-rows], test_x=x[-rows:], test_y=y[-rows:])

    def to(self, device: torch.device) -> Data:
        tensors = {name: getattr(self, name).to(device) for name in ("train_x", "train_y", "test_x", "test_y")}
        return replace(self, **tensors)

    def epochs(self, count: int, rows: int, seed: int, augment: bool = False) -> Iterator[Iterator[Batch]]:
        """Epochs of batches, each in an order of its own; augment: crop and flip. The seed decides all of it."""
        chance = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield self._epoch(rows, chance, augment)

    def _epoch(self, rows: int, chance: torch.Generator, augment: bool) -> Iterator[Batch]:
        for index in torch.randperm(len(self.train_x), generator=chance).split(rows):
            x = self.train_x[index]
            yield _laid_out(files.crop_flip(x, chance) if augment else x), self.train_y[index]

    def test_batches(self, rows: int = 500) -> Iterator[Batch]:
        return zip(self.test_x.split(rows), self.test_y.split(rows), strict=True)


def load(
    name: str,
    folder: str | Path | None = None,
    train_rows: int | None = None,
    test_rows: int | None = None,
    *,
    words: int = 30_000,
    length: int = 256,
) -> Data:
    """The first rows of a data set from its files (see README.md).

    folder: of the files; None is that of the environment variable AUTODECOUPLE_DATA
    words, length: of texts: the vocabulary's size, and the words that are kept of each

    AG News has 29,224 training rows in the files that this was measured on, of the original 120,000.
    """
    if name not in NAMES:
        raise ValueError(f"data set {name!r} is not known; there are: {', '.join(NAMES)}")
    folder = folder or os.environ.get(FOLDER)
    if folder is None:
        raise ValueError(f"no folder: pass --data DIR or set {FOLDER}")
    if name in TEXTS:
        split = files.text(folder, name, words, length, train_rows, test_rows)
        return Data(name, *split, split.num_classes, words)
    read = {"cifar10": files.cifar10, "fashion_mnist": files.fashion_mnist}[name]
    split = read(folder, train_rows, test_rows)
    return Data(name, _as_32(split.train_x), split.train_y, _as_32(split.test_x), split.test_y, split.num_classes)


def _as_32(images: Tensor) -> Tensor:
    """Smaller images get a frame: VGG halves them four times."""
    missing = 32 - images.shape[-1]
    return _laid_out(F.pad(images, [missing // 2, missing - missing // 2] * 2) if missing > 0 else images)


def _laid_out(x: Tensor) -> Tensor:
    """Convolutions in bfloat16 take a third of the time on a processor with the channels last."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
