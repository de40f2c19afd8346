"""Every objective on three families of models: isolated, trained, and the same when streamed."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from families import FAMILIES, batch, exact_batch
from torch import nn
from training_tools import assert_same, sgd, train

import autodecouple
from autodecouple.objectives import DGL, EarlyExit, InfoNCE, InfoPro, Objective, PredSim
from autodecouple.randomness import Randomness

torch.set_num_threads(1)

OBJECTIVES: dict[str, Objective] = {
    "predsim": PredSim(),
    "dgl": DGL(width=16),
    "dgl-mlp": DGL("mlp", width=16),
    "dgl-cnn": DGL("cnn"),
    "infonce": InfoNCE(max_rows=101),
    "infopro": InfoPro(reconstruction=(1.0, 1.0)),
    "infopro-ce": InfoPro(EarlyExit(), reconstruction=(1.0, 0.5), max_rows=101),
}

NAMES = [name if name in ("predsim", "dgl", "infonce", "infopro") else pytest.param(name, marks=pytest.mark.slow)
         for name in OBJECTIVES]  # fmt: skip
"""The variants of an objective are slow tests."""


CUTS = {"cnn": ["0", "2"], "lstm": ["layers.0", "layers.1"], "transformer": ["layers.0", "layers.1"]}


def compiled(family: str, loss: Any, schedule: Any = "sequential", **options: Any) -> Any:
    """Three stages."""
    lanes = 1 if schedule == "sequential" else 3
    return families.compiled(family, loss, schedule, lanes, cut_at=CUTS[family], **{"optimizer": sgd, **options})


@pytest.mark.parametrize(
    "family", [name if name == "cnn" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_falls(family: str, name: str) -> None:
    def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.01)

    with compiled(family, OBJECTIVES[name], optimizer=adam) as decoupled:
        steps = [decoupled.train_step(*batch(family, 16, seed)).losses for seed in range(16)]
    first, last = (torch.tensor(part).mean(0) for part in (steps[:4], steps[-4:]))
    assert (last[:-1] < first[:-1]).all(), (first, last)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "family", [name if name == "cnn" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
@pytest.mark.parametrize("name", NAMES)
def test_streaming_equals_sequential_bitwise(family: str, name: str) -> None:
    """Also with a smaller last batch, and a single row."""
    batches = [batch(family, rows, seed) for seed, rows in enumerate((8, 8, 5, 8, 1))]
    batches = batches[:-1] if family == "cnn" else batches
    expected = train(compiled(family, OBJECTIVES[name]), batches)
    assert_same(train(compiled(family, OBJECTIVES[name], "streaming"), batches), expected)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("executor", ["inline", "processes"])
@pytest.mark.dist
def test_other_executors_give_the_same(executor: str) -> None:
    batches = [batch("transformer", 8, seed) for seed in range(3)]
    loss = [OBJECTIVES["infonce"], OBJECTIVES["infopro"]]
    expected = train(compiled("transformer", loss), batches)
    assert_same(train(compiled("transformer", loss, "streaming", executor=executor), batches), expected)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_share_the_loss_of_the_batch(name: str) -> None:
    """Without BatchNorm and dropout in the model the slices change nothing but the order of sums."""
    batches = [exact_batch("lstm", 8, seed) for seed in range(2)]
    whole = train(compiled("lstm", OBJECTIVES[name], exact=True), batches)
    sliced = train(compiled("lstm", OBJECTIVES[name], autodecouple.schedules.MicroBatched(2), exact=True), batches)
    for ours, theirs in zip(sliced.losses, whole.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_reaches_its_own_stage_and_no_other(family: str, name: str) -> None:
    """In the one graph that holds all stages and heads, by plain autograd."""
    x, y = batch(family, 8, 0)
    with compiled(family, OBJECTIVES[name]) as decoupled:
        pipeline = decoupled._pipeline
        losses, _ = pipeline.module(x, y, Randomness(0))
    bodies = [[p for p in code.body.parameters() if p.requires_grad] for code in pipeline.codes]
    everything = [p for p in pipeline.module.parameters() if p.requires_grad]
    for index, loss in enumerate(losses):
        found = torch.autograd.grad(loss, everything, retain_graph=True, allow_unused=True)
        reached = {id(p) for p, gradient in zip(everything, found, strict=True) if gradient is not None}
        own = {id(p) for p in (*bodies[index], *pipeline.codes[index].head.parameters())}
        assert reached <= own and {id(p) for p in bodies[index]} <= reached


@pytest.mark.parametrize("name", NAMES)
def test_recomputing_gives_the_same(name: str) -> None:
    batches = [batch("transformer", 8, seed) for seed in range(2)]
    expected = train(compiled("transformer", OBJECTIVES[name]), batches)
    assert_same(train(compiled("transformer", OBJECTIVES[name], recompute=True), batches), expected)
