"""What `compile` returns: the user's model, trained in stages."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from autodecouple import checkpoints, fitting, replanning, states
from autodecouple.epochs import Epoch
from autodecouple.errors import CheckpointError, ClosedError, InputError
from autodecouple.executors import Step
from autodecouple.exits import Exits
from autodecouple.fitting import Saving
from autodecouple.flat import flatten
from autodecouple.graph import Graph
from autodecouple.options import Options
from autodecouple.parts import part_of
from autodecouple.passes.capturing.bind import bind
from autodecouple.passes.divide import Piece, divide
from autodecouple.passes.place import check_device
from autodecouple.pipeline import Pipeline, build
from autodecouple.plans import Plan
from autodecouple.refusals import NotAModule
from autodecouple.stage import Stage
from autodecouple.timeline import Timeline


class Decoupled(NotAModule):
    """A model whose stages train on local losses, batch after batch, without waiting for each other.

    `train_step` returns at once; whatever reads the model (calling it, `model`, `state_dict`, `evaluate`) waits for the
    batches that are under way. Also a context manager, which closes the workers.

    Under torchrun every rank trains its own stages: `train_step` takes inputs on rank 0 only, a step knows the losses
    of the rank's stages, and on the last rank the output. All that waits for batches or reads the model is collective:
    call it on every rank, at the same places. With data_parallel= the first rank of each replica takes inputs, a shard
    of the global batch, and the losses are those of the global batch.
    """

    def __init__(self, model: nn.Module | Graph, options: Options) -> None:
        self._model = model.model if isinstance(model, Graph) else model
        self._captured = model if isinstance(model, Graph) else None
        self._options = options
        self._pipeline: Pipeline | None = None
        self._next_batch = 0
        self._closed = False
        self._warned = False
        self._writer = checkpoints.Writer()
        self._divided: tuple[Pipeline, tuple[Piece, ...] | None] | None = None

    # ---------------------------------------------------------------- training

    def capture(self, example_inputs: Any, example_target: Any = None) -> Decoupled:
        """Capture, cut and place the model now, for inputs like these; the first `train_step` does it otherwise."""
        if self._pipeline is not None:
            raise InputError("the model has been captured already: compile it again for other inputs")
        if self._closed:
            raise ClosedError("the pipeline was closed; compile the model again")
        self._attach(build(self._captured or self._model, example_inputs, example_target, self._options))
        return self

    def _ensure_captured(self, inputs: Any, target: Any = None) -> None:
        """Capture for inputs like these, unless that was done before."""
        if self._pipeline is None:
            if inputs is None:
                raise InputError(
                    "the model has not been captured: pass example_inputs= to compile(), or the first batch's inputs,"
                    " on every rank"
                )
            self.capture(inputs, target)

    def _attach(self, pipeline: Pipeline) -> None:
        """Workers must end with this object, and they hold no reference to it."""
        self._pipeline = pipeline
        # Not waiting for them: the collector may run in any thread, while it holds what they are waiting for.
        self._finalizer = weakref.finalize(self, pipeline.executor.close, abort=True, wait=False)
        self._finalizer.atexit = False  # the executor sees to that

    def train_step(self, inputs: Any, target: Any = None) -> Step:
        """Train every stage on one batch; returns at once, waiting only for room in the pipeline.

        inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; target: class indices (N,), or what
        the criterion takes. Raises InputError before anything runs if they do not fit, and the error of an earlier
        batch if there was one: batches before that one are trained, it and later ones are left out from the stage that
        failed on.
        """
        if self._closed:
            raise ClosedError("the pipeline was closed; compile the model again to go on training")
        self._ensure_captured(inputs, target)
        pipeline = self._compiled
        job = pipeline.job(self._next_batch, inputs, target)
        self._next_batch += 1  # first: Ctrl-C may come between, and no two batches may have one number
        pipeline.executor.submit(job)
        return Step(job, pipeline.output)

    def synchronize(self) -> None:
        """Wait until every batch is trained on every stage, and every checkpoint written; raises the first error."""
        self._drain()
        self._writer.wait()

    def _drain(self) -> None:
        """Wait for the batches; a checkpoint may still be under way."""
        if self._pipeline is None or self._closed:
            return
        self._pipeline.executor.synchronize()
        self._warn_without_positives()

    def _gather(self) -> None:
        """Wait for all batches, and hold here what was trained elsewhere."""
        self._drain()
        if self._pipeline is not None and not self._closed:
            self._pipeline.executor.gather()

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int = 1,
        *,
        validation: Iterable[Any] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        save_every: int | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> list[Epoch]:
        """Train for some epochs with a progress bar on stderr; returns the history.

        loader: gives (inputs, target), or (input, ..., input, target), or a dict with "labels"
        validation: the same, evaluated after each epoch
        checkpoint: folder to save to after each epoch, in the background
        save_every: batches of an epoch after which to save there, too
        resume:     go on from the checkpoint if there is one: in the middle of an epoch with the batch that is next, in
                    the same order where that is drawn by torch's generator or the loader's; `epochs` counts from the
                    first run's first. The model must have been captured: compile(..., example_inputs=...)
        """
        saving = Saving.checked(checkpoint, save_every, resume)
        return fitting.fit(self, loader, epochs, validation, saving, progress)

    def replan(self, n_stages: int | None = None, *, min_gain: float = 0.03) -> Plan:
        """Balance the stages anew by what they have taken so far, and go on training exactly where this stands.

        n_stages: another number of stages; None keeps theirs, and then changes nothing unless the slowest lane takes
                  less time by `min_gain`, a share of what it takes: the plan that is returned is then the old one
        Weights, buffers, the states of optimizers (which are new objects) and schedulers go over by parameter; heads
        whose cut stays are kept, others begin anew. `cut_at` and `plan` no longer count, `no_split` and limits of
        memory do. Raises InputError, and changes nothing, before the first batch and under torchrun.
        """
        self._gather()
        if self._closed:
            raise ClosedError("the pipeline was closed; compile the model again")
        if (pipeline := replanning.replan(self._compiled, n_stages, min_gain)) is not None:
            self._finalizer.detach()
            self._attach(pipeline)
        return self.plan

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """Mean criterion loss, and accuracy where the output is (N, C) and the target (N,), in evaluation mode."""
        return fitting.evaluate(self, loader)

    # ---------------------------------------------------------------- inference and the model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output in evaluation mode, without gradients: its own parameters only, no heads."""
        self._gather()
        pipeline = self._pipeline
        if pipeline is not None and pipeline.inference is not None:
            with torch.no_grad():
                found = pipeline.inference(*bind(pipeline.graph, kwargs or args))
            return pytree.tree_unflatten(list(found), pipeline.graph.evaluation_spec)
        devices = {stage.device for stage in pipeline.stages} if pipeline is not None else set()
        if len(devices) > 1:
            raise InputError(
                "the stages lie on several devices and the evaluation mode could not be captured: move them to one,"
                ' decoupled.to("cpu"), to run the model'
            )
        args, kwargs = pytree.tree_map(lambda x: _to(x, devices), (args, kwargs))
        with states.evaluating(self._model), torch.no_grad():
            return self._model(*args, **kwargs)

    @property
    def exits(self) -> Exits:
        """Answers beside the model's own: at the stages, of several together, and inference that ends early."""
        self._gather()
        return Exits(self)

    @property
    def _pieces(self) -> tuple[Piece, ...] | None:
        """The evaluation mode in pieces, one per stage, made when first asked for; None where that cannot be."""
        pipeline = self._compiled
        if self._divided is None or self._divided[0] is not pipeline:
            self._divided = pipeline, divide(pipeline.graph, pipeline.plan)
        return self._divided[1]

    @property
    def model(self) -> nn.Module:
        """The user's own module, trained; reading it waits for the batches under way."""
        self._gather()
        return self._model

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters; heads are not among them."""
        return self.model.parameters()

    def train(self, mode: bool = True) -> Decoupled:
        """Set the mode of the user's module; training steps always train, and calls always evaluate."""
        self.model.train(mode)
        return self

    def eval(self) -> Decoupled:
        return self.train(False)

    def to(self, device: Any) -> Decoupled:
        """Move all stages, heads and optimizer states to one device."""
        if not isinstance(device, (str, torch.device)):
            raise InputError(f"to({device!r}): stages move between devices only; convert the model before compile()")
        name = check_device(device)
        self._gather()
        if self._pipeline is None:
            self._model.to(name)
        else:
            self._finalizer.detach()
            self._attach(states.move(self._compiled, name))
            if self._closed:
                self._compiled.executor.close()
        return self

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from: the model under its own names, heads, optimizers, random state, step.

        A copy: training on does not change it.
        """
        self._gather()
        return copy.deepcopy(states.collect(self._compiled, self._next_batch))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, exactly if the cuts are the same.

        Raises CheckpointError, and changes nothing, where it does not fit. Of other cuts the model, what the optimizers
        know of its parameters and the heads at cuts that both have come back; other heads stay as they are, and a
        warning names them.
        """
        self._drain()
        self._next_batch = states.restore(self._compiled, state)

    def save(self, path: str | os.PathLike[str], *, background: bool = False) -> None:
        """Write a checkpoint, a folder: a new one is complete before it replaces the old.

        Under torchrun every rank writes its own stages, into the folder that rank 0 names.
        background: copy the state and return; it is written while training goes on. The next `save`, `synchronize` or
        `close` waits for it, and raises CheckpointError if it could not be written
        """
        self._save(path, background)

    def _save(self, path: str | os.PathLike[str], background: bool, loop: Any = None) -> None:
        """With where a loop over epochs stands, each rank's own."""
        self._drain()
        pipeline, ranks = self._compiled, self._compiled.executor.ranks
        if ranks.size == 1:
            self._gather()
        if ranks.size > 1 or pipeline.executor.leads:
            state = states.collect(pipeline, self._next_batch) | ({"loops": {ranks.rank: loop}} if loop else {})
            self._writer.save(part_of(flatten(state), pipeline, ranks), Path(path).resolve(), background, ranks)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote; raises CheckpointError for what is not whole, and as `load_state_dict` does."""
        self._next_batch = states.restore(self._compiled, self._read(path))

    def resume(self, path: str | os.PathLike[str]) -> int:
        """Go on from the checkpoint if there is one, as after a restart; returns how many batches are trained so far.

        Raises as `load` does for a checkpoint that is not whole, or does not fit.
        """
        pipeline = self._compiled
        if checkpoints.exists(Path(path).resolve()):
            self._next_batch = states.restore(pipeline, self._read(path))
        return self._next_batch

    def _read(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """The state in a checkpoint, when all that was under way is done."""
        self._writer.wait()
        self._drain()
        return checkpoints.load(Path(path).resolve())

    # ---------------------------------------------------------------- looking at it

    @property
    def plan(self) -> Plan:
        return self._compiled.plan

    @property
    def graph(self) -> Graph:
        return self._compiled.graph

    @property
    def stages(self) -> Sequence[Stage]:
        return self._compiled.stages

    @property
    def code(self) -> tuple[str, ...]:
        """The generated Python of every stage."""
        return tuple(code.text for code in self._compiled.codes)

    @property
    def optimizers(self) -> list[Optimizer]:
        """One per stage."""
        return [stage.optimizer for stage in self._compiled.stages if stage.optimizer is not None]

    @property
    def schedulers(self) -> list[Any]:
        return [stage.scheduler for stage in self._compiled.stages if stage.scheduler is not None]

    @property
    def timeline(self) -> Timeline:
        """When every action ran, as measured, of the last batches."""
        self._drain()
        return self._compiled.executor.timeline

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        if self._pipeline is None:
            return {"text/plain": repr(self)}
        return self.plan._repr_mimebundle_(include, exclude)

    def __repr__(self) -> str:
        name = type(self._model).__name__
        if self._pipeline is None:
            return f"Decoupled({name}, captured at the first batch)"
        return f"Decoupled({name}, {len(self.plan.stages)} stages on {len(self.plan.lanes)} lanes)"

    # ---------------------------------------------------------------- the end

    def close(self) -> None:
        """Finish the batches, and the checkpoint, under way and end the workers; inference and saving go on to work."""
        try:
            self._writer.wait()  # before the ranks part
        finally:
            try:
                if self._pipeline is not None and not self._closed:
                    self._pipeline.executor.close()
            finally:
                self._closed = True
                if self._pipeline is not None:
                    self._finalizer.detach()

    def __enter__(self) -> Decoupled:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self.close()
            return
        self._closed = True
        if self._pipeline is not None:
            self._finalizer.detach()
            self._pipeline.executor.close(abort=True)
        with contextlib.suppress(CheckpointError):  # what has led here is the error to see
            self._writer.wait()

    @property
    def _compiled(self) -> Pipeline:
        if self._pipeline is None:
            raise InputError(
                "the model is captured at its first batch: pass example_inputs= to compile() to have it now"
            )
        return self._pipeline

    def _warn_without_positives(self) -> None:
        """Say once that SupCon had batches in which no two rows shared a class."""
        if self._warned or self._pipeline is None:
            return
        heads = [code.head for code in self._pipeline.codes]
        counts = [getattr(head, "batches_without_positives", None) for head in heads]
        found = [(index, int(count)) for index, count in enumerate(counts) if count is not None and int(count) > 0]
        if found:
            self._warned = True
            warnings.warn(
                f"{found[0][1]} batches had no two rows of one class: their contrastive loss on stage {found[0][0]} is"
                " 0 and trains nothing. Larger batches, or batches sampled by class, avoid this.",
                stacklevel=4,
            )


def _to(value: Any, devices: set[torch.device]) -> Any:
    """A tensor on the one device that the model is on."""
    return value.to(next(iter(devices))) if isinstance(value, torch.Tensor) and len(devices) == 1 else value
