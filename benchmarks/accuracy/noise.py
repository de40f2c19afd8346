"""Wrong labels for the training rows."""

from __future__ import annotations

import torch
from torch import Tensor


def mislabel(labels: Tensor, share: float, num_classes: int, seed: int) -> Tensor:
    """Labels (N,) of which `share`, rows drawn at random, name another class, drawn from all others alike.

    Symmetric noise without the chance of hitting the right class: exactly round(share * N) labels are wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    steps = torch.randint(1, num_classes, (len(rows),), generator=generator)
    wrong = labels.clone()
    wrong[rows] = (labels[rows] + steps) % num_classes
    return wrong
