"""InfoPro's decoders and weights against torch's functions and plain Python; the model's input on its way to them."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any

import pytest
import torch
from head_tools import classes, cross_entropy_by_hand, head_for, normalised, numbers, spec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import autodecouple
from autodecouple.errors import InputError, PartitionError
from autodecouple.objectives import DGL, EarlyExit, InfoPro, SupCon
from autodecouple.passes.carry import carry_inputs
from autodecouple.plans import Plan

torch.set_num_threads(1)

ALONE: dict[str, Any] = {"comparison": (0.0, 0.0), "reconstruction": (1.0, 1.0)}
"""Reconstruction and nothing else."""


def placed(objective: InfoPro, given: Tensor, vocabulary: int | None = None) -> InfoPro:
    return objective.placed(0, 1, [spec("x", given, vocabulary)])


def error_by_hand(found: Tensor, wanted: Tensor) -> float:
    pairs = zip(found.flatten().tolist(), wanted.flatten().tolist(), strict=True)
    squares = [(a - b) ** 2 for a, b in pairs]
    return sum(squares) / len(squares)


def entropy_by_hand(logits: Tensor, wanted: Tensor) -> float:
    """Binary cross-entropy."""
    chances = [1 / (1 + math.exp(-v)) for v in logits.flatten().tolist()]
    terms = [
        -t * math.log(p) - (1 - t) * math.log(1 - p) for p, t in zip(chances, wanted.flatten().tolist(), strict=True)
    ]
    return sum(terms) / len(terms)


def decoded(head: nn.Module, maps: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Up, convolution, normalisation, ReLU, convolution."""
    decoder = head.rebuild
    up = F.interpolate(maps, sizes, mode="bilinear")
    hidden = normalised(F.conv2d(up, decoder.block.conv.weight, padding=1)).clamp(min=0)
    return F.conv2d(hidden, decoder.last.weight, decoder.last.bias, padding=1)


# Decoders


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 4), st.integers(1, 3), st.integers(0, 99))
def test_images_are_reconstructed_from_maps(rows: int, channels: int, side: int, scale: int, seed: int) -> None:
    x, image, y = (
        numbers(rows, channels, side, side, seed=seed),
        numbers(rows, 3, scale * side, scale * side),
        classes(rows),
    )
    head = head_for(placed(InfoPro(channels=5, **ALONE), image), x, y)
    expected = error_by_hand(decoded(head, x, tuple(image.shape[2:])), image)
    assert head(x, image, y)[0].item() == pytest.approx(expected, rel=1e-10)


def test_binary_cross_entropy_undoes_the_normalisation() -> None:
    """As published: a sigmoid, and the image as it was, in [0, 1]."""
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    shape = (1, 3, 1, 1)
    image = (pixels - torch.tensor(mean, dtype=torch.float64).view(shape)) / torch.tensor(
        std, dtype=torch.float64
    ).view(shape)
    x, y = numbers(2, 4, 4, 4), classes(2)
    head = head_for(placed(InfoPro(error="bce", mean=mean, std=std, **ALONE), image), x, y)
    expected = entropy_by_hand(decoded(head, x, (8, 8)), pixels)
    assert head(x, image, y)[0].item() == pytest.approx(expected, rel=1e-10)


def test_an_images_tokens_are_a_grid() -> None:
    """A class token in front belongs nowhere."""
    x, image, y = numbers(2, 17, 5), numbers(2, 3, 8, 8), classes(2)
    head = head_for(placed(InfoPro(**ALONE), image), x, y)
    maps = x[:, 1:].movedim(2, 1).reshape(2, 5, 4, 4)
    assert head(x, image, y)[0].item() == pytest.approx(error_by_hand(decoded(head, maps, (8, 8)), image), rel=1e-10)


def test_features_without_positions_give_the_means_of_cells() -> None:
    x, image, y = numbers(4, 5), numbers(4, 3, 8, 12), classes(4)
    head = head_for(placed(InfoPro(**ALONE), image), x, y)
    wanted = F.adaptive_avg_pool2d(image, (4, 4)).flatten(1)
    found = x @ head.rebuild.linear.weight.T + head.rebuild.linear.bias
    assert head(x, image, y)[0].item() == pytest.approx(error_by_hand(found, wanted), rel=1e-10)


def test_vectors_are_reconstructed_from_vectors() -> None:
    x, given, y = numbers(4, 5), numbers(4, 7), classes(4)
    head = head_for(placed(InfoPro(**ALONE), given), x, y)
    found = x @ head.rebuild.linear.weight.T + head.rebuild.linear.bias
    assert head(x, given, y)[0].item() == pytest.approx(error_by_hand(found, given), rel=1e-10)


def test_sequences_of_numbers_leave_padding_out() -> None:
    x, given, y = numbers(3, 4, 5), numbers(3, 4, 2), classes(3)
    head = head_for(placed(InfoPro(**ALONE), given), x, y)
    longer = torch.cat([x, torch.full((3, 2, 5), math.inf)], 1)
    padded, mask = torch.cat([given, torch.full((3, 2, 2), 9.0)], 1), torch.arange(6).expand(3, 6) < 4
    torch.testing.assert_close(head(longer, padded, y, mask)[0], head(x, given, y)[0], rtol=1e-10, atol=1e-10)


def test_tokens_are_classified_at_their_positions() -> None:
    x, ids, y = numbers(3, 4, 5), classes(3, 4, num=11), classes(3)
    mask = torch.arange(4) < torch.tensor([4, 2, 1]).unsqueeze(1)
    head = head_for(placed(InfoPro(**ALONE), ids, 11), x, y)
    logits = (x @ head.rebuild.classifier.weight.T + head.rebuild.classifier.bias).reshape(12, 11)
    expected = cross_entropy_by_hand(logits, ids.masked_fill(~mask, -100).flatten().tolist())
    assert head(x, ids, y, mask)[0].item() == pytest.approx(expected, rel=1e-10)


def test_one_vector_is_asked_for_all_tokens_of_its_row() -> None:
    x, ids, y = numbers(3, 5), classes(3, 4, num=11), classes(3)
    head = head_for(placed(InfoPro(**ALONE), ids, 11), x, y)
    logits = x @ head.rebuild.classifier.weight.T + head.rebuild.classifier.bias
    expected = cross_entropy_by_hand(logits.repeat_interleave(4, 0), ids.flatten().tolist())
    assert head(x, ids, y)[0].item() == pytest.approx(expected, rel=1e-10)


def test_the_task_stands_behind_a_convolution() -> None:
    x, y = numbers(6, 3, 5, 5), classes(6)
    head = head_for(InfoPro(EarlyExit(hidden=None), reconstruction=(0, 0), comparison=(1, 1)), x, y)
    neck = normalised(F.conv2d(x, head.compare.neck.blocks[0].conv.weight, stride=2, padding=1)).clamp(min=0)
    assert neck.shape == (6, 6, 3, 3)
    logits = head.compare.head.classifier(F.adaptive_avg_pool2d(neck, (2, 2)).flatten(1))
    assert head(x, y)[0].item() == pytest.approx(cross_entropy_by_hand(logits, y.tolist()), rel=1e-10)


def test_without_the_convolution_the_task_is_the_objective_itself() -> None:
    x, y, image = numbers(6, 3, 4, 4), classes(6), numbers(6, 3, 4, 4)
    task = SupCon(projector="identity")
    head = head_for(placed(InfoPro(task, reconstruction=(0.3, 0), comparison=(0.7, 1), conv=False), image), x, y)
    expected = 0.3 * head.rebuild(x, image) + 0.7 * task.head(spec("h", x), spec("target", y, 5))(x, y)[0]
    torch.testing.assert_close(head(x, image, y)[0], expected, rtol=1e-12, atol=0)


# Weights by depth


@given(st.integers(1, 12), st.tuples(st.floats(0, 9), st.floats(0, 9)), st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)))
@settings(deadline=None, max_examples=30)
def test_weights_are_linear_in_depth(count: int, first: Any, second: Any) -> None:
    objective, x = InfoPro(reconstruction=first, comparison=second), numbers(2, 3)
    inputs = [spec("x", x)]
    stages = [objective.placed(index, count, inputs) for index in range(count)]
    for index, stage in enumerate(stages):
        share = index / (count - 1) if count > 1 else 0.0
        l1 = stage.weight_at(stage.reconstruction, stage.depth)
        assert l1 == pytest.approx(first[0] + share * (first[1] - first[0]), abs=1e-12)
        assert (stage.input is None) == (l1 == 0)
        assert stage.placed(index, count, inputs) == stage and hash(stage) == hash(stage)


def test_the_defaults_end_with_the_task_alone() -> None:
    x = numbers(2, 3)
    first, middle, last = (InfoPro().placed(index, 3, [spec("x", x)]) for index in range(3))
    heads = [head_for(stage, numbers(2, 5), classes(2)) for stage in (first, middle, last)]
    assert [type(head).__name__ for head in heads] == ["InfoProHead", "InfoProHead", "TaskHead"]
    assert [heads[0].weight, heads[1].weight] == [1.0, 0.5]
    assert [heads[0].task.weight, heads[1].task.weight, heads[2].weight] == [0.5, 0.75, 1.0]


def test_a_stage_without_weights_is_refused() -> None:
    with pytest.raises(InputError, match=r"both weights of 'infopro' are 0 at depth 0\.00"):
        head_for(InfoPro(reconstruction=(0, 1), comparison=(0, 1)).placed(0, 2, []), numbers(2, 5), classes(2))


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "these enter: none"),
        ([spec("ids", torch.zeros(4, 3, dtype=torch.int64))], r"ids \(N, 3\) int64; leave the reconstruction out"),
        ([spec("mask", torch.zeros(4, 3, dtype=torch.bool))], "mask"),
        ([spec("shared", torch.zeros(4, 3), batch_dim=1)], "shared"),
    ],
)
def test_what_cannot_be_reconstructed_is_refused_by_name(given: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        InfoPro().placed(0, 3, given)


def test_a_head_without_its_place_is_refused() -> None:
    with pytest.raises(InputError, match="knows no input yet"):
        head_for(InfoPro(), numbers(2, 5), classes(2))


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda: InfoPro(error="l1"), "error='l1'"),
        (lambda: InfoPro(reconstruction=(1.0, -1.0)), "reconstruction="),
        (lambda: InfoPro(mean=(0.5,)), "mean="),
        (lambda: InfoPro(task="supcon"), "task='supcon'"),  # type: ignore[arg-type]
        (lambda: InfoPro.paper("all"), "labels='all'"),
        (
            lambda: head_for(
                placed(InfoPro(mean=(1.0, 2.0), std=(1.0, 1.0)), numbers(2, 3)), numbers(2, 5), classes(2)
            ),
            "2 channels",
        ),
    ],
)
def test_choices_are_checked(build: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build()


# The input crosses the cuts


class Tokens(nn.Module):
    """Looks its input up in another order, behind a view."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
        self.out = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids.view(ids.shape[0], -1).transpose(0, 1)).transpose(0, 1)
        for layer in self.layers:
            x = layer(x).tanh()
        out: Tensor = self.out(x.mean(1))
        return out


def convs() -> nn.Sequential:
    blocks = [nn.Sequential(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1), nn.ReLU()) for i in range(6)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 5))


def plan_of(n_stages: int = 4, loss: Any = "infopro", **options: Any) -> Plan:
    return autodecouple.plan(convs(), torch.randn(8, 3, 4, 4), n_stages=n_stages, loss=loss, devices=["cpu"], **options)


def test_the_input_crosses_every_cut_before_a_stage_that_reads_it_and_is_counted() -> None:
    plan, cut_at = plan_of(), ["0", "2", "4"]
    assert [cut.input for cut in plan.cuts] == ["input_1", "input_1", None]  # the last hidden stage has l1 = 0
    crossing = [[item.name == "input_1" for item in cut.crossing].count(True) for cut in plan.cuts]
    assert crossing == [1, 0, 0]
    plans = [
        plan_of(loss=loss, cut_at=cut_at) for loss in (InfoPro(reconstruction=(1, 1)), InfoPro(reconstruction=(0, 0)))
    ]
    with_input, without = plans
    more = [a.num_bytes - b.num_bytes for a, b in zip(with_input.cuts, without.cuts, strict=True)]
    assert more == [8 * 3 * 16 * 4] * 2 + [0]
    held = [a.activation_bytes - b.activation_bytes for a, b in zip(with_input.stages, without.stages, strict=True)]
    assert held == [0] + [8 * 3 * 16 * 4] * 2 + [0]
    assert Plan.from_json(plan.to_json()) == plan


def test_the_heads_flops_are_charged() -> None:
    plans = [plan_of(loss=loss, cut_at=["0", "2", "4"]) for loss in (InfoPro(), InfoPro(reconstruction=(0, 0)))]
    more = [a.head_flops - b.head_flops for a, b in zip(plans[0].stages, plans[1].stages, strict=True)]
    assert more[0] > 0 and more[1] > 0 and more[2:] == [0, 0]


class Narrow(nn.Module):
    """Takes in much, and soon has little of it: what crosses for the heads is the most of what later stages hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (100, 4)).mean(1)
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def test_a_memory_limit_counts_what_crosses_for_heads() -> None:
    """The smallest limit that any choice of cuts keeps is kept, and below it there is no plan: by brute force."""
    graph = autodecouple.capture(Narrow(), torch.randn(64, 400))
    loss = InfoPro(EarlyExit(hidden=None), reconstruction=(1, 1), conv=False)
    options: dict[str, Any] = {"n_stages": 3, "loss": loss, "devices": ["cpu"]}
    legal = [candidate.node for candidate in autodecouple.api.cuts(graph) if candidate.cut is not None]
    most = []
    for pair in itertools.combinations(legal, 2):
        with contextlib.suppress(PartitionError):  # a stage without parameters
            plan = autodecouple.plan(graph, cut_at=list(pair), **options)
            most.append(max(stage.memory_bytes for stage in plan.stages))
            assert plan.stages[1].memory_bytes > 64 * 400 * 4
    found = autodecouple.plan(graph, memory_limit=min(most), **options)
    assert max(stage.memory_bytes for stage in found.stages) == min(most)
    with pytest.raises(PartitionError, match=f"memory_limit={min(most) - 1} "):  # as the user gave it
        autodecouple.plan(graph, memory_limit=min(most) - 1, **options)


def test_a_plan_without_such_heads_stays_as_it_is() -> None:
    plan = plan_of(loss="supcon")
    assert carry_inputs(plan, [SupCon()] * 3) == plan


@pytest.mark.parametrize("x, name", [(torch.randn(8, 3, 4, 4), "input_1"), (torch.randint(13, (8, 6)), "ids")])
def test_heads_train_on_the_batchs_own_input(x: Tensor, name: str) -> None:
    """A head of a later stage, given by hand what crosses and what entered, has the loss of the step."""
    model = convs() if x.is_floating_point() else Tokens()
    y, loss = classes(8), InfoPro(EarlyExit(), reconstruction=(1, 1))
    with autodecouple.compile(model, 3, loss, example_inputs=(x[:4],), devices=["cpu"]) as decoupled:
        assert [cut.input for cut in decoupled.plan.cuts] == [name] * 2
        assert name in {item.name for item in decoupled.plan.cuts[0].crossing}
        assert decoupled._pipeline is not None
        stages = decoupled._pipeline.stages
        head = stages[1].code.head
        seen: list[Any] = []
        head.register_forward_pre_hook(lambda module, args: seen.append(args))
        decoupled.train_step(x, y)
        decoupled.synchronize()
    (given,) = [args[-2] for args in seen]
    assert torch.equal(given, x) and torch.equal(seen[0][-1], y)


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x.mul_(2))
        return out


def test_an_input_that_the_model_writes_into_is_refused() -> None:
    with pytest.raises(InputError, match="that the model does not write into"):
        autodecouple.plan(Overwrites(), torch.randn(4, 5), n_stages=3, loss="infopro", devices=["cpu"])


def test_replanning_keeps_the_weights_by_depth() -> None:
    x, y = torch.randn(8, 3, 4, 4), classes(8)
    with autodecouple.compile(convs(), 3, InfoPro(DGL(width=8)), example_inputs=(x,), devices=["cpu"] * 2) as decoupled:
        for _ in range(3):
            decoupled.train_step(x, y)
        decoupled.synchronize()
        decoupled.replan(n_stages=4)
        assert [cut.input for cut in decoupled.plan.cuts] == ["input_1", "input_1", None]
        assert all(map(math.isfinite, decoupled.train_step(x, y).losses))  # type: ignore[arg-type]
