"""Recurrent networks: fused kernels, cells unrolled by hand, states that go in and come out."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import Entry, floats, generator, tokens


class Classifier(nn.Module):
    """(N, T, 6) through a fused stack; the last step is classified."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(6, 12, batch_first=True, **options)
        width = options.get("proj_size") or 12
        self.classifier = nn.Linear(width * (1 + options.get("bidirectional", False)), 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        logits: Tensor = self.classifier(out[:, -1])
        return logits


class States(nn.Module):
    """An LSTM that starts from given states and returns the new ones: nested inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 12)
        self.rnn = nn.LSTM(12, 12, num_layers=3)
        self.decode = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = (s.transpose(0, 1).contiguous() for s in state)
        out, (h, c) = self.rnn(self.encode(x).transpose(0, 1), (h, c))
        return self.decode(out[-1]), (h.transpose(0, 1), c.transpose(0, 1))


def _with_states(rows: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    seeded = generator(rows)
    h, c = (torch.randn(rows, 3, 12, generator=seeded) for _ in range(2))
    return torch.randn(rows, 5, 6, generator=seeded), (h, c)


class Tagger(nn.Module):
    """Embedding, two bidirectional LSTMs, a label for every token; sequence first in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 12, padding_idx=0)
        self.drop = nn.Dropout(0.2)
        self.first = nn.LSTM(12, 8, bidirectional=True)
        self.second = nn.LSTM(16, 8, bidirectional=True)
        self.tag = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, words: Tensor) -> Tensor:
        x = self.drop(self.embedding(words)).transpose(0, 1)
        x, _ = self.first(x)
        x, _ = self.second(self.drop(x))
        tags: Tensor = self.tag(x).transpose(0, 1)
        return tags


class Unrolled(nn.Module):
    """Two LSTM cells, stepped by a Python loop: each parameter is used at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12))
        self.low, self.high = nn.LSTMCell(12, 12), nn.GRUCell(12, 12)
        self.outward = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        h = c = top = x.new_zeros(x.shape[0], 12)
        for step in x.unbind(1):
            h, c = self.low(step, (h, c))
        for _ in range(2):
            top = self.high(h, top)
        logits: Tensor = self.outward(top)
        return logits


class Translator(nn.Module):
    """A GRU reads, another one writes and looks back; embedding and output share their weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(40, 12), nn.Embedding(40, 12)
        self.reader = nn.GRU(12, 12, num_layers=2, batch_first=True)
        self.writer = nn.GRU(12, 12, batch_first=True)
        self.mix = nn.Linear(24, 12)
        self.out = nn.Linear(12, 40, bias=False)
        if tied:
            self.out.weight = self.target.weight

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        memory, state = self.reader(self.source(source))
        h, _ = self.writer(self.target(target), state[-1:])
        attention = torch.bmm(h, memory.transpose(1, 2)).softmax(-1)
        h = self.mix(torch.cat([h, attention @ memory], -1)).tanh()
        return {"logits": self.out(h), "attention": attention}


def _pairs(rows: int) -> dict[str, Tensor]:
    return {"source": tokens(6, 40)(rows), "target": tokens(5, 40)(rows).flip(0)}


class Stack(nn.Module):
    """Layers of their own with residuals and norms, as in speech recognisers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.GRU(12, 12, batch_first=True) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(4))
        self.inward, self.out = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))[0]
        logits: Tensor = self.out(x).log_softmax(-1)
        return logits


def entries() -> list[Entry]:
    steps = floats(5, 6)
    fused: dict[str, Any] = {
        "lstm": (nn.LSTM, {"num_layers": 4, "dropout": 0.1}),
        "lstm_bidirectional": (nn.LSTM, {"num_layers": 3, "bidirectional": True}),
        "lstm_projected": (nn.LSTM, {"num_layers": 3, "proj_size": 8}),
        "gru": (nn.GRU, {"num_layers": 4}),
        "gru_bidirectional": (nn.GRU, {"num_layers": 3, "bidirectional": True, "dropout": 0.2}),
        "rnn_relu": (nn.RNN, {"num_layers": 4, "nonlinearity": "relu"}),
    }
    return [
        *(
            Entry(
                f"recurrent/{name}",
                "recurrent",
                partial(Classifier, kind, **options),
                steps,
                quick=name in ("lstm", "gru", "rnn_relu"),
            )
            for name, (kind, options) in fused.items()
        ),
        Entry("recurrent/states", "recurrent", States, _with_states, quick=True),
        Entry("recurrent/tagger", "recurrent", Tagger, lambda rows: (tokens(6, 50)(rows),)),
        Entry("recurrent/unrolled", "recurrent", Unrolled, steps),
        Entry("recurrent/translator", "recurrent", partial(Translator, False), _pairs),
        Entry("recurrent/translator_tied", "recurrent", partial(Translator, True), _pairs, tied="untie"),
        Entry("recurrent/stack", "recurrent", Stack, steps),
    ]
