"""Replicas take their own rows of what belongs to the global batch: of its masks, and of its local losses."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replica_tools import Encoding
from torch import Tensor, nn

from autodecouple.errors import InputError
from autodecouple.objectives import DeInfoReg, EarlyExit, Objective, SupCon
from autodecouple.objectives.gather import gathered_head
from autodecouple.objectives.together import gather_rows
from autodecouple.plans import TensorSpec
from autodecouple.randomness import Randomness
from autodecouple.shards import Piece, Shard, row_sizes

row_counts = st.lists(st.integers(1, 7), min_size=1, max_size=4)


@given(row_counts, st.integers(1, 4))
def test_pieces_are_the_global_micro_batches_row_by_row(rows: list[int], count: int) -> None:
    """In the order of replicas and of their micro-batches; and as many as each of these has rows."""
    found: list[tuple[int, int]] = []
    for replica in range(len(rows)):
        shard = Shard(tuple(rows), replica, count)
        for micro_batch, size in enumerate(row_sizes(rows[replica], count)):
            pieces = list(shard.pieces(micro_batch))
            assert sum(piece.rows for piece in pieces) == size
            found += [(piece.micro_batch, piece.start + row) for piece in pieces for row in range(piece.rows)]
    assert found == [(m, row) for m, size in enumerate(row_sizes(sum(rows), count)) for row in range(size)]


def test_a_shard_of_two_micro_batches() -> None:
    """The example of the docstring: rows 0 to 4 here, of which the first micro-batch has three."""
    shard = Shard((5, 3), 0, 2)
    assert list(shard.pieces(0)) == [Piece(0, 0, 3, 4)]
    assert list(shard.pieces(1)) == [Piece(0, 3, 1, 4), Piece(1, 0, 1, 4)]
    assert shard.share == 5 / 8


@st.composite
def masked_batches(draw: st.DrawFn) -> tuple[Tensor, int, int, list[int], int]:
    """A global batch in any order of memory, its dimension of rows, which may be folded, rows, and micro-batches."""
    count = draw(st.integers(1, 3))
    rows = draw(st.lists(st.integers(count, 5), min_size=1, max_size=3))
    fold, dim = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    sizes = draw(st.lists(st.integers(1, 3), min_size=3, max_size=3))
    sizes[dim] = sum(rows) * fold
    order = draw(st.permutations(range(3)))
    x = torch.ones([sizes[d] for d in order]).permute([order.index(d) for d in range(3)])
    return x, dim, fold, rows, count


@settings(deadline=None)
@given(masked_batches())
def test_masks_of_replicas_are_those_of_one_process(case: tuple[Tensor, int, int, list[int], int]) -> None:
    """To the last bit, for rows in any dimension, folded with others, channels first or last, and micro-batches."""
    x, dim, fold, rows, count = case

    def slices(whole: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """As micro-batches are: in memory of their own, in the order of the whole."""
        return [torch.empty_like(whole.narrow(dim, 0, size * fold)).fill_(1) for size in sizes]

    expected = [
        Randomness(3, 5, m).dropout(part, 0.4, "drop") for m, part in enumerate(slices(x, row_sizes(sum(rows), count)))
    ]
    found = [
        Randomness(3, 5, m, Shard(tuple(rows), replica, count)).dropout(part, 0.4, "drop", dim)
        for replica in range(len(rows))
        for m, part in enumerate(slices(x, row_sizes(rows[replica], count)))
    ]
    assert torch.equal(torch.cat(found, dim), torch.cat(expected, dim))


def test_a_mask_without_rows_is_the_same_on_all_replicas() -> None:
    masks = [
        Randomness(3, 5, 0, Shard((4, 4), replica)).dropout(torch.ones(8), 0.5, "drop", None) for replica in (0, 1)
    ]
    assert torch.equal(masks[0], masks[1]) and torch.equal(
        masks[0], Randomness(3, 5).dropout(torch.ones(8), 0.5, "drop")
    )


def test_a_mask_whose_rows_are_not_the_batch_is_refused() -> None:
    with pytest.raises(InputError, match="'drop' has 7 rows for a batch of 4"):
        Randomness(3, 5, 0, Shard((4, 4), 0)).dropout(torch.ones(7), 0.5, "drop")


def test_kernels_that_draw_inside_draw_other_numbers_on_each_replica() -> None:
    draws = [
        Randomness(3, 5, 0, shard).seeded_rows(torch.rand, "noise", 50)
        for shard in (Shard((4, 4), 0), Shard((4, 4), 1), Shard((4, 4), 1))
    ]
    assert not torch.equal(draws[0], draws[1]) and torch.equal(draws[1], draws[2])


# ---------------------------------------------------------------- local losses


class Threads:
    """Replicas in threads, who hand each other their rows."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)


class ThreadExchange:
    def __init__(self, threads: Threads, replica: int, share: float) -> None:
        self.threads, self.replica, self.share = threads, replica, share

    def all_gather(self, rows: Tensor) -> list[Tensor]:
        self.threads.slots[self.replica] = rows.detach().clone()
        self.threads.barrier.wait()
        found = list(self.threads.slots)
        self.threads.barrier.wait()
        return found


VECTORS = TensorSpec("h", (12, 6), "float64")
TOKENS = TensorSpec("h", (12, 4, 6), "float64")
GRID = TensorSpec("h", (12, 3, 4, 4), "float64")
ROW_LABELS = TensorSpec("y", (12,), "int64", num_classes=3)
TOKEN_LABELS = TensorSpec("y", (12, 4), "int64", num_classes=3)

HEADS: dict[str, tuple[Objective, list[TensorSpec], TensorSpec]] = {
    "supcon": (SupCon(out=5, hidden=7), [VECTORS], ROW_LABELS),
    "supcon of tokens": (SupCon(out=5, hidden=7), [TOKENS], TOKEN_LABELS),
    "supcon as a sum": (SupCon(out=5, hidden=7, normalisation="eq2"), [GRID], ROW_LABELS),
    "supcon of several": (SupCon(out=5, hidden=7), [VECTORS, GRID], ROW_LABELS),
    "deinforeg": (DeInfoReg(widths=(7, 5), alpha=0.1), [GRID], ROW_LABELS),
    "deinforeg of tokens": (DeInfoReg(widths=(7, 5), ce="unmerge", projector="mlp"), [TOKENS], TOKEN_LABELS),
    "early exit": (EarlyExit(hidden=7), [GRID], ROW_LABELS),
    "early exit of tokens": (EarlyExit(), [TOKENS], TOKEN_LABELS),
    "one that knows of no replicas": (Encoding(), [VECTORS], ROW_LABELS),
}


def loss_and_gradients(head: nn.Module, features: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, list[Tensor], Any]:
    leaves = [feature.clone().requires_grad_() for feature in features]
    head.zero_grad()
    loss, signal = head(*leaves, labels)
    loss.backward()
    inner = [parameter.grad.clone() for parameter in head.parameters() if parameter.grad is not None]
    return loss.detach(), [*(leaf.grad for leaf in leaves if leaf.grad is not None), *inner], signal


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.data())
@pytest.mark.parametrize("name", HEADS)
def test_gathered_losses_are_those_of_the_global_batch(name: str, size: int, data: st.DataObject) -> None:
    """For shards of any size, and labels that do not count: the loss on every replica, the gradient at its features,
    once weighted by its share, and that of the head's parameters, weighted and summed over the replicas."""
    objective, specs, signal = HEADS[name]
    rows = data.draw(st.lists(st.integers(1, 6), min_size=size, max_size=size).filter(lambda rows: sum(rows) > 1))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    head = gathered_head(objective, specs, signal)
    features = [torch.randn(sum(rows), *spec.shape[1:], dtype=torch.float64) for spec in specs]
    lowest = 0 if isinstance(objective, Encoding) else -1
    labels = torch.randint(lowest, 3, (sum(rows), *signal.shape[1:]))
    threads = Threads(size)
    heads = [copy.deepcopy(head) for _ in rows]
    for replica, own in enumerate(heads):
        gather_rows(own, ThreadExchange(Threads(1), 0, 1.0))
        gather_rows(own, ThreadExchange(threads, replica, rows[replica] / sum(rows)))  # the last one counts
    loss, gradients, encoded = loss_and_gradients(head, features, labels)
    parts = list(zip(*(feature.split(rows) for feature in features), strict=True))
    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(loss_and_gradients, heads, parts, labels.split(rows)))
    weighted = [[gradient * count / sum(rows) for gradient in each[1]] for each, count in zip(found, rows, strict=True)]
    columns = list(zip(*weighted, strict=True))
    for each in found:
        torch.testing.assert_close(each[0], loss, rtol=1e-10, atol=1e-12)
    num_features = len(features)
    ours = [torch.cat(column) for column in columns[:num_features]] + [sum(column) for column in columns[num_features:]]
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11)
    assert torch.equal(torch.cat([each[2] for each in found]), encoded) or objective.encodes
    torch.testing.assert_close(torch.cat([each[2] for each in found]), encoded)


def test_a_head_that_reads_a_tensor_without_rows_is_refused() -> None:
    head = EncodingHeadWithTable()
    gather_rows(head, ThreadExchange(Threads(1), 0, 1.0))
    with pytest.raises(InputError, match=r"reads a tensor \(2, 3\) without a row for each of the 4"):
        head(torch.randn(4, 6), torch.randn(2, 3), torch.zeros(4, dtype=torch.int64))


class EncodingHeadWithTable(nn.Module):
    def forward(self, features: Tensor, table: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
        return features.sum() + table.sum(), signal
