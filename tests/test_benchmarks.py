"""The benchmarks measure what they say: one function for all, the best split, the same training, full pipelines."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tools import balance, networks, rounds, steps

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
NETWORKS = {
    "vgg": networks.vgg(0.05, rows=4),
    "resnet18": networks.resnet18(0.05, rows=4),
    "transformer": networks.transformer(12, length=6, rows=4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_in_a_row_are_the_same_function(name: str) -> None:
    """The pipelines of others take an nn.Sequential: with the network's own parameters and numbers."""
    network = NETWORKS[name]
    model = network.build()
    row = networks.in_a_row(model)
    assert set(map(id, row.parameters())) == set(map(id, model.parameters()))
    x, _ = network.batches(1)[0]
    model.eval()
    assert torch.allclose(row(x), model(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(network.batches(1)[0][0], x), "another process must see the same batches"


def test_no_other_network_is_put_in_a_row() -> None:
    with pytest.raises(TypeError, match="Linear"):
        networks.in_a_row(nn.Linear(2, 2))


@given(st.lists(st.integers(1, 9), min_size=3, max_size=7), st.integers(1, 3))
def test_splits_are_the_best(times: list[int], parts: int) -> None:
    """Against a search of its own: the smallest limit within which a greedy filling needs no more parts."""

    def parts_within(limit: int) -> int:
        count, room = 1, limit
        for seconds in times:
            count, room = (count, room - seconds) if seconds <= room else (count + 1, limit - seconds)
        return count

    sizes = balance.best_split(times, parts)
    assert sum(sizes) == len(times) and len(sizes) == parts and min(sizes) > 0
    ends = [0, *itertools.accumulate(sizes)]
    limits = (limit for limit in range(max(times), sum(times) + 1) if parts_within(limit) <= parts)
    assert max(sum(times[a:b]) for a, b in itertools.pairwise(ends)) == next(limits)


def test_measured_layers_leave_no_gradients_behind() -> None:
    network = NETWORKS["transformer"]
    row = networks.in_a_row(network.build())
    sizes = balance.balance(row, network.batches(1)[0][0], 2, repeats=1)
    assert sum(sizes) == len(row) and all(parameter.grad is None for parameter in row.parameters())


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is twice as slow for a round changes no ratio; a round without one of the two does not count."""
    found = [{"base": 2.0, "fast": 1.0}, {"base": 4.0, "fast": 2.0}, {"base": 9.0}, {"base": 3.0, "fast": 1.0}]
    assert rounds.faster(found, "fast", "base") == rounds.Ratio(2.0, 2.0, 3.0)
    assert rounds.median(found, "fast") == 1.0


def test_micro_batches_of_backprop_are_one_step() -> None:
    """Gradients of slices add up to those of the batch, in double precision and without BatchNorm."""

    def trained(micro_batches: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        data = [(torch.randn(10, 5, dtype=torch.float64), torch.randint(3, (10,))) for _ in range(3)]
        step = steps.backprop(model, data, micro_batches)
        for _ in range(5):
            step()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(trained(1), trained(4), strict=True))


def test_a_step_waits_for_an_earlier_batch() -> None:
    """A pipeline that takes batches without training them would otherwise look as fast as the loop."""
    read: list[int] = []

    class Step:
        def __init__(self, number: int) -> None:
            self.number = number

        @property
        def losses(self) -> None:
            read.append(self.number)

    class Pipeline:
        count = itertools.count()

        def train_step(self, x: Any, y: Any) -> Step:
            return Step(next(self.count))

    pipeline: Any = Pipeline()
    step = steps.decoupled(pipeline, NETWORKS["vgg"].batches(1), behind=2)
    for _ in range(5):
        step()
    assert read == [0, 1, 2]


def run(name: str, *options: str, folder: Path) -> Any:
    """What a benchmark writes, started as a reader would."""
    out = folder / "out.json"
    command = [sys.executable, str(FOLDER / name / "run.py"), *options, "--json", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_two_cores(tmp_path: Path) -> None:
    only = "torchgpipe|zero_bubble|^sequential$|^threads_mb2$|^processes$"
    options = ["--networks", "transformer", "--tiny", "--rounds", "1", "--seconds", "0.01", "--only", only]
    found = run("two_cores", *options, folder=tmp_path)["transformer"]
    assert {"bp1", "zero_bubble", "sequential", "threads_mb2"} <= set(found["contestants"])
    assert all(name in found["contestants"] or found["unavailable"][name] for name in ("torchgpipe", "processes"))
    assert not [why for why in found["unavailable"].values() if why.startswith("failed")]
    assert found["contestants"]["bp1"]["ratio"]["median"] == 1 and found["best"]["ours"] in found["contestants"]
    assert set(found["best"]["over"]) == {"backprop, one thread", "coupled"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_predicted(tmp_path: Path) -> None:
    options = ["--networks", "vgg", "--tiny", "--rows", "8", "--rounds", "1", "--batches", "1", "--devices", "2", "99"]
    found = run("predicted", *options, "--micro-batches", "2", folder=tmp_path)["vgg"]
    ratios = found["devices"]["2"]["ratios"]
    assert set(found["devices"]) == {"2"} and "99" in found["refused"]
    assert ratios["streaming"]["median"] >= ratios["barrier"]["median"], "both are from the same stage times"
    assert all(ratios[name]["median"] > 0 for name in ("1f1b", "gpipe", "pipedream"))
    assert {"measured", "predicted", "from inline"} == set(found["two lanes"][0])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_overhead(tmp_path: Path) -> None:
    """The loop by hand trains what the executors train, to the last bit: also masks of dropout, and BatchNorm."""
    for name in ("small", "small text"):
        options = ["--networks", name, "--rounds", "1", "--seconds", "0.01", "--stages", "3"]
        assert run("overhead", *options, folder=tmp_path)[name]["apart"] < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_language(tmp_path: Path) -> None:
    options = ["--methods", "bp", "downstream", "--steps", "3", "--layers", "3", "--width", "16", "--stages", "2"]
    results = run("language", *options, folder=tmp_path)
    assert [result["method"] for result in results] == ["bp", "downstream"]
    assert all(0 < result["loss"] < 6 for result in results)
    assert results[0]["share"] == 0 < results[1]["share"] < 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_gpu(tmp_path: Path) -> None:
    """On a processor, which has no graphs: who asked for them says that it ran eagerly."""
    only = "checkpointed|^eager_2$|^compile_2$|^cuda_graphs_2$"
    options = ["--networks", "small", "--tiny", "--rounds", "2", "--seconds", "0.01", "--stages", "2"]
    options += ["--only", only, "--compiler", "aot_eager", "--device", "cpu"]
    found = run("one_gpu", *options, folder=tmp_path)["small"]["contestants"]
    assert set(found) == {"backprop", "backprop_checkpointed", "eager_2", "compile_2", "cuda_graphs_2"}
    assert not [each["unavailable"] for each in found.values() if "unavailable" in each]
    assert found["backprop"]["time"]["median"] == 1 and all(each["seconds"] > 0 for each in found.values())
    assert "its device is cpu" in found["cuda_graphs_2"]["eagerly"][0] and not found["eager_2"]["eagerly"]
