"""Networks on sound: waveforms and spectra."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, floats


class WaveFront(nn.Module):
    """Convolutions over the waveform, positions by a grouped convolution with weight norm, then a transformer."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((1, 10, 5), (16, 3, 2), (16, 3, 2))
        self.convs = nn.ModuleList(nn.Conv1d(width, 16, kernel, stride) for width, kernel, stride in sizes)
        self.norm = nn.GroupNorm(16, 16)
        self.positions = nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 16, 8, padding=4, groups=4), dim=2)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.classifier = nn.Linear(16, 3)

    def forward(self, wave: Tensor) -> Tensor:
        x = wave.unsqueeze(1)
        for i, conv in enumerate(self.convs):
            x = F.gelu(self.norm(conv(x)) if i == 0 else conv(x))
        x = x + F.gelu(self.positions(x)[..., :-1])
        logits: Tensor = self.classifier(self.encoder(x.transpose(1, 2)).mean(1))
        return logits


class Separator(nn.Module):
    """Conv-TasNet: an encoder of its own, dilated convolutions, masks, one waveform per speaker."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, 16, 8, stride=4, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(16, 24, 1), nn.PReLU(), nn.GroupNorm(1, 24),
                nn.Conv1d(24, 24, 3, padding=2**i, dilation=2**i, groups=24), nn.PReLU(), nn.Conv1d(24, 16, 1),
            )
            for i in range(4)
        )  # fmt: skip
        self.masks = nn.Conv1d(16, 32, 1)
        self.decoder = nn.ConvTranspose1d(16, 1, 8, stride=4, bias=False)

    def forward(self, wave: Tensor) -> Tensor:
        code = x = F.relu(self.encoder(wave.unsqueeze(1)))
        for layer in self.blocks:
            x = x + layer(x)
        masked = self.masks(x).view(-1, 2, 16, x.shape[-1]).sigmoid() * code.unsqueeze(1)
        waves: Tensor = self.decoder(masked.flatten(0, 1)).view(-1, 2, wave.shape[-1])
        return waves


class Spectral(nn.Module):
    """A short-time Fourier transform inside the model, then convolutions over time and pitch, then a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(32))
        self.convs = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()
        )
        self.rnn = nn.GRU(40, 16, num_layers=2, batch_first=True)
        self.classifier = nn.Linear(16, 3)

    def forward(self, wave: Tensor) -> Tensor:
        spectrum = torch.stft(wave, 32, 16, window=self.window, return_complex=True).abs().log1p()
        x = self.convs(spectrum.unsqueeze(1)).permute(0, 3, 1, 2).flatten(2)
        logits: Tensor = self.classifier(self.rnn(x)[0][:, -1])
        return logits


class WaveNet(nn.Module):
    """Gated dilated convolutions; skips from every layer are added up at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 12, 1)
        self.gates = nn.ModuleList(nn.Conv1d(12, 24, 2, dilation=2**i) for i in range(4))
        self.skips = nn.ModuleList(nn.Conv1d(12, 12, 1) for _ in range(4))
        self.mixes = nn.ModuleList(nn.Conv1d(12, 12, 1) for _ in range(4))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(12, 12, 1), nn.ReLU(), nn.Conv1d(12, 8, 1))

    def forward(self, wave: Tensor) -> Tensor:
        x, total = self.first(wave.unsqueeze(1)), 0
        for i, (gate, skip, mix) in enumerate(zip(self.gates, self.skips, self.mixes, strict=True)):
            a, b = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            h = a.tanh() * b.sigmoid()
            total = total + skip(h)
            x = x + mix(h)
        logits: Tensor = self.out(total)
        return logits


def entries() -> list[Entry]:
    makers = {"wave_front": WaveFront, "separator": Separator, "spectral": Spectral, "wavenet": WaveNet}
    return [
        Entry(f"audio/hand_{name}", "audio", make, floats(160), quick=name in ("separator", "spectral"))
        for name, make in makers.items()
    ]
