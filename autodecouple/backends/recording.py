"""One stage's training on one batch, recorded: its memory and its graphs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autodecouple.backends.rates import Rates
from autodecouple.backends.recorder import Graph
from autodecouple.backends.static import Masks, fill_masks, overwrite
from autodecouple.randomness import Randomness
from autodecouple.work import Values, Work


@dataclass
class Recording:
    """Forward, loss and backward as one graph; the update is part of it unless the loss is looked at before.

    kind:    of the batches that it is for; options: of the optimizer, as they were
    inputs:  by name; signal: what the loss compares with; masks: of dropout: what every replay reads
    work:    what the batch left: loss, outputs and the buffers before it, in the graph's own memory
    sent:    to the next stage; `passed` names what is sent on as it came
    """

    kind: Hashable
    options: Hashable
    rates: Rates | None
    inputs: Values
    signal: Any
    masks: Masks
    work: Work
    sent: Values
    passed: frozenset[str]
    graph: Graph
    update: Graph | None

    def replay(self, received: Values, signal: Any, randomness: Randomness) -> None:
        """Queue everything for another batch of this kind."""
        overwrite(self.inputs, {name: received[name] for name in self.inputs})
        overwrite(self.signal, signal)
        fill_masks(self.masks, randomness)
        if self.rates is not None:
            self.rates.refresh()
        self.graph.replay()

    def leave(self, work: Work) -> None:
        """Give a batch its loss and its outputs, as copies: the next replay writes over them."""
        work.losses = [loss.clone() for loss in self.work.losses]
        work.outputs = {number: tuple(map(_copy, outputs)) for number, outputs in self.work.outputs.items()}
        work.before = self.work.before if self.update is not None else None  # else there is no way back any more

    def send(self, received: Values) -> Values:
        """What the next stage gets: copies, too, of what the graph made."""
        return {name: received[name] if name in self.passed else _copy(value) for name, value in self.sent.items()}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
