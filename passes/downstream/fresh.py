"""Weights of one's own for a copy of a part of the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def own_copy(tensor: Tensor, weights: str) -> Tensor:
    """A parameter or buffer of the model as one of a head, drawn from torch's default generator.

    weights: "fresh" puts the rows and the columns of a trainable matrix or kernel into random order, whatever its
             scale, zeros and orthogonality; the rest is copied: where a bias or norm stands is part of what it is
    On fake tensors, and of a model without memory, only the form.
    """
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    if not isinstance(made, FakeTensor) and not tensor.is_meta:
        source = tensor.detach().cpu()
        made.copy_(_shuffled(source) if weights == "fresh" and tensor.requires_grad else source)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _shuffled(tensor: Tensor) -> Tensor:
    for dim in range(2) if tensor.ndim > 1 else ():
        tensor = tensor.index_select(dim, torch.randperm(tensor.shape[dim]))
    return tensor
