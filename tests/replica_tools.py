"""Models without statistics of the batch, and global batches in shards: what tests of data parallel training share."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rank_tools import Outcome, run_ranks
from torch import Tensor, nn
from training_tools import Batch, Result, train

import autodecouple
from autodecouple.decoupled import Decoupled
from autodecouple.plans import TensorSpec

CLASSES = 4
LAYERS, WIDTH, TOKENS = 4, 6, 3


class Tokens(nn.Module):
    """Transformer layers on (N, T, D), the second of them on (T, N, D), with dropout everywhere."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"dim_feedforward": 8, "dropout": 0.2, "batch_first": True}
        self.first = nn.TransformerEncoderLayer(WIDTH, 2, **options)
        self.second = nn.TransformerEncoderLayer(WIDTH, 2, **{**options, "batch_first": False})
        self.third = nn.TransformerEncoderLayer(WIDTH, 2, **options)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).transpose(0, 1)).transpose(0, 1)
        out: Tensor = self.out(self.third(x).mean(1))
        return out


def make_model(kind: str) -> nn.Module:
    """float64, with dropout: "vectors" (N, 6), "tokens" (N, 3, 6); "synced": SyncBatchNorm instead of LayerNorm."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if kind == "tokens":
            return Tokens().double()
        norms = {"vectors": nn.LayerNorm, "synced": nn.SyncBatchNorm}
        layers = [
            nn.Sequential(nn.Linear(WIDTH, WIDTH), norms[kind](WIDTH), nn.ReLU(), nn.Dropout(0.2))
            for _ in range(LAYERS)
        ]
        return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES)).double()


class EncodingHead(nn.Module):
    """Compares the features with an encoding of the signal that it learns, and passes the encoding on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, CLASSES, dtype=torch.float64)
        self.encode = nn.Linear(CLASSES, CLASSES, dtype=torch.float64)

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        known = signal if signal.is_floating_point() else nn.functional.one_hot(signal, CLASSES).double()
        encoded = self.encode(known).tanh()
        return (self.project(features) - encoded).square().mean(), encoded


@dataclass(frozen=True)
class Encoding:
    """A toy objective that knows nothing of replicas, and whose heads pass on a signal of their own."""

    name = "encoding"
    encodes = True

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        return EncodingHead(features.shape[1])


@dataclass(frozen=True)
class Captured:
    graph: Any
    initial: dict[str, Tensor]


@functools.cache
def captured(kind: str) -> Captured:
    model = make_model(kind)
    graph = autodecouple.capture(model, (global_batches(kind, [8])[0][0],))
    return Captured(graph, {name: value.clone() for name, value in model.state_dict().items()})


def compiled(kind: str, n_stages: int, loss: Any, **options: Any) -> Decoupled:
    """A new pipeline with the initial weights: one at a time per kind and process."""
    found = captured(kind)
    found.graph.model.load_state_dict(found.initial)
    found.graph.model.zero_grad(set_to_none=True)
    return autodecouple.compile(found.graph, n_stages, loss, **options)


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def global_batches(kind: str, sizes: Sequence[int], seed: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shape = (TOKENS, WIDTH) if kind == "tokens" else (WIDTH,)
    return [
        (
            torch.randn(rows, *shape, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (rows,), generator=generator),
        )
        for rows in sizes
    ]


def shards(batches: Sequence[Batch], rows: Sequence[Sequence[int]], replica: int) -> list[Batch]:
    """The batches of one replica; rows: of every replica, per batch."""
    found = []
    for (x, y), sizes in zip(batches, rows, strict=True):
        start = sum(sizes[:replica])
        found.append((x[start : start + sizes[replica]], y[start : start + sizes[replica]]))
    return found


def one_process(kind: str, n_stages: int, loss: Any, batches: Sequence[Batch], **options: Any) -> Result:
    return train(compiled(kind, n_stages, loss, devices=["cpu"] * n_stages, executor="inline", **options), batches)


def replicated(
    lanes: int, data: Any, kind: str, n_stages: int, loss: Any, rows: Sequence[Sequence[int]], **options: Any
) -> list[Outcome]:
    """Train on lanes x replicas ranks; rank r is replica r % D of lane r // D, and every first lane has its shard."""
    captured(kind)  # once, for all
    replicas = len(rows[0])
    batches = global_batches(kind, [sum(sizes) for sizes in rows])

    def rank(number: int) -> Any:
        lane, replica = divmod(number, replicas)
        decoupled = compiled(kind, n_stages, loss, executor="distributed", data_parallel=data, **options)
        own = shards(batches, rows, replica) if lane == 0 else [(None, None)] * len(batches)
        return train(decoupled, own)  # type: ignore[arg-type]

    return run_ranks(lanes * replicas, rank)


def parts(total: int, count: int) -> tuple[int, ...]:
    """Rows of each replica, as a sampler deals them."""
    return tuple(total // count + (index < total % count) for index in range(count))


def assert_close(found: Any, expected: Any, tolerance: float, where: str = "") -> None:
    """Floating point numbers as near to each other as that, in all parts of nested values; all else is equal."""
    if isinstance(expected, Mapping):
        assert set(found) == set(expected), where
        for key in expected:
            assert_close(found[key], expected[key], tolerance, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (x, y) in enumerate(zip(found, expected, strict=True)):
            assert_close(x, y, tolerance, f"{where}[{index}]")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{where}: {text}")
    else:
        assert found == expected, where


__all__ = [
    "Encoding", "assert_close", "captured", "compiled", "global_batches", "one_process", "parts", "replicated", "sgd",
    "shards",
]  # fmt: skip
