"""The loop that one would write by hand around the stages of a plan: what the runtime must not be slower than."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from autodecouple.randomness import Randomness
from autodecouple.stage import Stage


def train(stages: Sequence[Stage], names: Sequence[str], batch: int, x: Tensor, y: Tensor) -> None:
    """One batch through all stages; names: of the model's inputs, here one."""
    values = dict(zip(names, (x,), strict=True))
    for stage in stages:
        code, optimizer = stage.code, stage.optimizer
        assert code.head is not None and optimizer is not None
        draws = [Randomness(0, batch, 0)] if code.draws else []
        outputs = code.body(*(values[name] for name in code.inputs), *draws)
        values = values | dict(zip(code.outputs, outputs, strict=True))
        mask = {"mask": values[code.mask]} if code.mask is not None else {}
        loss, _ = code.head(*(values[name] for name in code.head_inputs), y, **mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values = {name: detached(values[name]) for name in code.sends}


def detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value
