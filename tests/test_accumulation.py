"""Layers that are added to a trained model: what is frozen stays to the last bit, and only what is new trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_tools import assert_same, sgd

import autodecouple
from autodecouple.decoupled import Decoupled
from autodecouple.objectives import EarlyExit

torch.set_num_threads(1)


def block(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1))


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(6, 1, 4, 4, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def compiled(model: nn.Module, n_stages: int, example: Any, **options: Any) -> Decoupled:
    options = {"devices": ["cpu"] * n_stages, "optimizer": sgd, **options}
    return autodecouple.compile(model, n_stages, EarlyExit(hidden=None), example_inputs=example, **options)


def frozen(module: nn.Module) -> nn.Module:
    """No gradients, and no new statistics: how torch freezes."""
    return module.requires_grad_(False).eval()


@pytest.mark.timeout(60)
def test_new_layers_train_on_frozen_ones() -> None:
    """The frozen layers are the beginning of the first stage that trains: they cost their forward and nothing else."""
    torch.manual_seed(0)
    known = nn.Sequential(block(1), block(4))
    with compiled(nn.Sequential(known, classifier()), 2, (batches(1)[0][0],)) as decoupled:
        for x, y in batches(4):
            decoupled.train_step(x, y)
    before = {name: value.clone() for name, value in known.state_dict().items()}
    longer = nn.Sequential(frozen(known), block(4), block(4), classifier())
    with compiled(longer, 2, (batches(1)[0][0],)) as decoupled:
        first, second = decoupled.plan.stages
        trained = {id(p) for stage in decoupled.stages for p in stage.parameters}
        assert not trained & {id(p) for p in known.parameters()}
        assert all(id(p) in trained for part in longer[1:] for p in part.parameters())
        assert first.num_parameters + second.num_parameters == sum(p.numel() for p in longer[1:].parameters())
        assert first.forward_flops > 2 * first.backward_flops  # two frozen convolutions, of four, go forward only
        fresh = copy.deepcopy(longer[1:].state_dict())
        for x, y in batches(6):
            decoupled.train_step(x, y)
        assert_same(decoupled.model[0].state_dict(), before)  # type: ignore[index]
        weights = [name for name in fresh if name.endswith("weight")]  # a bias before BatchNorm has no gradient
        assert not any(torch.equal(longer[1:].state_dict()[name], fresh[name]) for name in weights)
        assert decoupled.exits.stages == (0, 1)
        assert torch.equal(decoupled.exits.predict(x, 1), decoupled(x))


@pytest.mark.timeout(60)
def test_stages_train_as_if_the_layers_behind_them_were_not_there() -> None:
    """Why layers may be added at any time: the first two stages of four are what they are in a model of two."""
    torch.manual_seed(0)
    blocks = [block(1), block(4), block(4)]
    short = nn.Sequential(*copy.deepcopy(blocks[:2]), classifier())
    long = nn.Sequential(*copy.deepcopy(blocks), classifier())
    found = []
    for model in (short, long):
        cut_at = [str(i) for i in range(len(model) - 2)]
        with compiled(model, len(cut_at) + 1, (batches(1)[0][0],), cut_at=cut_at) as decoupled:
            for x, y in batches(5):
                decoupled.train_step(x, y)
            found.append(copy.deepcopy(decoupled.model[0].state_dict()))  # type: ignore[index]
    assert_same(found[0], found[1])


class Side(nn.Module):
    """Trained layers, and one more that also reads an input which they do not know."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.known = known
        self.embed = nn.Embedding(7, 4)
        self.join = block(4)
        self.last = classifier()

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        h = self.known(x) + self.embed(tokens).mean(1)[:, :, None, None]
        y: Tensor = self.last(self.join(h))
        return y


@pytest.mark.timeout(60)
@pytest.mark.parametrize("n_stages", [1, 2])
def test_a_new_layer_may_have_an_input_of_its_own(n_stages: int) -> None:
    """The side input travels to the stage that reads it; streaming equals sequential, and the frozen layers stay."""
    torch.manual_seed(0)
    known = frozen(nn.Sequential(block(1), block(4)))
    initial = Side(known)
    before = {name: value.clone() for name, value in known.state_dict().items()}
    tokens = torch.randint(7, (6, 5))
    states = []
    for schedule in ("sequential", "streaming"):
        model = copy.deepcopy(initial)
        with compiled(model, n_stages, (batches(1)[0][0], tokens), schedule=schedule) as decoupled:
            for x, y in batches(5):
                decoupled.train_step((x, tokens), y)
            states.append(copy.deepcopy(decoupled.model.state_dict()))
    assert_same(states[0], states[1])
    assert_same({name: states[0][f"known.{name}"] for name in before}, before)
    assert not torch.equal(states[0]["embed.weight"], initial.embed.weight)


class SideTokens(nn.Module):
    """As DeInfoReg's `*_side` networks: a trained layer, and new ones on a sequence that new tokens have made longer.

    The trained layer reads in both directions; its halves and the embeddings of the new tokens stand one after the
    other in time.
    """

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.known = known
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.LSTM(4, 4, batch_first=True) for _ in range(2))
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        ahead, back = self.known(x)[0].chunk(2, -1)
        h = torch.cat([ahead, back, self.embed(tokens)], 1)
        for layer in self.layers:
            h = layer(h)[0]
        y: Tensor = self.last(h.mean(1))
        return y


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_new_tokens_may_stand_beside_what_frozen_layers_give() -> None:
    """Two stages: the first has what is frozen, the side input and a new layer; streaming equals sequential."""
    torch.manual_seed(0)
    known = frozen(nn.LSTM(5, 4, batch_first=True, bidirectional=True))
    initial = SideTokens(known)
    x, tokens, y = torch.randn(6, 7, 5), torch.randint(9, (6, 3)), torch.arange(6) % 3
    states = []
    for schedule in ("sequential", "streaming"):
        model = copy.deepcopy(initial)
        with compiled(model, 2, (x, tokens), schedule=schedule, cut_at=["layers.0"]) as decoupled:
            for i in range(5):
                decoupled.train_step((x + i, tokens), y)
            states.append(copy.deepcopy(decoupled.model.state_dict()))
    assert_same(states[0], states[1])
    assert_same({name: states[0][f"known.{name}"] for name in known.state_dict()}, known.state_dict())
    for name in ("embed.weight", "layers.0.weight_ih_l0", "layers.1.weight_ih_l0"):
        assert not torch.equal(states[0][name], initial.state_dict()[name])
