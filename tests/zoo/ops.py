"""torchvision, also where its C++ operators do not load: its wheel for CUDA beside torch for the CPU.

Importing it registers a fake implementation of `nms`, which wants the operator to exist. No model of the zoo calls it.
"""

from __future__ import annotations

import torch


def _loads() -> bool:
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        return False
    return True


DECLARED = torch.library.Library("torchvision", "FRAGMENT")
"""Held on to: the declarations go with it."""

if not _loads():
    for name in ("nms", "qnms"):
        DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402 - these import torchvision
import torchvision  # noqa: E402
import transformers  # noqa: E402

transformers.logging.set_verbosity_error()

__all__ = ["timm", "torchvision", "transformers"]
