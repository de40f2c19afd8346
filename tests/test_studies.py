"""The papers' other tables: wrong labels, gradient norms, and every table on a few rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import autodecouple
from accuracy import cost, data, gradients, journal, norms, studies, study
from accuracy.noise import mislabel

pytestmark = pytest.mark.timeout(60)


@given(st.integers(2, 6), st.lists(st.integers(0, 100), max_size=40), st.floats(0, 1), st.integers(0, 9))
def test_the_share_of_wrong_labels_is_exact(num_classes: int, numbers: list[int], share: float, seed: int) -> None:
    labels = torch.tensor([number % num_classes for number in numbers], dtype=torch.int64)
    before = labels.clone()
    wrong = mislabel(labels, share, num_classes, seed)
    assert int((wrong != labels).sum()) == round(share * len(labels))
    assert ((wrong >= 0) & (wrong < num_classes)).all() and torch.equal(labels, before)
    assert torch.equal(wrong, mislabel(labels, share, num_classes, seed))


def test_wrong_labels_are_any_other_class() -> None:
    wrong = mislabel(torch.full((30_000,), 2), 0.5, 4, seed=0)
    counts = torch.bincount(wrong, minlength=4)
    assert counts[2] == 15_000 and all(abs(int(counts[c]) - 5_000) < 300 for c in (0, 1, 3))
    assert not torch.equal(wrong, mislabel(torch.full((30_000,), 2), 0.5, 4, seed=1))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.classifier = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.classifier(x)


@pytest.mark.parametrize("loss", ["bp", "supcon"])
def test_gradient_norms_are_what_plain_descent_moves_by(loss: str) -> None:
    """Without momentum a step moves a parameter by its gradient times the learning rate."""
    rate, model, y = 0.25, Layers(), torch.arange(12) % 3
    parts = gradients.layers(model)
    assert list(parts) == ["stem", "layers.0", "layers.1", "layers.2", "classifier"]
    moved: dict[str, list[float]] = {name: [] for name in parts}
    with autodecouple.compile(
        model, 3, loss, example_inputs=torch.randn(12, 5), optimizer=lambda p: torch.optim.SGD(p, rate), devices=["cpu"]
    ) as decoupled:
        watched = gradients.GradientNorms(parts)
        for _ in range(4):
            before = {name: nn.utils.parameters_to_vector(part.parameters()).clone() for name, part in parts.items()}
            decoupled.train_step(torch.randn(12, 5), y)
            decoupled.synchronize()
            for name, part in parts.items():
                after = nn.utils.parameters_to_vector(part.parameters())
                moved[name].append(float((after - before[name]).norm().detach()) / rate)
        found = watched.close()
        decoupled.train_step(torch.randn(12, 5), y)
    assert found.keys() == moved.keys()
    assert all(found[name] == pytest.approx(moved[name], rel=1e-3) for name in parts)


def test_the_ends_are_medians_of_the_first_and_last_tenth() -> None:
    assert gradients.ends([5.0, 1.0, 3.0, *[9.0] * 24, 2.0, 8.0, 4.0]) == (3.0, 4.0)
    assert gradients.ends([7.0]) == (7.0, 7.0)


def test_the_lines_of_the_tables() -> None:
    assert {line.name: line.n_stages for line in studies.depth(True).lines} == {
        "2": 2, "4": 2, "6": 3, "8": 4, "10": 5, "12": 6, "14": 7
    }  # fmt: skip
    assert all(line.recipe.layers == int(line.name) for quick in (True, False) for line in studies.depth(quick).lines)
    assert len(studies.ablation(True).lines) == 1 + 4 + 4 + 1 and len(studies.ablation(False).lines) == 15 + 1
    methods = {line.name: line.columns["test accuracy"] for line in studies.ablation(False).lines}
    assert methods["V + I + Cov + CE"] == "deinforeg" and methods["V + CE"] == "deinforeg:invariance=0,covariance=0"
    assert methods["V + I + Cov"] == "deinforeg:alpha=0" == studies.alpha(False).lines[0].columns["test accuracy"]
    assert methods["(bp)"] == "bp" and len(set(methods.values())) == len(methods)


def tiny(name: str, folder: Any, train_rows: Any = None, test_rows: Any = None, **sizes: Any) -> data.Data:
    """Short texts of random words."""
    x, y = torch.randint(1, 20, (360, 5), generator=torch.Generator().manual_seed(0)), torch.arange(360) % 3
    return data.Data(name, x[:-20], y[:-20], x[-20:], y[-20:], 3, 20)


def test_what_is_written_meanwhile_stays(tmp_path: Path) -> None:
    """A training of minutes once wrote back the file as it was at its start, without what had come to it since."""
    path = tmp_path / "out.json"
    inner = {"value": 1}

    def make() -> dict[str, Any]:
        return {"value": 1 + journal.once(path, {"name": "inner"}, lambda: inner)["value"]}

    assert journal.once(path, {"name": "outer"}, make) == {"value": 2}
    assert journal.once(path, {"name": "inner"}, dict) == inner and journal.once(path, {"name": "outer"}, dict)
    assert journal.once(None, {"name": "outer"}, dict) == {}


TABLES = {
    "depth": ["--lines", "2", "4", "--methods", "bp", "supcon", "--width", "4", "--epochs", "2"],
    "noise": ["--lines", "0%", "40%", "--methods", "bp", "early_exit", "--width", "4", "--epochs", "1"],
    "ablation": ["--lines", "I", "(bp)", "--width", "4", "--epochs", "1"],
    "alpha": ["--lines", "0", "0.01", "--width", "4", "--epochs", "1"],
    "gradients": ["--methods", "bp", "early_exit", "--width", "4", "--epochs", "1"],
    "cost": ["--lines", "ag_news-lstm", "--methods", "bp", "associated", "--width", "8", "--epochs", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_every_table_is_made_and_not_made_again(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", tiny)
    seeds = ["0", "1"] if table in studies.STUDIES else ["0"]
    command = [table, "--quick", *TABLES[table], "--seeds", *seeds, "--json", str(tmp_path / "out.json")]
    found = study.main(command)
    entries = json.loads((tmp_path / "out.json").read_text())
    for module in (studies, norms, cost):
        monkeypatch.setattr(module, "train", None)
    assert study.main(command) == found
    assert json.loads((tmp_path / "out.json").read_text()) == entries
    assert all(line.startswith("| ") or not line or line == "ag_news-lstm" for line in found.splitlines())
    if table in studies.STUDIES:
        assert found.count("±") == {"depth": 4, "noise": 4, "ablation": 2, "alpha": 2}[table]
        assert len(entries) == 2 * found.count("±")
