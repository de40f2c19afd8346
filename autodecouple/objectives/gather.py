"""One head for several tensors that cross a cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autodecouple.errors import InputError
from autodecouple.objectives.heads import check_features, head_dtype, widen
from autodecouple.objectives.layout import Layout, label_sizes
from autodecouple.objectives.objective import Objective, Signal, labels_of
from autodecouple.objectives.pool import Pool, mean_cells
from autodecouple.plans import TensorSpec


def gathered_head(objective: Objective, features: Sequence[TensorSpec], signal: Signal) -> nn.Module:
    """The objective's head for all of these features.

    Its `forward(*features, signal, mask=None)` gives `(loss, next_signal)`; the mask is for the first of them. An input
    that the objective reads comes between features and signal. One tensor goes to the objective's own head, several are
    joined first (see `Gather`). Raises InputError for features that heads cannot read, and whatever the objective does.
    """
    if not features:
        raise InputError(f"{objective.name!r} needs something to read, but no features cross the cut")
    if hasattr(objective, "joint_head"):
        head: nn.Module = objective.joint_head(features, signal)
        return head
    if len(features) == 1:
        return objective.head(features[0], signal)
    for spec in features:
        check_features(objective.name, spec)
        if spec.shape[spec.batch_dim or 0] != features[0].shape[features[0].batch_dim or 0]:
            raise InputError(f"{objective.name!r} reads {features[0]} and {spec} at once, but their rows differ")
    gather = Gather(features, label_sizes(labels_of(signal)))
    return GatheredHead(gather, objective.head(gather.spec, signal))


class GatheredHead(nn.Module):
    """Joins the features, then asks a head that knows of one tensor only."""

    def __init__(self, gather: Gather, head: nn.Module) -> None:
        super().__init__()
        self.gather = gather
        self.head = head
        self.predicts = getattr(head, "predicts", False)

    def forward(self, *features_and_signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        count = len(self.gather.layouts)
        joined = self.gather(*features_and_signal[:count], mask=mask)
        rest = features_and_signal[count:]  # the signal, and before it what of the model's input the head reads
        loss, next_signal = self.head(joined, *rest, mask=mask if self.gather.keeps_mask else None)
        return loss, next_signal

    def predict(self, *features: Tensor, mask: Tensor | None = None) -> Tensor:
        """As the head, where it predicts."""
        joined = self.gather(*features, mask=mask)
        scores: Tensor = self.head.predict(joined, mask if self.gather.keeps_mask else None)  # type: ignore[operator]
        return scores

    def decode(self, codes: Tensor) -> Tensor:
        """As the head, where it encodes."""
        decoded: Tensor = self.head.decode(codes)  # type: ignore[operator]
        return decoded


class Gather(nn.Module):
    """Several features side by side as one, at least float32; `spec` says what comes out at the example.

    one label per row, or no features with positions that labels have: each pooled to 2 cells per dimension, and their
        vectors put in a row, (N, width)
    else: the channels of all at the positions of the first that has such positions, tokens (N, T, width) or grids
        (N, width, H, W). What has positions of the same kind is averaged over the cells of the first, or repeated
        where it is coarser; what has not (a state, a sequence of another length) gives every position its pooled vector

    Why channels side by side and no sum: widths differ, so a sum needs weights of its own, and these would come before
    the objective's projector, which has such weights anyway. Every value of every tensor is in some mean, so that a
    gradient reaches all of them.
    """

    def __init__(self, features: Sequence[TensorSpec], labels: tuple[int, ...]) -> None:
        super().__init__()
        self.layouts = [Layout.of(spec, labels) for spec in features]
        self.leader = next((i for i, layout in enumerate(self.layouts) if layout.dense), None)
        self.keeps_mask = self.leader == 0
        pools = [Pool(spec) for spec in features]
        width = sum(
            layout.width if self._aligned(layout) else pool.width
            for layout, pool in zip(self.layouts, pools, strict=True)
        )
        self.pools = nn.ModuleList(pools)
        # A head would take some widths for a number of positions: then one channel of zeros more.
        self.filler = int(Layout.of(self._spec(features, width), labels).positions != self._positions)
        self.spec = self._spec(features, width + self.filler)

    def forward(self, *features: Tensor, mask: Tensor | None = None) -> Tensor:
        masks = [mask, *[None] * (len(features) - 1)]
        if self.leader is None:
            pooled = [pool(x, m) for pool, x, m in zip(self.pools, features, masks, strict=True)]
            return torch.cat(pooled, 1)
        layout = self.layouts[self.leader]
        positions = layout.arrange(features[self.leader]).shape[2:]
        parts = [self._spread(i, x, positions, m) for i, (x, m) in enumerate(zip(features, masks, strict=True))]
        if self.filler:
            parts.append(torch.zeros_like(parts[0][:, :1]))
        joined = torch.cat(parts, 1)
        return joined.movedim(1, -1) if layout.has_tokens else joined

    def _spread(self, index: int, features: Tensor, positions: tuple[int, ...], mask: Tensor | None) -> Tensor:
        """The channels of one of the features, (N, width, *positions)."""
        if not self._aligned(self.layouts[index]):
            pooled: Tensor = self.pools[index](features, mask)
            return pooled.reshape(*pooled.shape, *[1] * len(positions)).expand(-1, -1, *positions)
        channels = self.layouts[index].arrange(features)
        for dim, size in enumerate(positions, start=2):
            if channels.shape[dim] != size:
                channels = mean_cells(channels, dim, size)
        return widen(channels)

    def _aligned(self, layout: Layout) -> bool:
        """Whether the positions of these features are those of the leader, finer or coarser."""
        if self.leader is None or not layout.dense:
            return False
        ours, theirs = self.layouts[self.leader].positions, layout.positions
        return len(ours) == len(theirs) and (ours == theirs or not layout.has_tokens)

    @property
    def _positions(self) -> tuple[int, ...]:
        return () if self.leader is None else self.layouts[self.leader].positions

    def _spec(self, features: Sequence[TensorSpec], width: int) -> TensorSpec:
        rows = features[0].shape[features[0].batch_dim or 0]
        dtype = "float64" if any(head_dtype(spec) == torch.float64 for spec in features) else "float32"
        shape = (*self._positions, width) if len(self._positions) < 2 else (width, *self._positions)
        return TensorSpec(features[0].name, (rows, *shape), dtype)
