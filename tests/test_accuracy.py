"""The accuracy tables: equal weights and batches for all methods, tables that go on where they were stopped."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import numpy as np
import pytest
import torch
from torch import nn

from accuracy import data, memory, recipes, run, tables, training

ROWS = 48
TINY = ["--quick", "--train-rows", "32", "--test-rows", "16", "--epochs", "1", "--batch", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random pixels and random words in the files' own formats."""
    path, chance = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for stem in ("train", "t10k"):
        pixels, labels = chance.integers(256, size=ROWS * 28 * 28), np.arange(ROWS) % 10
        for kind, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            content = gzip.compress(bytes(header) + values.astype(np.uint8).tobytes())
            (path / f"{stem}-{kind}-ubyte.gz").write_bytes(content)
    for name, classes in (("imdb", 2), ("ag_news", 4)):
        for part in ("train", "test"):
            lines = [f'{i % classes},"word{i % 5} {part}ing a{i}"' for i in range(ROWS)]
            (path / f"{name}_{part}.csv").write_text("\n".join(["label,text", *lines]))
    return path


def tiny(name: str, folder: Path, **fields: Any) -> tuple[recipes.Recipe, data.Data]:
    small = {"train_rows": 32, "test_rows": 16, "epochs": 1, "batch": 16, "words": 40, "length": 5, "heads": 2} | fields
    recipe = dataclasses.replace(recipes.QUICK[name], **small)
    read = dict(words=recipe.words, length=recipe.length)
    return recipe, data.load(recipe.dataset, folder, recipe.train_rows, recipe.test_rows, **read)


def test_images_and_texts_become_tensors(folder: Path) -> None:
    images = data.load("fashion_mnist", folder, 40, 20)
    assert images.train_x.shape == (40, 1, 32, 32) and images.test_y.shape == (20,) and images.num_classes == 10
    texts = data.load("ag_news", folder, 40, 20, words=30, length=6)
    assert texts.train_x.shape == (40, 6) and texts.num_classes == 4 and int(texts.train_x.max()) < 30
    assert not (texts.train_x == 1).all(1).any(), "the vocabulary is made of the training rows"
    with pytest.raises(ValueError, match="mnist"):
        data.load("mnist", folder)


def test_without_a_folder_the_error_says_how_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data.FOLDER, raising=False)
    with pytest.raises(ValueError, match=data.FOLDER):
        data.load("imdb")


def test_the_seed_decides_order_and_augmentation(folder: Path) -> None:
    _, rows = tiny("fashion_mnist-vgg", folder)

    def all_of(seed: int) -> list[torch.Tensor]:
        return [tensor for epoch in rows.epochs(2, 10, seed, augment=True) for batch in epoch for tensor in batch]

    assert all(map(torch.equal, all_of(0), all_of(0)))
    assert not all(map(torch.equal, all_of(0), all_of(1)))
    epochs = [torch.cat([y for _, y in epoch]) for epoch in rows.epochs(2, 10, 0)]
    assert all(torch.equal(epoch.sort().values, rows.train_y.sort().values) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_held_out_rows_are_no_training_rows(folder: Path) -> None:
    _, rows = tiny("fashion_mnist-vgg", folder)
    part = rows.held_out(8)
    assert torch.equal(torch.cat([part.train_x, part.test_x]), rows.train_x)
    assert len(part.train_y) == 24 and len(part.test_y) == 8


def test_every_method_begins_with_the_same_weights(folder: Path) -> None:
    """With nothing learnt all methods answer alike, and their first losses at the last stage are the same number."""
    recipe, rows = tiny("imdb-lstm", folder, rate=0.0, width=8, batch=32)
    weights: list[list[torch.Tensor]] = []

    def keep(model: nn.Module) -> None:
        weights.append([parameter.detach().clone() for parameter in model.parameters()])

    losses = [training.train(recipe, rows, method, 2, watch=keep).losses[-1] for method in ("bp", "early_exit")]
    assert all(map(torch.equal, *weights))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_backprop_is_a_plain_loop(folder: Path) -> None:
    """Against the same steps written out here."""
    recipe, rows = tiny("imdb-lstm", folder, width=8, schedule="constant", optimizer="sgd", rate=0.05)
    found: list[nn.Module] = []
    training.train(recipe, rows, "bp", seed=3, watch=found.append)
    torch.manual_seed(3)
    model = recipe.model(rows)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
    for x, y in next(rows.epochs(1, recipe.batch, 3)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), found[0].parameters()))


def test_peak_memory_of_a_known_step() -> None:
    """Two tensors of 1 MiB at a time, beside 3 MiB that stay."""
    mebibyte = 2**18

    def step() -> None:
        for _ in range(3):
            first = torch.zeros(mebibyte)
            (first + 1).sum()

    peak = memory.peak_bytes(step, [torch.zeros(3 * mebibyte)] * 2, torch.device("cpu"))
    assert 0 <= peak - 5 * 2**20 < 4096


def result(method: str, accuracy: float, seed: int = 0, n_stages: int = 4) -> training.Result:
    return training.Result(method, n_stages, seed, accuracy, (accuracy,), (1.0,), 60.0, 2**20, 0.5, 10, 5)


def test_markdown_has_mean_deviation_and_the_gap_over_common_seeds() -> None:
    bp = [result("bp", 0.80, 0, 1), result("bp", 0.82, 1, 1), result("bp", 0.99, 2, 1)]
    lines = tables.markdown([*bp, result("auto", 0.79, 0), result("auto", 0.82, 1)]).splitlines()
    assert lines[-1] == "| `auto` | 4 | 80.50 ± 2.12 | +0.50 | 60 | 1 MiB | 50% | 2 |"
    assert "| `bp` | 1 | 87.00" in lines[2]


def test_a_book_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    made: list[tables.Key] = []

    def run_one(method: str, n_stages: int, seed: int) -> training.Result:
        made.append((method, n_stages, seed))
        if len(made) == 3:
            raise KeyboardInterrupt
        return result(method, 0.5, seed, n_stages)

    def start(settings: dict[str, Any], runs: list[tables.Key]) -> list[training.Result]:
        return tables.fill(tables.Book("t", settings, tmp_path / "book.json"), runs, run_one, lambda _: None)

    runs = [("bp", 4, 0), ("bp", 2, 0), ("auto", 4, 0), ("auto", 4, 1)]
    with pytest.raises(KeyboardInterrupt):
        start({"epochs": 1}, runs)
    assert made == [("bp", 1, 0), ("auto", 4, 0), ("auto", 4, 1)], "backprop has no stages"
    assert len(start({"epochs": 1}, runs)) == 3 and made[3:] == [("auto", 4, 1)]
    start({"epochs": 2}, runs[:1])
    assert made[4:] == [("bp", 1, 0)], "what was trained otherwise is another result"


def test_recipes_of_both_sizes_have_the_same_tables() -> None:
    assert recipes.FULL.keys() == recipes.QUICK.keys()
    for name, recipe in recipes.FULL.items():
        assert name == f"{recipe.dataset}-{recipe.network}"
        assert dataclasses.replace(recipes.QUICK[name], network="") != dataclasses.replace(recipe, network="")


def test_a_table_from_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    options = ["imdb-lstm", *TINY, "--data", str(folder), "--json", str(out), "--width", "8", "--length", "5"]
    results = run.main([*options, "--methods", "bp", "early_exit:pool=1", "--stages", "2", "--seeds", "0", "1"])
    assert [(r.method, r.n_stages, r.seed) for r in results] == [
        ("bp", 1, 0), ("bp", 1, 1), ("early_exit:pool=1", 2, 0), ("early_exit:pool=1", 2, 1),
    ]  # fmt: skip
    assert len(json.loads(out.read_text())) == 4 and "| `early_exit:pool=1` | 2 |" in capsys.readouterr().out
    assert all(r.peak_bytes > 4 * r.trained and 0 <= r.accuracy <= 1 for r in results)
    assert results[0].head_share == 0 < results[2].head_share and results[0].parameters == results[2].parameters


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in recipes.QUICK if "cifar" not in name])
def test_every_method_trains_every_kind_of_network(name: str, folder: Path) -> None:
    width = 0.1 if "vgg" in name else 12
    recipe, rows = tiny(name, folder, width=width)
    for method in tables.METHODS:
        found = training.train(recipe, rows, method, each_epoch=True)
        assert len(found.losses) == (1 if method == "bp" else 4) and 0 <= found.accuracy <= 1, method


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(data.FOLDER not in os.environ, reason=f"{data.FOLDER} names no folder of the real files")
@pytest.mark.parametrize("name", recipes.QUICK)
def test_real_data_are_learnt(name: str) -> None:
    """Better than chance after a few batches; texts take more of them than images."""
    count, epochs = (2000, 2) if recipes.QUICK[name].augment else (4000, 4)
    recipe = dataclasses.replace(recipes.QUICK[name], train_rows=count, test_rows=1000, epochs=epochs)
    rows = data.load(recipe.dataset, None, count, 1000, words=recipe.words, length=recipe.length)
    for method in ("bp", "auto"):
        assert training.train(recipe, rows, method).accuracy > 1.2 / rows.num_classes
