"""Coupled stages in the runtime of torch.distributed.pipelining: one lane per process.

The runtime is given the orders of all lanes (GPipe, 1F1B, interleaved, zero bubble: those of `schedules`, which are
torch's own), refuses what would deadlock, and runs its lane's, each action as a call of one of the stages here and
under its name in a profile:

    order      1F0 1F1 3F0 3L0 3B0 ...          lane 1 of 2
    runtime    PP:1F0 PP:1F1 PP:3F0 PP:3B0      3L0 goes with 3B0; updates are behind the runtime's last action

The stages do what they do in every executor, so that weights are the same to the last bit. What crosses goes over the
lane's `Links`: torch's own transfers take tensors of one shape and layout for all micro-batches and batches, which the
smaller last batch, masks and numbers that cross are not, and nothing ends their wait for a rank that has failed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Op
from autodecouple.schedules.program import Program

Act = Callable[[Action], None]
_LETTERS = {Op.FORWARD: "F", Op.BACKWARD: "B", Op.WEIGHT: "W"}
_INPUTS = "I"
"""In place of B, of a backward whose weights are taken apart."""


def suits(plan: Plan) -> bool:
    """Whether every cut is coupled, and there is a lane to wait for."""
    return len(plan.lanes) > 1 and not any(cut.detached for cut in plan.cuts)


class Pipelining:
    """Walks a lane in torch's runtime, which is made once per number of micro-batches."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Cursor]] = {}

    def __call__(self, program: Program, lane: int, act: Act) -> None:
        count = program.schedule.num_micro_batches
        if count not in self._made:
            cursor = Cursor()
            self._made[count] = _runtime(program, lane, cursor), cursor
        runtime, cursor = self._made[count]
        cursor.begin(iter(program.lanes[lane]), act)
        with contextlib.suppress(_Stopped):
            runtime.step(return_outputs=False)
        cursor.finish()


class _Stopped(BaseException):
    """Ends the runtime where the cursor holds an error: for an Exception it would write all orders to the log."""


class Cursor:
    """Where a lane stands in its order: LOSS and UPDATE, which the runtime does not know, are taken in their place."""

    def begin(self, actions: Iterator[Action], act: Act) -> None:
        self._actions = actions
        self._act = act
        self._error: Exception | None = None

    def advance(self, until: Action) -> None:
        """Take all actions up to this one."""
        try:
            for action in self._actions:
                self._act(action)
                if action.op in _LETTERS:
                    assert action == until, f"torch's runtime has come to {until}, but the lane to {action}"
                    return
        except Exception as error:
            self._error = error
            raise _Stopped from None

    def finish(self) -> None:
        """Take what is left, which is updates, or raise what has ended the runtime."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # it holds this frame, and the frame would hold it
        for action in self._actions:
            self._act(action)


@dataclass(eq=False)
class RuntimeStage:
    """A stage as the runtime sees it: which one it is, and what to call for an action.

    Nothing is handed in or out: values wait in the job, and their transfers belong to the actions.
    """

    stage_index: int
    num_stages: int
    group_rank: int
    group_size: int
    cursor: Cursor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    submod: nn.Module = field(default_factory=nn.Identity)
    has_backward: bool = True
    stage_index_to_group_rank: Mapping[int, int] = field(default_factory=dict)
    args_recv_info: Mapping[int, tuple[Any, ...]] = field(default_factory=lambda: {0: ()})
    act_send_info: Mapping[int, list[int]] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1

    def forward_one_chunk(self, micro_batch: int, *args: Any, **options: Any) -> tuple[()]:
        self.cursor.advance(Action(self.stage_index, Op.FORWARD, micro_batch))
        return ()

    def backward_one_chunk(self, micro_batch: int, *args: Any, **options: Any) -> None:
        self.cursor.advance(Action(self.stage_index, Op.BACKWARD, micro_batch))

    def backward_weight_one_chunk(self, micro_batch: int, *args: Any, **options: Any) -> None:
        self.cursor.advance(Action(self.stage_index, Op.WEIGHT, micro_batch))

    def _nothing(self, *args: Any, **options: Any) -> tuple[()]:
        return ()

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = _nothing
    _get_init_p2p_neighbors_ops = _prepare_forward_infra = _prepare_backward_infra = _nothing
    set_local_fwd_input = set_local_bwd_input = get_local_bwd_output = _nothing
    clear_runtime_states = perform_reduce_grad = scale_grads = _nothing


def _runtime(program: Program, lane: int, cursor: Cursor) -> Any:
    """Torch's runtime of a lane, which knows the order of all."""
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime  # takes seconds to import

    plan = program.plan
    stages = [RuntimeStage(index, len(plan.stages), lane, len(plan.lanes), cursor) for index in plan.lanes[lane]]
    runtime = _PipelineScheduleRuntime(stages, program.schedule.num_micro_batches, scale_grads=False)
    runtime._prepare_schedule_with_comms(orders(program))
    return runtime


def orders(program: Program) -> dict[int, list[Any]]:
    """Every lane's order in torch's words, where a backward of inputs only is I; without losses and updates."""
    from torch.distributed.pipelining.schedules import _Action

    split = {action.stage for action in program.actions if action.op is Op.WEIGHT}
    return {
        lane: [
            _Action.from_str(f"{a.stage}{_INPUTS if a.op is Op.BACKWARD and a.stage in split else a.op}{a.micro_batch}")
            for a in actions
            if a.op in _LETTERS
        ]
        for lane, actions in enumerate(program.lanes)
    }
