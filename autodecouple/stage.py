"""One stage at work: forward, loss, backward and update of its own piece of the network."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from autodecouple.errors import InputError, NonFiniteLossError
from autodecouple.halves import backward_inputs
from autodecouple.hops import give_back, take_back, train_weights
from autodecouple.objectives.heads import full_precision
from autodecouple.passes.codegen import StageCode
from autodecouple.plans import Plan
from autodecouple.randomness import Randomness
from autodecouple.replication import DataParallel
from autodecouple.work import Before, Flag, Passage, Values, Work, copies


@dataclass(frozen=True)
class Training:
    """How every stage is trained.

    clip_grad_norm: largest gradient norm of a stage, head included; None for no clipping. The norm is local: one over
                    the whole model would couple the stages again
    accumulate:     batches per update; their gradients are averaged
    on_nonfinite:   "raise", "skip" (leave the batch out, on this stage) or "ignore"
    recompute:      keep what a stage was sent and gives, and run its forward again for its backward
    data_parallel:  in how many processes
    """

    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    scheduler: Callable[[Optimizer], Any] | None = None
    clip_grad_norm: float | None = None
    accumulate: int = 1
    on_nonfinite: str = "raise"
    recompute: bool = False
    data_parallel: DataParallel = field(default_factory=DataParallel)


class Replicas(Protocol):
    """The other processes that train a stage; `share` is how much of the global batch's rows is here."""

    share: float

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Of all replicas."""
        ...

    def unite(self, parameters: Sequence[nn.Parameter], work: Work, judge: Work) -> None:
        """Let gradients, and the losses in `judge`, be those of the global batch."""
        ...


class Stage:
    """A piece of the model with its head, optimizer and scheduler, on its device.

    `run_body` and `run_head` are what runs in the place of the body and the head: themselves, unless a backend has
    something faster.
    """

    def __init__(
        self, index: int, code: StageCode, plan: Plan, training: Training, batch_dims: Mapping[str, int | None]
    ):
        self.index = index
        self.code = code
        self.run_body: Callable[..., Any] = code.body
        self.run_head: Callable[..., Any] | None = code.head
        self.plan = plan
        self.training = training
        self.batch_dims = batch_dims
        self.coupled_before = index > 0 and plan.cuts[index - 1].attached
        self.overlaps = plan.overlaps_after(index)
        self.device = torch.device("cpu")
        self.buffers: list[torch.Tensor] = []
        self.skipped = 0
        self.pending = 0  # batches since the last update
        self.replicas: Replicas | None = None  # other processes that train this stage on rows of their own
        self.place(torch.device(plan.stages[index].device))
        self.parameters = _trainable(code)
        self.optimizer = training.optimizer(self.parameters) if self.parameters else None
        self.scheduler = training.scheduler(self.optimizer) if training.scheduler and self.optimizer else None

    @property
    def wants_signal(self) -> bool:
        """Whether the forward must find what the loss reads in `work.signal`."""
        return False

    @property
    def has_loss(self) -> bool:
        return self.code.head is not None

    @property
    def loss_stage(self) -> int:
        """The stage whose loss trains this one: itself, or the last of those it is coupled to."""
        return next(s for s in range(self.index, len(self.plan.stages)) if not self.plan.coupled_after(s))

    @property
    def loss_stages(self) -> tuple[int, ...]:
        """All whose losses train this one: that stage, and where this one overlaps the next the next one's."""
        behind = next((s for s in range(self.index + 1, len(self.plan.stages)) if not self.plan.coupled_after(s)), None)
        return (self.loss_stage, behind) if self.overlaps and behind is not None else (self.loss_stage,)

    def place(self, device: torch.device) -> None:
        """Move parameters, buffers and head; the user's objects stay the same, optimizer state follows."""
        self.device = device
        heads = [self.code.head] if self.code.head is not None else []
        for module in (self.code.body, *heads):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.to(device)
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.to(device)
        buffers = dict(self.code.body.named_buffers())
        self.buffers = [buffers[name] for name in self.code.written]
        self.buffers += [buffer for head in heads for buffer in head.buffers()]
        if getattr(self, "optimizer", None) is not None:
            assert self.optimizer is not None
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # casts its state to the parameters' device

    def forward(self, work: Work, micro_batch: int, received: Values, randomness: Randomness) -> Values:
        """Run one micro-batch; returns what the next stage is sent, free of this stage's graph."""
        if work.before is None:
            work.before = self._set_aside()
        coupled = self._coupled(received) if self.coupled_before else []
        received = received | {name: received[name].detach().requires_grad_() for name in coupled}
        again = self._recomputation(received, coupled, randomness) if self.training.recompute else None
        with torch.set_grad_enabled(again is None and torch.is_grad_enabled()):
            values = self._run(received, randomness)
        work.passages[micro_batch] = Passage(values, coupled, again)
        if self.index == len(self.plan.cuts):
            work.outputs[micro_batch] = tuple(_free(values[name]) for name in self.code.head_inputs)
        return {name: _free(values[name]) for name in self.code.sends}

    def _run(self, received: Values, randomness: Randomness) -> Values:
        """What was sent and what the body makes of it."""
        arguments = [received[name] for name in self.code.inputs]
        outputs = self.run_body(*arguments, *([randomness] if self.code.draws else []))
        return {**received, **dict(zip(self.code.outputs, outputs, strict=True))}

    def _recomputation(
        self, received: Values, coupled: Sequence[str], randomness: Randomness
    ) -> Callable[[], AbstractContextManager[Values]]:
        """The forward once more, later: the numbers drawn are keyed, and buffers must not be updated twice."""
        overwritten = [name for name in self.code.overwrites if name not in coupled]  # which the body copies itself
        kept = received | {name: received[name].clone() for name in overwritten}

        @contextlib.contextmanager
        def again() -> Iterator[Values]:
            after = [buffer.clone() for buffer in self.buffers]
            yield self._run(kept, randomness)
            with torch.no_grad():  # behind the backward, for which BatchNorm has saved its buffers
                for buffer, value in zip(self.buffers, after, strict=True):
                    buffer.copy_(value)

        return again

    def loss(self, work: Work, micro_batch: int | None, signal: Any, randomness: Randomness) -> Any:
        """Loss of the whole batch, or of one micro-batch weighted by its rows, and its gradient at the features.

        Returns the signal that the head passes on.
        """
        assert self.run_head is not None
        chosen = sorted(work.passages) if micro_batch is None else [micro_batch]
        passages = [work.passages[m] for m in chosen]
        leaves = {name: self._join(name, passages) for name in self._read}
        named: dict[str, Any] = {"mask": leaves[self.code.mask]} if self.code.mask is not None else {}
        named |= {"randomness": randomness} if self.code.head_draws else {}
        loss, encoded = self.run_head(*(leaves[name] for name in self.code.head_inputs), signal, **named)
        weight = 1.0 if micro_batch is None else work.sizes[micro_batch] / sum(work.sizes)
        weighted = loss if weight == 1.0 else loss * weight
        self._note(work, weighted.detach())
        if weighted.requires_grad:
            share = weighted / self.training.accumulate if self.training.accumulate > 1 else weighted
            with full_precision(share):  # the caller's autocast is for the forward
                share.backward()
        self._split(leaves, passages)
        return _free_tree(encoded)

    def _note(self, work: Work, loss: torch.Tensor) -> None:
        work.losses.append(loss)
        work.finite.append(Flag(loss))

    def backward(
        self, work: Work, micro_batch: int, gradients: Mapping[str, torch.Tensor] | None, *, split: bool = False
    ) -> dict[str, torch.Tensor] | None:
        """Carry the gradients of one micro-batch through the stage; returns those of its coupled inputs.

        gradients: of what a coupled next stage was sent, by the names of the plan; so are those returned
        split: leave the weights' gradients to `weight`; what is computed again is not split
        """
        if self.overlaps:
            return give_back(work.passages[micro_batch], self.code.origin) if self.coupled_before else None
        passage = work.passages.pop(micro_batch)
        take_back(passage, self._known(gradients))
        if passage.again is not None:
            passage.values = {}  # what the first forward gave comes once more
        with passage.again() if passage.again is not None else contextlib.nullcontext(passage.values) as values:
            names = [name for name in passage.gradients if values[name].requires_grad]
            if names:
                tensors = [values[name] for name in names]
                given = [passage.gradients[name] for name in names]
                with full_precision(tensors[0]):
                    if split and passage.again is None:
                        inputs = [values[name] for name in passage.coupled]
                        work.rests[micro_batch] = backward_inputs(tensors, given, inputs)
                    else:
                        torch.autograd.backward(tensors, given)
        leaves = {self.code.origin(name): values[name] for name in passage.coupled}
        sent = {name: x.grad if x.grad is not None else torch.zeros_like(x) for name, x in leaves.items()}
        return sent if self.coupled_before else None

    def _known(self, gradients: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """What the next stage has sent back, by the names that it has here."""
        named = {name: self.code.origin(name) for name in self.code.sends} if gradients else {}
        return {name: gradients[origin] for name, origin in named.items() if gradients and origin in gradients}

    def weight(self, work: Work, micro_batch: int, gradients: Mapping[str, torch.Tensor] | None = None) -> None:
        """What `backward` has left of one micro-batch: the gradients of the weights.

        gradients: where the stage overlaps the next, of that one's loss at what it was sent, by the names of the plan
        """
        if self.overlaps:
            passage = work.passages.pop(micro_batch)
            take_back(passage, self._known(gradients))
            train_weights(passage, self.code.body)
            return
        rest = work.rests.pop(micro_batch, None)
        if rest is not None and self.parameters:
            with full_precision(self.parameters[0]):
                rest()

    def update(self, work: Work, *judges: Work) -> torch.Tensor | None:
        """Step the optimizer and scheduler; returns the batch's loss, None where it is another stage's.

        judges: the works of `loss_stages`. Where one of their losses is not finite nothing is updated.
        """
        if self.replicas is not None:
            for judge in judges:
                self.replicas.unite(self.parameters if judge is judges[0] else (), work, judge)
        if self.training.on_nonfinite != "ignore" and (wrong := self._not_finite(judges)) is not None:
            self.discard(work)
            if self.training.on_nonfinite == "raise":
                stage, judge = wrong
                raise NonFiniteLossError(
                    f"the loss of stage {stage} is {math.fsum(float(loss) for loss in judge.losses)}: nothing"
                    f" of stage {self.index} was updated with this batch. Lower the learning rate, clip gradients"
                    ' (clip_grad_norm=), or pass on_nonfinite="skip".'
                )
            self.skipped += 1
        else:
            self._step(work)
        return sum(work.losses[1:], work.losses[0]) if work.losses else None

    def _not_finite(self, judges: Sequence[Work]) -> tuple[int, Work] | None:
        """The first stage whose loss is not finite, of those that train this one."""
        pairs = zip(self.loss_stages, judges, strict=True)
        return next(((s, judge) for s, judge in pairs if not all(flag.is_set() for flag in judge.finite)), None)

    def _step(self, work: Work) -> None:
        """Count the batch, and step if it completes an accumulation."""
        assert work.before is not None
        for parameter, earlier in zip(self.parameters, work.before.gradients, strict=False):
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else parameter.grad.add_(earlier)
        if self.pending + 1 < self.training.accumulate or self.optimizer is None:
            self.pending += 1
            work.before = None
            return
        self._descend(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.pending = 0
        work.before = None  # from here on there is no way back
        if self.scheduler is not None:
            self.scheduler.step()

    def _descend(self, optimizer: Optimizer) -> None:
        """Change the parameters by their gradients."""
        if self.training.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.training.clip_grad_norm)
        optimizer.step()

    def _set_aside(self) -> Before:
        """What a batch must not lose: it may have to be left out again."""
        gradients = [parameter.grad for parameter in self.parameters] if self.pending else []
        for parameter in self.parameters:
            parameter.grad = None
        return Before(copies(self.buffers), gradients)

    def discard(self, work: Work) -> None:
        """Forget a batch: gradients and buffers as they were before its forward."""
        work.passages.clear()
        work.rests.clear()
        if work.before is None:
            return
        with torch.no_grad():
            for buffer, value in zip(self.buffers, work.before.buffers, strict=True):
                buffer.copy_(value)
        gradients = work.before.gradients or [None] * len(self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        work.before = None

    def _coupled(self, received: Values) -> list[str]:
        """Names under which what couples this stage to the one before arrives, used here or passed on."""
        carrying = self.plan.cuts[self.index - 1].carrying
        names = dict.fromkeys((*self.code.inputs, *self.code.sends))
        return [name for name in names if name in received and self.code.origin(name) in carrying]

    @property
    def _read(self) -> Sequence[str]:
        return (*self.code.head_inputs, *((self.code.mask,) if self.code.mask is not None else ()))

    def _join(self, name: str, passages: Sequence[Passage]) -> Any:
        """A value of the whole batch, as a leaf: the head's graph ends here, the stage's begins here."""
        parts = [passage.values[name] for passage in passages]
        dim = self.batch_dims.get(name)
        single = len(parts) == 1 or dim is None
        whole = parts[0] if single else torch.cat([part.detach() for part in parts], dim or 0)
        if not isinstance(whole, torch.Tensor):
            return whole
        # Without its graph a value does not tell whether it would carry a gradient; one too many is dropped later.
        unknown = self.training.recompute and (whole.is_floating_point() or whole.is_complex())
        return whole.detach().requires_grad_(unknown or any(part.requires_grad for part in parts))

    def _split(self, leaves: Values, passages: Sequence[Passage]) -> None:
        """Hand every micro-batch its rows of the gradient at the features."""
        for name, leaf in leaves.items():
            if not isinstance(leaf, torch.Tensor) or leaf.grad is None:
                continue
            if len(passages) == 1:
                passages[0].gradients[name] = leaf.grad
                continue
            dim = self.batch_dims.get(name)
            if dim is None:
                raise InputError(
                    f"the loss reads {name!r}, which has no rows, so that micro-batches cannot share its gradient: take"
                    ' schedule="streaming", or a criterion that reads per-row outputs only'
                )
            sizes = [passage.values[name].shape[dim] for passage in passages]
            for passage, part in zip(passages, leaf.grad.split(sizes, dim), strict=True):
                passage.gradients[name] = part


def _trainable(code: StageCode) -> list[nn.Parameter]:
    heads = list(code.head.parameters()) if code.head is not None else []
    return [parameter for parameter in (*code.body.parameters(), *heads) if parameter.requires_grad]


def _free(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _free_tree(value: Any) -> Any:
    return pytree.tree_map(_free, value)
