"""The example loaders: every format from a few rows made here, and the real files where they are at hand."""

from __future__ import annotations

import gzip
import io
import lzma
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from examples import data

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
LABELS = np.arange(40) % 10


def _check_images(split: data.Split, train_rows: int, test_rows: int, shape: tuple[int, ...]) -> None:
    assert split.train_x.shape == (train_rows, *shape) and split.test_x.shape == (test_rows, *shape)
    assert len(split.train_y) == train_rows and len(split.test_y) == test_rows
    assert split.train_x.dtype == torch.float32 and split.train_y.dtype == torch.int64
    assert split.train_x.mean((0, 2, 3)).abs().max() < 1e-3
    torch.testing.assert_close(split.train_x.std((0, 2, 3)), torch.ones(shape[0]), rtol=1e-3, atol=0)


def test_digits() -> None:
    split = data.digits()
    _check_images(split, 1437, 360, (1, 8, 8))
    assert split.num_classes == 10 and len(split.test_y.unique()) == 10
    assert all(torch.equal(a, b) for a, b in zip(split, data.digits(), strict=True))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", ["", "fashion_mnist", "FashionMNIST/raw"])
def test_fashion_mnist_files(tmp_path: Path, folder: str, suffix: str) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for stem in ("train", "t10k"):
        for kind, header, array in (("images-idx3", 16, PIXELS[:, 0, :28, :28]), ("labels-idx1", 8, LABELS)):
            raw = bytes(header) + array.astype(np.uint8).tobytes()
            name = tmp_path / folder / f"{stem}-{kind}-ubyte{suffix}"
            name.write_bytes(gzip.compress(raw) if suffix else raw)
    split = data.fashion_mnist(tmp_path, test_rows=7)
    _check_images(split, 40, 7, (1, 28, 28))
    assert split.train_y.tolist() == LABELS.tolist()


def test_cifar10_pickles(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        rows = slice(5 * i, 5 * i + 5)
        batch = {"data": PIXELS[rows].reshape(5, -1), "labels": LABELS[rows].tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    split = data.cifar10(tmp_path)
    _check_images(split, 25, 5, (3, 32, 32))
    assert split.test_y.tolist() == LABELS[25:30].tolist()
    _check_images(data.cifar10(folder, train_rows=8, test_rows=3), 8, 3, (3, 32, 32))


def _write_tiles(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Four 32x32 images per picture, two by two."""
    image = pytest.importorskip("PIL.Image")
    arrays = {"labels": labels.astype(np.uint8)}
    for i in range(len(pixels) // 4):
        tiles = pixels[4 * i : 4 * i + 4].reshape(2, 2, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(64, 64, 3)
        buffer = io.BytesIO()
        image.fromarray(tiles).save(buffer, "WEBP", lossless=True)
        arrays[f"webp_{i:02d}"] = np.frombuffer(buffer.getvalue(), np.uint8)
    np.savez(path, **arrays)


def test_cifar10_tiles(tmp_path: Path) -> None:
    _write_tiles(tmp_path / "cifar10_train_a.npz", PIXELS[:16], LABELS[:16])
    _write_tiles(tmp_path / "cifar10_train_b.npz", PIXELS[16:32], LABELS[16:32])
    _write_tiles(tmp_path / "cifar10_test.npz", PIXELS[32:], LABELS[32:])
    split = data.cifar10(tmp_path, train_rows=30)
    _check_images(split, 30, 8, (3, 32, 32))
    assert split.train_y.tolist() == LABELS[:30].tolist()
    pixels = torch.from_numpy(PIXELS).float()
    deviation, mean = torch.std_mean(pixels[:30], (0, 2, 3), keepdim=True)
    torch.testing.assert_close(split.test_x, (pixels[32:] - mean) / deviation)


def test_torchvision_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torchvision keeps colour images as NHWC arrays with a list of labels; nothing is downloaded unasked."""
    asked = []

    def dataset(root: str, train: bool, download: bool) -> SimpleNamespace:
        asked.append(download)
        return SimpleNamespace(data=PIXELS.transpose(0, 2, 3, 1), targets=LABELS.tolist())

    module = SimpleNamespace(datasets=SimpleNamespace(CIFAR10=dataset))
    monkeypatch.setitem(sys.modules, "torchvision", module)
    split = data.torchvision_images("CIFAR10", tmp_path, test_rows=6)
    _check_images(split, 40, 6, (3, 32, 32))
    assert asked == [False, False]


def test_absent_files_are_named(tmp_path: Path) -> None:
    for load in (data.fashion_mnist, data.cifar10, lambda path: data.text(path, "imdb")):
        with pytest.raises(FileNotFoundError, match="give its folder as --data"):
            load(tmp_path)


def test_tokenise() -> None:
    assert data.tokenise("It's <br />FUN, 'really' (10/10)!") == ["it's", "fun", "really", "10", "10"]


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_text(tmp_path: Path, suffix: str, pack: type[bytes]) -> None:
    train = 'label,text\n1,"good, good film"\n0,bad film bad\n1,good day\n'
    for name, rows in (("train", train), ("test", "label,text\n0,a bad night\n1,...\n")):
        (tmp_path / f"toy_{name}.csv{suffix}").write_bytes(pack(rows.encode()))
    split = data.text(tmp_path, "toy", vocab_size=5, max_len=3)
    good, bad, film, unknown, padding = 2, 3, 4, data.UNKNOWN, data.PADDING
    assert split.train_x.tolist() == [[good, good, film], [bad, film, bad], [good, unknown, padding]]
    assert split.test_x.tolist() == [[unknown, bad, unknown], [unknown, padding, padding]]
    assert split.train_y.tolist() == [1, 0, 1] and split.test_y.tolist() == [0, 1]
    assert len(data.text(tmp_path, "toy", train_rows=2).train_x) == 2


def test_batches_repeat_with_their_generator() -> None:
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    first, second = ([b[1] for b in data.batches(x, y, 4, True, torch.Generator().manual_seed(3))] for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4, 2] and len(data.batches(x, y, 4)) == 3
    assert torch.equal(torch.cat(first), torch.cat(second)) and torch.cat(first).sort()[0].tolist() == y.tolist()
    assert torch.equal(torch.cat([batch for _, batch in data.batches(x, y, 4)]), y)
    assert all(torch.equal(batch[:, 0].long(), target) for batch, target in data.batches(x, y, 3, True))


def test_crop_flip_moves_and_mirrors() -> None:
    """Each result is one of the 2 x (2p+1)^2 shifts of its image, and all of them occur."""
    image = torch.arange(1.0, 13.0).reshape(1, 1, 3, 4)
    padded = torch.nn.functional.pad(image, [1] * 4)
    shifts = [padded[..., i : i + 3, j : j + 4] for i in range(3) for j in range(3)]
    allowed = {tuple(s.flatten().tolist()) for shift in shifts for s in (shift, shift.flip(-1))}
    found = data.crop_flip(image.repeat(500, 1, 1, 1), torch.Generator().manual_seed(0), padding=1)
    assert {tuple(row.tolist()) for row in found.flatten(1)} == allowed
    again = data.crop_flip(image.repeat(500, 1, 1, 1), torch.Generator().manual_seed(0), padding=1)
    assert torch.equal(found, again)


def test_real_images(shared_data: Path) -> None:
    _check_images(data.fashion_mnist(shared_data, 500, 200), 500, 200, (1, 28, 28))
    split = data.cifar10(shared_data, 300, 100)
    _check_images(split, 300, 100, (3, 32, 32))
    assert split.num_classes == 10


@pytest.mark.parametrize(("name", "classes"), [("imdb", 2), ("ag_news", 4)])
def test_real_texts(shared_data: Path, name: str, classes: int) -> None:
    split = data.text(shared_data, name, vocab_size=2000, max_len=64, train_rows=300, test_rows=50)
    assert split.train_x.shape == (300, 64) and split.test_x.shape == (50, 64)
    assert split.num_classes == classes and split.train_x.max() < 2000
    assert (split.train_x != data.PADDING).any(1).all()


@pytest.mark.slow
def test_real_files_are_complete(shared_data: Path) -> None:
    split = data.cifar10(shared_data)
    _check_images(split, 50000, 10000, (3, 32, 32))
    assert split.train_y.bincount().tolist() == [5000] * 10 and split.test_y.bincount().tolist() == [1000] * 10
    assert len(data.fashion_mnist(shared_data).train_y) == 60000
