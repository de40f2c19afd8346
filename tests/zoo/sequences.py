"""Transformers and their rivals, written by hand."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, floats, generator, tokens

WIDTH = 16


class Reader(nn.Module):
    """nn.TransformerEncoder with a padding mask, as the tutorials write it."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH, padding_idx=0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.1, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.classifier = nn.Linear(WIDTH, 3)
        self.register_buffer("positions", torch.randn(1, 8, WIDTH))

    def forward(self, words: Tensor) -> Tensor:
        padding = words == 0
        x = self.encoder(self.embedding(words) * math.sqrt(WIDTH) + self.positions, src_key_padding_mask=padding)
        logits: Tensor = self.classifier(x.masked_fill(padding.unsqueeze(-1), 0).mean(1))
        return logits


class Writer(nn.Module):
    """A language model out of nn.TransformerEncoder and a causal mask, which torch compares with its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(50, WIDTH), nn.Embedding(8, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.1, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(WIDTH))
        self.out = nn.Linear(WIDTH, 50)

    def forward(self, words: Tensor) -> Tensor:
        length = words.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=words.device)
        x = self.embedding(words) + self.positions(torch.arange(length, device=words.device))
        logits: Tensor = self.out(self.blocks(x, mask=mask))
        return logits


def _padded(rows: int) -> tuple[Tensor]:
    words = tokens(8, 50)(rows)
    words[::2, -3:] = 0
    return (words,)


class Translator(nn.Module):
    """nn.Transformer, sequence first, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(50, WIDTH), nn.Embedding(50, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 2, 2, 2, 32, 0.1)
        self.out = nn.Linear(WIDTH, 50)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=source.device)
        x = self.transformer(self.source(source).transpose(0, 1), self.target(target).transpose(0, 1), tgt_mask=mask)
        logits: Tensor = self.out(x).transpose(0, 1)
        return logits


def _two(rows: int) -> tuple[Tensor, Tensor]:
    return tokens(7, 50)(rows), tokens(6, 50)(rows).flip(0)


class Rotary(nn.Module):
    """A decoder as they are written now: RMS norms, rotated keys, gated units, grouped heads, tied embedding."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.gate, self.down = nn.Linear(WIDTH, 64, bias=False), nn.Linear(32, WIDTH, bias=False)

        def forward(self, x: Tensor, turn: Tensor) -> Tensor:
            rows, length, _ = x.shape
            q, k, v = self.qkv(self.before(x)).split([16, 8, 8], -1)
            q, k = (_rotate(t.view(rows, length, -1, 4), turn).transpose(1, 2) for t in (q, k))
            v = v.view(rows, length, 2, 4).transpose(1, 2)
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + self.out(h.transpose(1, 2).reshape(rows, length, WIDTH))
            a, b = self.gate(self.between(x)).chunk(2, -1)
            return x + self.down(F.silu(a) * b)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Rotary.Layer() for _ in range(4))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(words.shape[1], device=words.device), torch.tensor([1.0, 0.1]))
        x, turn = self.embedding(words), torch.polar(torch.ones_like(angles), angles)
        for layer in self.layers:
            x = layer(x, turn)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn.unsqueeze(1)).flatten(-2).type_as(x)


class Experts(nn.Module):
    """A mixture of experts in every layer: each expert works on the tokens that chose it, as many as those are.

    dense: every expert works on all tokens, weighted; nothing depends on the data
    """

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        self.inward = nn.Linear(6, WIDTH)
        self.routers = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(3))
        self.experts = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH)) for _ in range(3))
            for _ in range(3)
        )
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, balance = self.inward(x), x.new_zeros(())
        for router, experts in zip(self.routers, self.experts, strict=True):
            weights = router(x).softmax(-1)
            balance = balance + weights.mean((0, 1)).square().sum()
            x = x + (self._all(x, weights, experts) if self.dense else self._chosen(x, weights, experts))
        return self.out(x.mean(1)), balance

    def _all(self, x: Tensor, weights: Tensor, experts: nn.ModuleList) -> Tensor:
        best = weights.topk(2, -1)
        gates = torch.zeros_like(weights).scatter(-1, best.indices, best.values)
        return (torch.stack([expert(x) for expert in experts], -1) * gates.unsqueeze(-2)).sum(-1)

    def _chosen(self, x: Tensor, weights: Tensor, experts: nn.ModuleList) -> Tensor:
        flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        gate, choice = weights.flatten(0, 1).max(-1)
        for index, expert in enumerate(experts):
            (where,) = torch.where(choice == index)
            out = out.index_add(0, where, expert(flat[where]) * gate[where].unsqueeze(-1))
        return out.view_as(x)


class Fourier(nn.Module):
    """Learned filters in the frequency domain: complex parameters, complex values at cuts."""

    def __init__(self, complex_weights: bool) -> None:
        super().__init__()
        self.inward, self.out = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        dtype = torch.complex64 if complex_weights else torch.float32
        self.filters = nn.ParameterList(torch.randn(5, WIDTH, dtype=dtype) * 0.3 for _ in range(4))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for weight, mix in zip(self.filters, self.mixes, strict=True):
            spectrum = torch.fft.rfft(x, dim=1, norm="ortho") * weight
            x = x + F.gelu(mix(torch.fft.irfft(spectrum, n=x.shape[1], dim=1, norm="ortho")))
        logits: Tensor = self.out(x.mean(1))
        return logits


class Spectrum(nn.Module):
    """Everything between the two transforms is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(9, 9, dtype=torch.complex64) for _ in range(4))
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(x)
        for layer in self.layers:
            z = layer(z)
            z = z * torch.sigmoid(z.abs())
        logits: Tensor = self.out(torch.fft.irfft(z, n=16))
        return logits


class Scan(nn.Module):
    """A state space: a recurrence over time without parameters in it, gates around."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.out = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.gates = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(4))
        self.rates = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for gate in self.gates:
            write, read, value = gate(x).chunk(3, -1)
            state, found = torch.zeros_like(x[:, 0]), []
            for t in range(x.shape[1]):
                state = state * torch.sigmoid(self.rates) + write[:, t].sigmoid() * value[:, t]
                found.append(state * read[:, t].sigmoid())
            x = x + torch.stack(found, 1)
        logits: Tensor = self.out(x[:, -1])
        return logits


class Memory(nn.Module):
    """Cross-attention to learned slots (nn.MultiheadAttention, weights returned), as in Perceiver and DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(4, WIDTH))
        self.inward = nn.Linear(6, WIDTH)
        self.reads = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(3))
        self.mixes = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)) for _ in range(3)
        )
        self.classes, self.boxes = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, slots = self.inward(x), self.slots.expand(len(x), -1, -1)
        weights = None
        for read, mix in zip(self.reads, self.mixes, strict=True):
            found, weights = read(slots, x, x)
            slots = slots + found
            slots = slots + mix(slots)
        return {"logits": self.classes(slots), "boxes": self.boxes(slots).sigmoid(), "weights": weights}


def _steps(rows: int) -> tuple[Tensor]:
    return (torch.randn(rows, 8, 6, generator=generator(rows)),)


def entries() -> list[Entry]:
    return [
        Entry("sequences/reader", "sequences", partial(Reader, False), _padded),
        Entry("sequences/reader_norm_first", "sequences", partial(Reader, True), _padded),
        Entry("sequences/writer", "sequences", Writer, lambda rows: (tokens(8, 50)(rows),)),
        Entry("sequences/translator", "sequences", Translator, _two),
        Entry("sequences/rotary", "sequences", Rotary, lambda rows: (tokens(8, 50)(rows),), tied="untie"),
        Entry("sequences/experts", "sequences", partial(Experts, False), _steps),
        Entry("sequences/experts_dense", "sequences", partial(Experts, True), _steps, quick=True),
        Entry("sequences/fourier", "sequences", partial(Fourier, False), _steps, quick=True),
        Entry("sequences/fourier_complex", "sequences", partial(Fourier, True), _steps, quick=True),
        Entry("sequences/spectrum", "sequences", Spectrum, floats(16), quick=True),
        Entry("sequences/scan", "sequences", Scan, _steps),
        Entry("sequences/memory", "sequences", Memory, _steps),
    ]
