"""Two views of every image in one batch of 2N rows, as the vision runs of SCPL have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from autodecouple.errors import InputError


@dataclass(frozen=True)
class TwoViews:
    """A transform that gives two views of an image, (first(image), second(image)): `transform=` of a dataset."""

    first: Callable[[Any], Any]
    second: Callable[[Any], Any]

    def __call__(self, image: Any) -> tuple[Any, Any]:
        return self.first(image), self.second(image)

    @staticmethod
    def scpl(size: int, mean: Sequence[float] = (), std: Sequence[float] = ()) -> TwoViews:
        """Those of the SCPL code, of torchvision's transforms, for PIL images or uint8 tensors (C, H, W).

        The first is cropped (padding 4) and flipped; the second is, besides, jittered in brightness, contrast and
        saturation (0.4) and hue (0.1) with probability 0.8, and gray with 0.2. Both are float32 in [0, 1], or
        normalised by mean and std per channel.
        """
        from torchvision.transforms import v2

        def crop() -> list[Any]:
            return [v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()]

        jitter = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(0.2)]
        end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        end += [v2.Normalize(list(mean), list(std))] if mean else []
        return TwoViews(v2.Compose([*crop(), *end]), v2.Compose([*crop(), *jitter, *end]))


def collate_views(items: Sequence[tuple[tuple[Any, Any], Any]]) -> tuple[Any, Any]:
    """A batch of items ((first, second), label): the first views, then the second ones, and the labels twice.

    For the `collate_fn=` of a DataLoader: N items give inputs (2N, ...) and targets (2N, ...). Views may be nested, as
    default_collate takes them. Raises InputError for items that have not two views.
    """
    for views, _ in items:
        if not isinstance(views, (tuple, list)) or len(views) != 2:
            raise InputError(
                f"an item must be ((first view, second view), label), but its input is {type(views).__name__}: give the"
                " dataset transform=TwoViews(first, second)"
            )
    first, second, labels = default_collate([(*views, label) for views, label in items])
    return twice(first, second), twice(labels, labels)


def twice(first: Any, second: Any) -> Any:
    """One after the other along the rows, in the structure of both."""
    return pytree.tree_map(_joined, first, second)


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape[1:] == second.shape[1:]:
        return torch.cat([first, second])
    raise InputError(f"two views must be tensors of one shape per row, but are {_named(first)} and {_named(second)}")


def _named(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else repr(value)
