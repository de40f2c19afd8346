"""One worker process per CPU lane, forked from this one: threads of one process share an interpreter lock.

Weights and buffers lie in memory that all of them see, so reading them costs nothing. What else training goes on from
(optimizers, counters) lives in the workers, and is fetched when it is asked for.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from autodecouple.errors import ClosedError, InputError
from autodecouple.executors.crew import Crew
from autodecouple.executors.job import Job
from autodecouple.executors.memory import share
from autodecouple.executors.ranks import ALONE
from autodecouple.executors.worker import Command
from autodecouple.schedules.program import Program
from autodecouple.stage import Stage
from autodecouple.stage_state import restore_stage
from autodecouple.timeline import Span, Timeline

Groups = dict[int, list[dict[str, Any]]]


class Processes:
    """Runs jobs in one worker process per lane; `submit` returns when the first lane has a batch's inputs.

    Workers are forked at the first batch, with everything as it is then, and anew after an error or a loaded state.
    """

    feeds = True
    ranks = ALONE
    leads = True

    def __init__(self, stages: Sequence[Stage], program: Program, num_threads: int) -> None:
        _check_possible(stages)
        self._stages = stages
        self._program = program
        self._num_threads = num_threads
        self._pid = os.getpid()
        self._crew: Crew | None = None
        self._spans: deque[Span] = deque(maxlen=20_000)
        self._groups: Groups = {}
        self._lost: list[int] = []  # stages whose state went with a worker
        self._is_current = True
        self._closed = False
        share(_tensors(stages))
        self._memory = self._places()
        _running.add(self)

    @property
    def timeline(self) -> Timeline:
        spans = [*self._spans, *(self._crew.spans() if self._crew is not None else ())]
        return Timeline(tuple(sorted(spans, key=lambda span: span.start)), len(self._program.lanes), "measured")

    def submit(self, job: Job) -> None:
        self._check_open()
        if job.caller.hooks is not None:
            raise InputError(
                "saved_tensors_hooks are in force, but the stages are trained in other processes, which they cannot"
                ' reach: leave them, or use executor="streams"'
            )
        if self._places() != self._memory:
            self._share_anew()
        with self._watching():
            if self._crew is None:
                self._groups = self._hyper_parameters()
                self._crew = Crew(self._stages, self._program, self._num_threads, job.seed)
            self._tell_groups(job)
            self._is_current = False
            self._crew.submit(job)

    def synchronize(self) -> None:
        self._check_process()
        with self._watching():
            if self._crew is not None:
                self._crew.drain()

    def gather(self) -> None:
        """Fetch optimizers, schedulers, counters and pending gradients; weights and buffers are here anyway."""
        if self._is_current or self._crew is None or self._pid != os.getpid():
            return
        with self._watching():
            self._restore(self._crew.fetch_states())
        self._is_current = True

    def scatter(self) -> None:
        """The next workers begin with the state that is here now."""
        self._dismiss()
        self._lost = []

    def close(self, *, abort: bool = False, wait: bool = True) -> None:
        if self._closed or self._pid != os.getpid():
            return
        try:
            if not abort:
                self.synchronize()
                self.gather()
        finally:
            self._closed = True
            self._dismiss(wait)

    # ---------------------------------------------------------------- workers

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """When the crew has ended by an error, keep what it could tell; the next batch finds a new one."""
        try:
            yield
        except BaseException:
            if self._crew is not None and self._crew.has_ended:
                told = self._crew.states
                self._restore(told)
                lanes = self._program.plan.lanes
                self._lost = [stage for lane, stages in enumerate(lanes) if lane not in told for stage in stages]
                self._dismiss()
            raise

    def _dismiss(self, wait: bool = True) -> None:
        if self._crew is not None:
            self._crew.end(wait)
            self._spans.extend(self._crew.spans())
            self._crew = None
            self._is_current = True

    def _restore(self, states: Any) -> None:
        for stages in states.values():
            for index, state in stages.items():
                restore_stage(self._stages[index], state)
        self._groups = self._hyper_parameters()

    def _tell_groups(self, job: Job) -> None:
        """Hyper-parameters that the caller has changed here hold from this batch on."""
        assert self._crew is not None
        if (groups := self._hyper_parameters()) != self._groups:
            self._crew.order([Command("groups", job.index, groups)] * len(self._program.lanes))
            self._groups = groups

    def _hyper_parameters(self) -> Groups:
        return {
            stage.index: [{k: v for k, v in group.items() if k != "params"} for group in stage.optimizer.param_groups]
            for stage in self._stages
            if stage.optimizer is not None
        }

    def _places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in _tensors(self._stages)]

    def _share_anew(self) -> None:
        """Somebody gave parameters other memory, which the workers do not see."""
        self.synchronize()
        self.gather()
        self._dismiss()
        share(_tensors(self._stages))
        self._memory = self._places()

    def _check_open(self) -> None:
        self._check_process()
        if self._closed:
            raise ClosedError("the pipeline was closed; compile the model again to go on training")
        if self._lost:
            raise ClosedError(
                f"the optimizer state of stages {self._lost} went with a worker process that was killed: load a saved"
                " state, or compile the model again"
            )

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ClosedError("this process was forked after compile(): the workers stayed with its parent")


_running: weakref.WeakSet[Processes] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Leave no process behind; multiprocessing would end them in the middle of an update."""
    for executor in list(_running):
        if executor._crew is not None and executor._pid == os.getpid():
            executor._crew.kill()


def _tensors(stages: Sequence[Stage]) -> list[torch.Tensor]:
    """All that workers read or write of a model, heads included."""
    modules = [module for stage in stages for module in (stage.code.body, stage.code.head) if module is not None]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _check_possible(stages: Sequence[Stage]) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        raise InputError('executor="processes" forks, which this system cannot do: use "streams", or torchrun')
    if torch.cuda.is_initialized():
        raise InputError(
            'executor="processes" forks, and CUDA, which is in use here, does not survive that: use "streams", or'
            " torchrun"
        )
    if other := {str(stage.device) for stage in stages if stage.device.type != "cpu"}:
        raise InputError(f'executor="processes" is for CPU lanes, but stages lie on {", ".join(sorted(other))}')
