"""The example networks are those of the papers, and can be captured as they stand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

from examples import models


def _millions_of_macs(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Forward MACs per module, in millions; `""` is the whole."""
    with FlopCounterMode(display=False, depth=9) as counter:
        model(x)
    prefix = type(model).__name__
    counts = {name: sum(flops.values()) / 2e6 for name, flops in counter.get_flop_counts().items()}
    return {name.removeprefix(prefix).removeprefix("."): macs for name, macs in counts.items() if name != "Global"}


def test_vgg_has_the_papers_figures() -> None:
    model = models.vgg(200).to("meta")
    macs = _millions_of_macs(model, torch.empty(1, 3, 32, 32, device="meta"))
    blocks = [macs[f"blocks.{i}"] for i in range(4)]
    blocks[3] += _millions_of_macs(models.vgg(10).to("meta"), torch.empty(1, 3, 32, 32, device="meta"))["classifier"]
    assert [round(m) for m in blocks] == [306, 453, 151, 43]
    assert models.num_parameters(model) == pytest.approx(12.4e6, rel=2e-3)


def test_resnet18_has_the_papers_figures() -> None:
    macs = _millions_of_macs(models.resnet18(10).to("meta"), torch.empty(1, 3, 32, 32, device="meta"))
    stages = [sum(macs[f"blocks.{2 * k + i}"] for i in range(2)) for k in range(4)]
    stages[0] += macs["stem"]
    assert [round(m) for m in stages] == [153, 151, 151, 151]


@pytest.mark.parametrize(
    ("model", "ends", "widths"),
    [
        (models.vgg(10), "blocks.0 blocks.1 blocks.2 blocks.3", [65536, 32768, 8192, 2048]),
        (models.resnet18(10), "blocks.1 blocks.3 blocks.5", [65536, 32768, 16384]),
    ],
    ids=["vgg", "resnet18"],
)
def test_features_have_the_width_of_the_papers_heads(model: nn.Module, ends: str, widths: list[int]) -> None:
    """Flatten-512-1024 heads of 34.1, 17.3, 4.7 and 1.6 (VGG) or 8.9 (ResNet) million parameters."""
    found: list[int] = []
    for name in ends.split():
        model.get_submodule(name).register_forward_hook(lambda _module, _inputs, x: found.append(x[0].numel()))
    model.to("meta")(torch.empty(1, 3, 32, 32, device="meta"))
    assert found == widths


def test_text_models_have_the_papers_layers() -> None:
    embedding, head = 30000 * 300, 300 * 300 + 300 + 300 * 2 + 2
    layers = sum(2 * 4 * 300 * (inputs + 300 + 2) for inputs in (300, 600, 600))
    assert models.num_parameters(models.lstm(30000, 2)) == embedding + layers + head
    encoder = 3 * (4 * 300 * 300 + 4 * 300 + 2 * (300 * 300 + 300) + 4 * 300)
    assert models.num_parameters(models.transformer(30000, 2)) == embedding + encoder + head


def test_blocks_of_the_small_network_cost_about_the_same() -> None:
    macs = _millions_of_macs(models.residual_cnn(10).to("meta"), torch.empty(1, 1, 8, 8, device="meta"))
    blocks = [macs[f"blocks.{i}"] for i in range(8)]
    assert min(blocks) / max(blocks) > 0.7 and macs[""] < 6


def _images(channels: int, size: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(n))


def _texts(n: int) -> Tensor:
    tokens = torch.randint(1, 50, (n, 12), generator=torch.Generator().manual_seed(n))
    return tokens.masked_fill(torch.arange(12) >= torch.arange(1, n + 1)[:, None] + 2, models.PADDING)


CAPTURED = {
    "vgg": (lambda: models.vgg(10, width=0.05), _images(3, 32)),
    "vgg-28": (lambda: models.vgg(10, in_channels=1, width=0.05, image_size=28), _images(1, 28)),
    "resnet18": (lambda: models.resnet18(10, width=0.1), _images(3, 32)),
    "residual_cnn": (lambda: models.residual_cnn(10, widths=(8, 8, 16, 16)), _images(1, 8)),
    "lstm": (lambda: models.lstm(50, 3, width=12), _texts),
    "transformer": (lambda: models.transformer(50, 3, width=12), _texts),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CAPTURED)
def test_can_be_captured(name: str, training: bool) -> None:
    """Exported with a dynamic batch, the graph gives the model's own outputs, also at another batch size."""
    make, inputs = CAPTURED[name]
    model = make().train(training)
    graph = export(model, (inputs(4),), dynamic_shapes=({0: Dim.AUTO},), strict=False).module()
    for size in (4, 7):
        torch.manual_seed(0)
        expected = model(inputs(size))
        torch.manual_seed(0)
        torch.testing.assert_close(graph(inputs(size)), expected, rtol=0, atol=0)
    if training:
        assert {p.data_ptr() for p in graph.parameters()} == {p.data_ptr() for p in model.parameters()}


def test_padding_changes_nothing_for_the_transformer() -> None:
    model, tokens = models.transformer(50, 3, width=12).eval(), _texts(5)
    longer = torch.cat([tokens, torch.full((5, 4), models.PADDING)], 1)
    torch.testing.assert_close(model(tokens), model(longer))
