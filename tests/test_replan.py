"""Cut anew in the middle of a run: the same training as if it had been compiled so and loaded, by what stages took."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from training_tools import Batch, compiled, make_batches, sgd, train

import autodecouple
from autodecouple import replanning
from autodecouple.decoupled import Decoupled
from autodecouple.devices import Device
from autodecouple.errors import ClosedError, InputError
from autodecouple.objectives import EarlyExit, SupCon
from autodecouple.passes.charge import with_seconds
from autodecouple.passes.measuring.observed import charge_observed, seconds_per_batch
from autodecouple.schedules.actions import Action, Op
from autodecouple.stage import Stage
from autodecouple.timeline import Span, Timeline

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
SMALL = SupCon(hidden=4, out=2)
"""Its heads are cheap beside the layers, so that the layers decide."""
Seconds = Mapping[tuple[int, Op], float]


def grouped(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """No weight decay for vectors: two groups, of which a stage may lack one."""
    parts = [[p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]]
    rates = [{"weight_decay": 0.1, "lr": 0.01}, {"weight_decay": 0.0, "lr": 0.02}]
    return torch.optim.AdamW([{"params": part, **rate} for part, rate in zip(parts, rates, strict=True) if part])


def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2, amsgrad=True)


def decaying(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=40)


def slow(stage: int, n_stages: int = 3) -> Seconds:
    """One stage takes ten times as long as any other."""
    return {(k, op): 10.0 if k == stage else 1.0 for k in range(n_stages) for op in Op}


@contextmanager
def observed(seconds: Seconds) -> Iterator[None]:
    """The run is taken to have shown this."""
    with mock.patch.object(replanning, "seconds_per_batch", lambda timeline: seconds):
        yield


def names(stage: Stage, model: nn.Module) -> dict[nn.Parameter, str]:
    """Each parameter of a stage under a name that does not depend on the number of stages."""
    found = {p: name for name, p in model.named_parameters()}
    if stage.index < len(stage.plan.cuts) and stage.code.head is not None:
        after = stage.plan.cuts[stage.index].after
        found |= {p: f"{after}/{name}" for name, p in stage.code.head.named_parameters()}
    return {p: found[p] for p in stage.parameters}


class Snapshot:
    """What a run stands on, by names: collected and put into another pipeline by other means than the library's."""

    def __init__(self, decoupled: Decoupled) -> None:
        self.model = copy.deepcopy(decoupled.model.state_dict())
        self.heads = {
            cut.after: copy.deepcopy(stage.code.head.state_dict())
            for cut, stage in zip(decoupled.plan.cuts, decoupled.stages, strict=False)
            if stage.code.head is not None
        }
        self.step = decoupled._next_batch
        self.state: dict[str, Any] = {}
        self.group: dict[str, Any] = {}
        self.gradient: dict[str, Any] = {}
        self.home: dict[str, int] = {}
        self.groups: dict[tuple[int, int], Any] = {}
        for stage in decoupled.stages:
            known = names(stage, decoupled.model)
            self.pending = stage.pending
            self.scheduler = stage.scheduler.state_dict() if stage.scheduler is not None else None
            assert stage.optimizer is not None
            for number, group in enumerate(stage.optimizer.param_groups):
                for p in group["params"]:
                    self.state[known[p]] = copy.deepcopy(stage.optimizer.state.get(p, {}))
                    self.group[known[p]] = {k: v for k, v in group.items() if k != "params"}
                    self.groups.setdefault((self.home.setdefault(known[p], stage.index), number), self.group[known[p]])
                    self.gradient[known[p]] = None if p.grad is None else p.grad.clone()

    def put(self, decoupled: Decoupled) -> None:
        decoupled.model.load_state_dict(self.model)
        decoupled._next_batch = self.step
        for stage in decoupled.stages:
            if stage.index < len(decoupled.plan.cuts) and decoupled.plan.cuts[stage.index].after in self.heads:
                assert stage.code.head is not None
                stage.code.head.load_state_dict(self.heads[decoupled.plan.cuts[stage.index].after])
            self._put(stage, decoupled.model)

    def _put(self, stage: Stage, model: nn.Module) -> None:
        assert stage.optimizer is not None
        stage.pending = self.pending
        if stage.scheduler is not None:
            vars(stage.scheduler).update({k: v for k, v in self.scheduler.items() if not isinstance(v, list)})
            vars(stage.scheduler)["_step_count"] = self.scheduler["_step_count"]
        known = names(stage, model)
        source = next(self.home[name] for name in known.values() if name in self.home)
        for number, group in enumerate(stage.optimizer.param_groups):
            if not any(known[p] in self.home for p in group["params"]):  # all new, at the rate of the others
                group.update(self.groups[source, number])
            for p in group["params"]:
                if known[p] in self.state:
                    p.grad = self.gradient[known[p]]
                    group.update(self.group[known[p]])
                    if self.state[known[p]]:
                        stage.optimizer.state[p] = copy.deepcopy(self.state[known[p]])


def go_on(decoupled: Decoupled, batches: list[Batch]) -> tuple[Any, ...]:
    result = train(decoupled, batches)
    return result.losses, result.state["model"], result.state["heads"]


@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    "executor, options",
    [
        ("inline", {"optimizer": sgd}),
        ("streams", {"optimizer": sgd}),
        ("streams", {"optimizer": adam, "scheduler": decaying}),
        ("inline", {"optimizer": grouped, "scheduler": cycle}),
        ("inline", {"optimizer": adam, "accumulate": 2}),
    ],
)
@pytest.mark.parametrize("slowest, n_stages", [(0, None), (2, None), (0, 2), (1, 5)])
def test_training_goes_on_as_if_compiled_so_and_loaded(
    executor: str, options: dict[str, Any], slowest: int, n_stages: int | None
) -> None:
    """Bit for bit: weights, BatchNorm statistics, heads whose cut stays, moments, steps, groups, schedulers, masks."""
    before, after = make_batches("dropout", [8, 8, 8]), make_batches("dropout", [8, 8, 5], seed=4)
    options = {**options, "executor": executor, "lanes": 2}
    decoupled = compiled("dropout", 3, SMALL, **options)
    for x, y in before:
        decoupled.train_step(x, y)
    decoupled.synchronize()
    snapshot, old = Snapshot(decoupled), decoupled.plan
    with observed(slow(slowest)):
        plan = decoupled.replan(n_stages)
    assert plan is decoupled.plan and plan != old and len(plan.stages) == (n_stages or 3)
    found = go_on(decoupled, after)
    fresh = compiled("dropout", len(plan.stages), SMALL, plan=plan, **options)
    snapshot.put(fresh)
    expected = go_on(fresh, after)
    assert found[0] == expected[0]
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert _flat(mine).keys() == _flat(theirs).keys()
        assert all(torch.equal(value, _flat(theirs)[name]) for name, value in _flat(mine).items())


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


@pytest.mark.timeout(60)
def test_heads_whose_cut_stays_are_kept() -> None:
    with compiled("norm", 3, SMALL, optimizer=adam, executor="inline") as decoupled:
        for x, y in make_batches("norm", [8, 8]):
            decoupled.train_step(x, y)
        cuts = [cut.after for cut in decoupled.plan.cuts]
        heads = {c: copy.deepcopy(s.code.head.state_dict()) for c, s in zip(cuts, decoupled.stages, strict=False)}  # type: ignore[union-attr]
        with observed({**slow(2), **{(0, op): 1.0 for op in Op}}):
            plan = decoupled.replan(4)
        kept = [index for index, cut in enumerate(plan.cuts) if cut.after in cuts]
        assert kept
        for index in kept:
            head = decoupled.stages[index].code.head
            assert head is not None
            assert all(torch.equal(v, heads[plan.cuts[index].after][k]) for k, v in head.state_dict().items())


@pytest.mark.timeout(60)
def test_what_was_slow_becomes_small() -> None:
    with compiled("norm", 3, SMALL, executor="inline") as decoupled:
        decoupled.train_step(*make_batches("norm", [8])[0])
        old = decoupled.plan
        with observed(slow(0)):
            plan = decoupled.replan()
        assert len(plan.stages[0].nodes) < len(old.stages[0].nodes)
        assert plan.is_timed and max(plan.costs) < 40
        assert decoupled.timeline.spans == ()


@pytest.mark.timeout(60)
def test_nothing_happens_where_nothing_is_gained() -> None:
    """The cuts that the seconds ask for are the cuts that are there: the same plan, workers, and timeline."""
    with compiled("norm", 3, SMALL, executor="inline") as decoupled:
        decoupled.train_step(*make_batches("norm", [8])[0])
        with observed(slow(0)):
            plan = decoupled.replan()
        decoupled.train_step(*make_batches("norm", [8])[0])
        took = {
            (s.index, op): seconds or 0.0
            for s in plan.stages
            for op, seconds in zip(
                (Op.FORWARD, Op.LOSS, Op.BACKWARD, Op.UPDATE),
                (s.forward_seconds, s.head_seconds, s.backward_seconds, s.update_seconds),
                strict=True,
            )
        }
        stages = decoupled.stages
        with observed(took):
            assert decoupled.replan() is plan
        assert decoupled.stages is stages and decoupled.timeline.spans
        with observed(slow(1)):
            assert decoupled.replan(min_gain=1.0) is plan


@pytest.mark.timeout(60)
def test_replanning_by_a_real_run() -> None:
    batches = make_batches("norm", [8] * 3)
    with compiled("norm", 3, SMALL, cut_at=["batch_norm", "batch_norm_1"], lanes=3) as decoupled:
        for x, y in batches:
            decoupled.train_step(x, y)
        plan = decoupled.replan(2)
        assert plan.is_timed and len(plan.stages) == 2
        assert all(loss is not None for loss in decoupled.train_step(*batches[0]).losses)
        assert decoupled.train_step(*batches[0]).batch == 4


@QUICK
@given(st.data())
def test_what_was_observed_adds_up_to_what_was_observed(data: st.DataObject) -> None:
    """Shared out to nodes and heads, and added up again for the same stages: the same, on lanes of any speed.

    Where the forward runs again as a part of the backward, that takes as long as the forward at least.
    """
    decoupled, recompute = _plain(), data.draw(st.booleans())
    numbers = st.integers(1, 10**6).map(lambda us: us / 1e6)
    seconds = {(k, op): data.draw(numbers) for k in range(3) for op in Op}
    speeds = [data.draw(st.sampled_from((1.0, 0.5, 2.0))) for _ in range(3)]
    stages = tuple(
        dataclasses.replace(s, lane=s.index, speed=v) for s, v in zip(decoupled.plan.stages, speeds, strict=True)
    )
    plan = dataclasses.replace(decoupled.plan, stages=stages, recompute=recompute)
    charge = charge_observed(decoupled.graph, plan, seconds)
    charges = [dataclasses.replace(charge, speed=speed) for speed in speeds]
    found = with_seconds(plan, charges, decoupled._options.wish.objectives)
    for stage in found.stages:
        forward, backward = (seconds[stage.index, op] for op in (Op.FORWARD, Op.BACKWARD))
        assert stage.forward_seconds == pytest.approx(forward, rel=1e-3, abs=1e-6)
        assert stage.backward_seconds == pytest.approx(max(backward, recompute * forward), rel=1e-3, abs=1e-6)
    assert found.stages[-1].head_seconds == pytest.approx(seconds[2, Op.LOSS], abs=1e-8)
    heads = sum((s.head_seconds or 0) * s.speed for s in found.stages[:-1])
    updates = sum(s.update_seconds * s.speed for s in found.stages)
    shown = sum(seconds[s.index, Op.LOSS] * s.speed for s in found.stages[:-1])
    shown += sum(seconds[s.index, Op.UPDATE] * s.speed for s in found.stages)
    assert heads + updates == pytest.approx(shown, rel=1e-3, abs=1e-6)  # heads are updated, too


def _plain() -> Decoupled:
    return compiled("plain", 3, executor="inline")


def test_micro_batches_of_a_batch_are_added_up() -> None:
    spans = [
        Span(0, Action(0, Op.FORWARD, micro_batch), batch, 10.0 * batch, 10.0 * batch + seconds)
        for batch, seconds in ((0, 7.0), (1, 1.0), (2, 2.0))
        for micro_batch in range(2)
    ]
    assert seconds_per_batch(Timeline(tuple(spans), 1)) == {(0, Op.FORWARD): 4.0}


@pytest.mark.timeout(60)
def test_where_two_learning_rates_meet_each_parameter_keeps_its_own() -> None:
    """One stage's learning rate was lowered by hand: a stage made of it and another one trains both at their own."""
    batch = make_batches("norm", [8])[0]
    with compiled("norm", 3, SMALL, optimizer=sgd, lanes=2) as decoupled:
        decoupled.train_step(*batch)
        decoupled.synchronize()
        decoupled.optimizers[0].param_groups[0]["lr"] = 0.001
        before, plan = _rates(decoupled), decoupled.plan
        with observed(slow(2)):
            assert decoupled.replan() is not plan
        assert {p: rate for p, rate in _rates(decoupled).items() if p in before} == {
            p: rate for p, rate in before.items() if p in _rates(decoupled)
        }
        assert {0.001, 0.05} <= set(_rates(decoupled).values())
        assert all(loss is not None for loss in decoupled.train_step(*batch).losses)


def _rates(decoupled: Decoupled) -> dict[nn.Parameter, float]:
    groups = [group for optimizer in decoupled.optimizers for group in optimizer.param_groups]
    return {parameter: group["lr"] for group in groups for parameter in group["params"]}


@pytest.mark.timeout(60)
def test_replanning_needs_a_run_and_an_open_pipeline() -> None:
    decoupled = compiled("plain", 3, executor="inline")
    with pytest.raises(InputError, match="none was trained"):
        decoupled.replan()
    decoupled.close()
    with pytest.raises(ClosedError):
        decoupled.replan()
    with pytest.raises(InputError, match="captured at its first batch"):
        autodecouple.compile(nn.Linear(2, 2), 1, devices=["cpu"]).replan()


@pytest.mark.timeout(60)
def test_a_list_of_unlike_objectives_fits_its_own_number_of_stages_only() -> None:
    batch = make_batches("norm", [8])[0]
    with compiled("norm", 3, [SMALL, EarlyExit(hidden=4)], executor="inline") as decoupled:
        decoupled.train_step(*batch)
        with pytest.raises(InputError, match="another list of objectives"):
            decoupled.replan(4)
        with observed(slow(0)):
            assert [stage.objective for stage in decoupled.replan().stages] == ["supcon", "early_exit", "criterion"]


@pytest.mark.timeout(60)
def test_a_detached_classifier_stays_with_its_stage() -> None:
    batch = make_batches("norm", [8])[0]
    with compiled("norm", 3, SMALL, detach_classifier=True, lanes=3, executor="inline") as decoupled:
        decoupled.train_step(*batch)
        for _ in range(2):
            with observed(slow(0, 4)):
                plan = decoupled.replan()
            assert len(plan.stages) == 4 and plan.stages[3].lane == plan.stages[2].lane
            decoupled.train_step(*batch)


@pytest.mark.timeout(60)
def test_lanes_keep_their_speeds() -> None:
    batch = make_batches("norm", [8])[0]
    devices = [Device("cpu", speed=0.5), Device("cpu"), Device("cpu")]
    with compiled("norm", 3, SMALL, devices=devices, executor="inline") as decoupled:
        decoupled.train_step(*batch)
        with observed(slow(1)):
            plan = decoupled.replan()
        assert [stage.speed for stage in plan.stages] == [0.5, 1.0, 1.0]
