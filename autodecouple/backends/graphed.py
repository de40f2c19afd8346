"""A stage as CUDA graphs: what it does with a batch is recorded once, and then queued with one launch.

    batch      0      1      2      3                  4             a smaller last batch
    stage   eagerly  ...    ...    record, replay    replay  ...    eagerly

The first batches count as all others: they are trained on, eagerly, and so the device's libraries and the optimizer's
state are there when the recording begins. Recording runs nothing, so there is nothing to undo.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from autodecouple.backends.obstacles import lasting_obstacle, passing_obstacle
from autodecouple.backends.rates import Rates, move_counts, on_device, options_of
from autodecouple.backends.recorder import Recorders
from autodecouple.backends.recording import Recording
from autodecouple.backends.signature import signature
from autodecouple.backends.static import GivenRandomness, KeptRandomness, Masks, keep
from autodecouple.randomness import Randomness
from autodecouple.stage import Stage
from autodecouple.work import Flag, Passage, Values, Work

WARM_UP = 3
"""Batches of one kind, in a row, that are trained on before it is recorded."""
RECORDINGS = 8
"""How often a stage is recorded anew because options of its optimizer have changed."""


class Notices:
    """Warnings about what is not recorded, each reason once, whichever stage has it first."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, stage: Stage, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f'backend="cuda_graphs": stage {stage.index} runs eagerly, because {reason}', stacklevel=2)


@dataclass
class WarmUp:
    """Batches of one kind so far, and the masks of the last: recorded code reads masks there from then on."""

    kind: Hashable = None
    count: int = 0
    masks: Masks = field(default_factory=dict)


class GraphedStage(Stage):
    """Replays the batches that are like those it has recorded, and trains on all others as any stage does."""

    def __init__(self, *given: Any, recorders: Recorders, notices: Notices) -> None:
        self._recorders = recorders
        self._notices = notices
        self._forget()
        super().__init__(*given)
        if self.optimizer is not None:
            self.optimizer.register_load_state_dict_post_hook(lambda _: self._after_loading())

    # ---------------------------------------------------------------- whether there is a recording

    def _forget(self) -> None:
        """Begin anew: something lies elsewhere now."""
        self._recording: Recording | None = None
        self._is_recording: Rates | bool = False
        self._warm_up = WarmUp()
        self._num_recordings = 0
        self._obstacle: str | None = None
        self._is_looked_at = False

    def place(self, device: torch.device) -> None:
        super().place(device)
        self._forget()

    def _after_loading(self) -> None:
        self._forget()
        if self.optimizer is not None and self.wants_signal:
            move_counts(self.optimizer)

    @property
    def wants_signal(self) -> bool:
        """Whether it may be recorded. One launch does all: it begins when what the loss reads is there, too."""
        if not self._is_looked_at:
            self._obstacle = lasting_obstacle(self, self._recorders.of(self) is not None)
            self._is_looked_at = True
        return self._obstacle is None

    def _recording_for(self, work: Work, received: Values, randomness: Randomness) -> Recording | None:
        """What to replay for a batch; None where it is trained on eagerly, with a warning unless that will end."""
        reason = passing_obstacle(work) if self.wants_signal else self._obstacle
        if reason is None:
            kind = signature((self._used(received), work.signal))
            if self._recording is None and not self._is_warm(kind):
                return None
            self._record_if_needed(kind, received, work.signal, randomness)
            if self._recording is not None and self._recording.kind == kind:
                return self._recording
            reason = self._obstacle or "batches of other shapes than those recorded, a smaller last one for instance"
        self._notices.say(self, reason)
        return None

    def _is_warm(self, kind: Hashable) -> bool:
        if self._warm_up.kind != kind:
            self._warm_up = WarmUp(kind)
        self._warm_up.count += 1
        return self._warm_up.count > WARM_UP

    # ---------------------------------------------------------------- recording

    def _record_if_needed(self, kind: Hashable, received: Values, signal: Any, randomness: Randomness) -> None:
        """Record the first time, and where options of the optimizer have changed since."""
        assert self.optimizer is not None
        old = self._recording
        if old is not None and (old.kind != kind or old.options == options_of(self.optimizer, old.rates is not None)):
            return
        self._recording = None
        self._num_recordings += 1
        if self._num_recordings > RECORDINGS:
            self._obstacle = "options of its optimizer, beside the learning rate, change again and again"
            return
        try:
            self._recording = self._record(kind, received, signal, randomness, changes=old is not None)
        except Exception as error:
            self._obstacle = f"recording it failed: {_said_first(error)}"

    def _record(
        self, kind: Hashable, received: Values, signal: Any, randomness: Randomness, changes: bool
    ) -> Recording:
        """Record forward, loss and backward, and the update: behind them, or apart where the loss is looked at before.

        changes: whether the learning rate has changed before
        """
        optimizer, recorder = self.optimizer, self._recorders.of(self)
        assert optimizer is not None and recorder is not None
        inputs, signal, masks = keep(self._used(received)), keep(signal), self._warm_up.masks
        given = GivenRandomness(randomness.seed, masks=masks)
        rates = Rates.of(optimizer, self.device) if changes or self.scheduler is not None else None
        work, at_once = Work([1]), self.training.on_nonfinite == "ignore"

        def train() -> Values:
            sent = super(GraphedStage, self).forward(work, 0, received | inputs, given)
            super(GraphedStage, self).loss(work, None, signal, given)
            super(GraphedStage, self).backward(work, 0, None)
            if at_once:
                self._descend(optimizer)
            return sent

        with self._noted(rates):
            graph, sent = recorder.record(train)
            update = None if at_once else recorder.record(lambda: self._descend(optimizer))[0]
        passed = frozenset(self.code.sends) - {*self.code.outputs, *self.code.overwrites}
        options = options_of(optimizer, rates is not None)
        return Recording(kind, options, rates, inputs, signal, masks, work, sent, passed, graph, update)

    @contextlib.contextmanager
    def _noted(self, rates: Rates | None) -> Iterator[None]:
        """While this is recorded; gradients are the graph's own, and no eager batch must add to them."""
        self._is_recording = rates or True
        try:
            yield
        finally:
            self._is_recording = False
            for parameter in self.parameters:
                parameter.grad = None

    def _used(self, received: Values) -> Values:
        """Of what was sent: what the body and the head read."""
        return {name: received[name] for name in dict.fromkeys((*self.code.inputs, *self._read)) if name in received}

    # ---------------------------------------------------------------- a batch

    def forward(self, work: Work, micro_batch: int, received: Values, randomness: Randomness) -> Values:
        recording = self._recording_for(work, received, randomness)
        if recording is None:
            keeps = self._recording is None and self.wants_signal
            kept = KeptRandomness(randomness.seed, randomness.batch, randomness.micro_batch, masks=self._warm_up.masks)
            return super().forward(work, micro_batch, received, kept if keeps else randomness)
        recording.replay(received, work.signal, randomness)
        recording.leave(work)
        work.replayed = True
        work.passages[micro_batch] = Passage({})
        return recording.send(received)

    def loss(self, work: Work, micro_batch: int | None, signal: Any, randomness: Randomness) -> Any:
        work.signal = None
        if not work.replayed:
            return super().loss(work, micro_batch, signal, randomness)
        if self.training.on_nonfinite != "ignore":
            work.finite = [Flag(loss) for loss in work.losses]
        return signal

    def _note(self, work: Work, loss: torch.Tensor) -> None:
        if self._is_recording:
            work.losses.append(loss)
        else:
            super()._note(work, loss)

    def backward(
        self, work: Work, micro_batch: int, gradients: Mapping[str, torch.Tensor] | None, *, split: bool = False
    ) -> dict[str, torch.Tensor] | None:
        if not work.replayed:
            return super().backward(work, micro_batch, gradients, split=split)
        work.passages.pop(micro_batch)
        return None

    def _step(self, work: Work) -> None:
        if not work.replayed:
            super()._step(work)
            return
        assert self._recording is not None
        work.before = None
        if self._recording.update is not None:
            self._recording.update.replay()
        if self.scheduler is not None:
            self.scheduler.step()

    def _descend(self, optimizer: Optimizer) -> None:
        if not self.wants_signal:
            super()._descend(optimizer)
            return
        rates = self._is_recording.entered() if isinstance(self._is_recording, Rates) else contextlib.nullcontext()
        with on_device(optimizer), rates:
            super()._descend(optimizer)


def _said_first(error: BaseException) -> str:
    """The first line of what began it: the end of a recording that failed fails, too."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
