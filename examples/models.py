"""The networks of the decoupled-learning papers, written as anybody would: nothing here knows of stages or cuts.

    network          cuts of the papers         forward MACs of the four stages (32x32)
    vgg              after each pooling         305 / 453 / 151 / 43 M
    resnet18         after each group           153 / 151 / 151 / 151 M
    lstm             after each layer           depend on the length of the text
    transformer      after each layer           depend on the length of the text

Widths, activations and heads are those of SCPL ("Supervised Contrastive Parallel Learning", CIKM 2023 and its code);
`lstm` says where it differs.
`resnet32` is that of InfoPro's table (69 M MACs). `residual_cnn` is a small one of our own, for 8x8 digits and for
narrow runs on CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

PADDING = 0
"""The token index that fills up a text."""


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution and batch norm; the norm has the bias."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs))


class VGG(nn.Module):
    """Four blocks of 3x3 convolutions, each ending in a 2x2 pooling; images (N, C, H, W) to logits (N, classes)."""

    widths = ((128, 256), (256, 512), (512,), (512,))

    def __init__(self, num_classes: int, in_channels: int, width: float, image_size: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for block in self.widths:
            layers: list[nn.Module] = []
            for channels in (round(width * w) for w in block):
                layers += [_conv(in_channels, channels), nn.ReLU(inplace=True)]
                in_channels = channels
            self.blocks.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
        features, hidden = in_channels * (image_size // 16) ** 2, round(width * 2500)
        self.classifier = nn.Sequential(nn.Linear(features, hidden), nn.Sigmoid(), nn.Linear(hidden, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.flatten(1))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, shortcut_kernel: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.conv2 = _conv(outputs, outputs)
        self.act = nn.LeakyReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            kernel = nn.Conv2d(inputs, outputs, shortcut_kernel, stride, shortcut_kernel // 2, bias=False)
            self.shortcut = nn.Sequential(kernel, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(self.act(self.conv1(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, residual blocks, average pooling and one linear layer; images (N, C, H, W) to logits (N, classes).

    `widths` has one number per block; the resolution halves wherever it grows.
    """

    def __init__(self, num_classes: int, in_channels: int, widths: Sequence[int], shortcut_kernel: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(in_channels, widths[0]), nn.LeakyReLU(inplace=True))
        before = [widths[0], *widths[:-1]]
        self.blocks = nn.Sequential(
            *(ResidualBlock(i, o, 1 + (o > i), shortcut_kernel) for i, o in zip(before, widths, strict=True))
        )
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class LSTM(nn.Module):
    """Embedding and bidirectional LSTM layers; tokens (N, T) to logits (N, classes).

    The text is represented by the mean of both directions' final states. `hand_state` starts each layer with the final
    state of the one below.
    """

    def __init__(self, vocab_size: int, num_classes: int, width: int, num_layers: int, hand_state: bool) -> None:
        super().__init__()
        self.hand_state = hand_state
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        inputs = [width] + [2 * width] * (num_layers - 1)
        # One module per layer: nn.LSTM(num_layers=3) is a single operator, and nothing can be cut inside one.
        self.layers = nn.ModuleList(nn.LSTM(i, width, bidirectional=True, batch_first=True) for i in inputs)
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, num_classes))

    def forward(self, tokens: Tensor) -> Tensor:
        x, state = self.embedding(tokens), None
        for layer in self.layers:
            x, state = layer(x, state if self.hand_state else None)
        assert state is not None
        return self.classifier(state[0].mean(0))


class Transformer(nn.Module):
    """Embedding and encoder layers, without position codes as in SCPL; tokens (N, T) to logits (N, classes).

    The text is represented by the mean over its tokens. A text of nothing but padding has no answer: give it a token.
    """

    def __init__(
        self, vocab_size: int, num_classes: int, width: int, num_layers: int, num_heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, num_heads, dim_feedforward=width, dropout=dropout, batch_first=True)
            for _ in range(num_layers)
        )
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, num_classes))

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == PADDING
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        counts = (~padding).unsqueeze(-1).to(x.dtype)
        return self.classifier((x * counts).sum(1) / counts.sum(1).clamp(min=1))


def vgg(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, image_size: int = 32) -> VGG:
    """SCPL's VGG: 12.4 M parameters with 200 classes. `width` scales every layer."""
    return VGG(num_classes, in_channels, width, image_size)


def resnet18(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """ResNet-18 for small images as in SCPL: 3x3 stem, LeakyReLU, and 3x3 shortcuts (1x1 elsewhere)."""
    widths = [round(width * w) for w in (64, 128, 256, 512) for _ in range(2)]
    return ResNet(num_classes, in_channels, widths, shortcut_kernel=3)


def resnet32(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """ResNet-32 for CIFAR: 15 blocks of 16, 32 and 64 channels, 0.47 M parameters; the network of InfoPro's table."""
    widths = [round(width * w) for w in (16, 32, 64) for _ in range(5)]
    return ResNet(num_classes, in_channels, widths, shortcut_kernel=1)


def residual_cnn(
    num_classes: int = 10, in_channels: int = 1, widths: Sequence[int] = (24, 24, 24, 48, 48, 48, 96, 96)
) -> ResNet:
    """One residual block per width. Twice the width on a quarter of the pixels: all blocks cost about the same."""
    return ResNet(num_classes, in_channels, widths, shortcut_kernel=1)


def lstm(
    vocab_size: int = 30_000, num_classes: int = 2, width: int = 300, num_layers: int = 3, hand_state: bool = False
) -> LSTM:
    """SCPL's text classifier: embedding 300, three bidirectional layers of 300, Linear-Tanh-Linear.

    SCPL hands the final state of each layer to the next, `hand_state=True`. Then three tensors that carry a gradient
    leave every layer, and no cut between layers is legal; so layers start from zero here, as those of one nn.LSTM do.
    """
    return LSTM(vocab_size, num_classes, width, num_layers, hand_state)


def transformer(
    vocab_size: int = 30_000,
    num_classes: int = 2,
    width: int = 300,
    num_layers: int = 3,
    num_heads: int = 6,
    dropout: float = 0.1,
) -> Transformer:
    """SCPL's text classifier: embedding 300, three encoder layers of 300 with six heads, Linear-Tanh-Linear."""
    return Transformer(vocab_size, num_classes, width, num_layers, num_heads, dropout)
