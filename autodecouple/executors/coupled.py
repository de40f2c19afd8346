"""Coupled stages in the runtime of torch.distributed.pipelining, on lanes in processes of their own.

Its runtime takes a lane's order (GPipe, 1F1B, interleaved, zero bubble: `schedules`, which tests hold against torch's own),
adds the transfers between lanes in a sequence that cannot deadlock, and runs it, FORWARD, BACKWARD and WEIGHT each as a call
of one of the stages here:

    order      1F0 1B0 1F1 1B1 U              of lane 1 of 2
    runtime    receive 1F0, 1F0, 1B0, send 1B0, receive 1F1, ...      PP:1F0 in a profile

The stages do what they do in every executor, so that weights are the same to the last bit. What crosses goes over `Links`,
whose threads receive ahead of the lane: torch's own transfers want tensors only, of one shape and layout for all
micro-batches, which the smaller last batch, masks and numbers that cross are not, and know no way to end a wait for a rank
that has failed.
"""

from __future__ import annotations

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
        runtime.step(return_outputs=False)
        cursor.finish()


class Cursor:
    """Where a lane stands in its order. LOSS and UPDATE, which the runtime does not know, are taken where they stand."""

    def begin(self, actions: Iterator[Action], act: Act) -> None:
        self._actions = actions
        self._act = act

    def advance(self, until: Action) -> None:
        """Take all actions up to this one."""
        for action in self._actions:
            self._act(action)
            if action.op in _LETTERS:
                assert action == until, f"torch's runtime has come to {until}, but the lane to {action}"
                return

    def finish(self) -> None:
        """Take what is left: updates."""
        for action in self._actions:
            self._act(action)


@dataclass(eq=False)
class _Stage:
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
    stages = [_Stage(index, len(plan.stages), lane, len(plan.lanes), cursor) for index in plan.lanes[lane]]
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
