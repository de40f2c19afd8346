"""Benchmark data as plain tensors: training inputs and targets, test inputs and targets.

Images are float32 (N, C, H, W) with mean 0 and deviation 1 per channel of the training rows; texts are int64 (N, T)
token indices with 0 as padding; targets are int64 (N,). Nothing is downloaded unless asked for.
"""

from __future__ import annotations

import csv
import gzip
import io
import lzma
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

PADDING, UNKNOWN = 0, 1
"""Token indices that stand for no word of the vocabulary."""

_OPENERS: Mapping[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}


class Split(NamedTuple):
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def num_classes(self) -> int:
        return int(self.train_y.max()) + 1


# --- images -----------------------------------------------------------------------------------------------------------


def digits(test_rows: int = 360, seed: int = 0) -> Split:
    """scikit-learn's 1,797 handwritten digits, 8x8, part of the package; the test rows are drawn at random."""
    from sklearn.datasets import load_digits  # only this loader needs it

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(seed)).numpy()
    x, y = bunch.images[order][:, None], bunch.target[order]
    return _images((x[test_rows:], y[test_rows:]), (x[:test_rows], y[:test_rows]))


def fashion_mnist(path: str | Path, train_rows: int | None = None, test_rows: int | None = None) -> Split:
    """Fashion-MNIST from its four IDX files, plain or .gz, in `path`, its `fashion_mnist` or `FashionMNIST/raw`."""
    folders = [Path(path) / name for name in ("", "fashion_mnist", "FashionMNIST/raw")]
    parts = []
    for stem, rows in (("train", train_rows), ("t10k", test_rows)):
        x = _idx(_find(folders, f"{stem}-images-idx3-ubyte"), 16, rows, 28 * 28).reshape(-1, 1, 28, 28)
        parts.append((x, _idx(_find(folders, f"{stem}-labels-idx1-ubyte"), 8, rows, 1)))
    return _images(*parts)


def cifar10(path: str | Path, train_rows: int | None = None, test_rows: int | None = None) -> Split:
    """CIFAR-10 from `path`: the .npz files with lossless WebP tiles, or the original `cifar-10-batches-py` pickles.

    A prefix is a random sample in both. Unpickling runs code: give only files that you trust.
    """
    folder = Path(path)
    if (folder / "cifar10_train_a.npz").is_file():
        train, test = (chain.from_iterable(map(_tiles, sorted(folder.glob(f"cifar10_{k}*.npz")))) for k in _TRAIN_TEST)
    else:
        folders = [folder, folder / "cifar-10-batches-py"]
        train = (_pickled(_find(folders, f"data_batch_{i}")) for i in range(1, 6))
        test = (_pickled(_find(folders, name)) for name in ("test_batch",))
    return _images(_take(train, train_rows), _take(test, test_rows))


def torchvision_images(
    name: str,
    path: str | Path,
    train_rows: int | None = None,
    test_rows: int | None = None,
    download: bool = False,
) -> Split:
    """`torchvision.datasets.<name>` ("CIFAR10", "CIFAR100", "FashionMNIST", ...) from the folder torchvision keeps."""
    from torchvision import datasets

    kind, parts = getattr(datasets, name), []
    for train, rows in ((True, train_rows), (False, test_rows)):
        data = kind(str(path), train=train, download=download)
        x = np.asarray(data.data[:rows])
        parts.append((x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2), np.asarray(data.targets[:rows])))
    return _images(*parts)


Rows = tuple[np.ndarray, np.ndarray]
"""Pixels (N, C, H, W) of any scale, labels (N,)."""

_TRAIN_TEST = ("train", "test")


def _images(train: Rows, test: Rows) -> Split:
    """Floats with the training rows' mean and deviation per channel taken out."""
    train_x, test_x = (torch.from_numpy(x.astype(np.float32, order="C")) for x, _ in (train, test))
    train_y, test_y = (torch.from_numpy(y.astype(np.int64)) for _, y in (train, test))
    deviation, mean = torch.std_mean(train_x, (0, 2, 3), keepdim=True)
    for x in (train_x, test_x):
        x.sub_(mean).div_(deviation)  # in place: CIFAR-10 takes 700 MB as it is
    return Split(train_x, train_y, test_x, test_y)


def _take(parts: Iterator[Rows], rows: int | None) -> Rows:
    """The first rows of several parts, opening no more of them than needed."""
    xs, ys, count = [], [], 0
    while (rows is None or count < rows) and (part := next(parts, None)) is not None:
        xs.append(part[0])
        ys.append(part[1])
        count += len(part[1])
    return np.concatenate(xs)[:rows], np.concatenate(ys)[:rows]


def _idx(path: Path, header: int, rows: int | None, row_bytes: int) -> np.ndarray:
    with _OPENERS.get(path.suffix, open)(path, "rb") as file:
        file.read(header)
        return np.frombuffer(file.read(-1 if rows is None else rows * row_bytes), np.uint8)


def _tiles(path: Path, size: int = 32) -> Iterator[Rows]:
    """One part per picture of an .npz: a square of tiles, row by row."""
    from PIL import Image  # only this format needs it

    with np.load(path) as archive:
        labels, start = archive["labels"], 0
        for key in sorted(key for key in archive.files if key.startswith("webp_")):
            picture = np.asarray(Image.open(io.BytesIO(archive[key].tobytes())).convert("RGB"))
            down, right = (length // size for length in picture.shape[:2])
            tiles = picture.reshape(down, size, right, size, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size)
            yield tiles, labels[start : start + len(tiles)]
            start += len(tiles)


def _pickled(path: Path) -> Rows:
    with path.open("rb") as file:
        batch = pickle.load(file, encoding="latin1")
    return batch["data"].reshape(-1, 3, 32, 32), np.asarray(batch["labels"])


# --- texts ------------------------------------------------------------------------------------------------------------


def text(
    path: str | Path,
    name: str,
    vocab_size: int = 30000,
    max_len: int = 256,
    train_rows: int | None = None,
    test_rows: int | None = None,
) -> Split:
    """Texts from `<name>_train.csv` and `<name>_test.csv` (plain, .gz or .xz; header `label,text`) in `path`.

    The vocabulary is the `vocab_size` - 2 most frequent words of the training rows. A text is cut, or filled up with
    padding, to `max_len` words.
    """
    files = (_find([Path(path)], f"{name}_{part}.csv") for part in _TRAIN_TEST)
    train, test = (read_csv(file, rows) for file, rows in zip(files, (train_rows, test_rows), strict=True))
    words = vocabulary((row for _, row in train), vocab_size)
    parts = [
        (encode([row for _, row in rows], words, max_len), torch.tensor([y for y, _ in rows])) for rows in (train, test)
    ]
    return Split(*chain.from_iterable(parts))


def read_csv(path: Path, rows: int | None = None) -> list[tuple[int, str]]:
    """(label, text) of the first rows after the header."""
    with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf8", newline="") as file:
        return [(int(row["label"]), row["text"]) for row in islice(csv.DictReader(file), rows)]


def tokenise(sentence: str) -> list[str]:
    """Lower-case words and numbers; HTML tags and punctuation are dropped."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", re.sub(r"<[^>]*>", " ", sentence.lower()))


def vocabulary(sentences: Iterator[str], size: int) -> dict[str, int]:
    """Index of each of the most frequent words, from 2 on; words of equal frequency in the order of their letters."""
    counts = Counter(chain.from_iterable(map(tokenise, sentences)))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {word: index for index, (word, _) in enumerate(ranked[: size - 2], start=2)}


def encode(sentences: list[str], words: Mapping[str, int], max_len: int) -> Tensor:
    """(N, max_len) token indices. A text without a word becomes one unknown word, so that no row is all padding."""
    tokens = torch.full((len(sentences), max_len), PADDING)
    for row, sentence in zip(tokens, sentences, strict=True):
        found = [words.get(word, UNKNOWN) for word in tokenise(sentence)[:max_len]] or [UNKNOWN]
        row[: len(found)] = torch.tensor(found)
    return tokens


# --- batches ----------------------------------------------------------------------------------------------------------


def batches(
    x: Tensor, y: Tensor, batch_size: int, shuffle: bool = False, generator: torch.Generator | None = None
) -> DataLoader[tuple[Tensor, Tensor]]:
    """A loader of (inputs, targets), one indexing per batch; the last batch may be smaller."""
    data = TensorDataset(x, y)
    order = RandomSampler(data, generator=generator) if shuffle else SequentialSampler(data)
    return DataLoader(data, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)


def crop_flip(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each image (N, C, H, W) shifted by up to `padding` pixels (zeros move in) and mirrored half of the time."""
    count, _, height, width = x.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows, columns = top + torch.arange(height), torch.arange(width)
    columns = left + torch.where(mirrored, columns.flip(0), columns)
    padded = torch.nn.functional.pad(x, [padding] * 4).permute(0, 2, 3, 1)
    picked = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def _find(folders: list[Path], name: str) -> Path:
    """The first file of that name, plain or compressed."""
    for folder in folders:
        for suffix in ("", *_OPENERS):
            if (path := folder / f"{name}{suffix}").is_file():
                return path
    raise FileNotFoundError(
        f"no {name} (plain, .gz or .xz) in {', '.join(map(str, folders))}: give its folder as --data"
    )
