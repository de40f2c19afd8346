"""What users of modules try on a pipeline, and what to do instead."""

from __future__ import annotations

from typing import Any

from torch import nn

from autodecouple.errors import InputError

_CONVERT = "convert the model before compile()"
_INSTEAD = {
    "forward": "call it, decoupled(x)",
    "cpu": 'use decoupled.to("cpu")',
    "cuda": 'use decoupled.to("cuda")',
    **dict.fromkeys(("half", "bfloat16", "float", "double", "type"), _CONVERT),
    **dict.fromkeys(("requires_grad_", "apply", "to_empty"), "do that to the model before compile()"),
    "zero_grad": "every update leaves the gradients at None",
}


class NotAModule:
    """Refuses what a module can do and a pipeline cannot, and says where it can be done."""

    def __deepcopy__(self, memo: object) -> NotAModule:
        raise InputError(
            "a compiled pipeline cannot be copied: copy.deepcopy(decoupled.model) copies the trained model"
        )

    def __reduce__(self) -> Any:
        raise InputError("a compiled pipeline cannot be pickled: save decoupled.state_dict() or decoupled.model")

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(nn.Module, name):
            instead = _INSTEAD.get(name, f"use decoupled.model.{name}")
            raise AttributeError(f"a compiled pipeline has no {name!r}: {instead}")
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
