"""Hypothesis strategies of plans by hand, and of costs in whole seconds (so that sums are exact)."""

from __future__ import annotations

from hypothesis import strategies as st

from autodecouple.cost import TableCost
from autodecouple.plans import Cut, Plan, StageSpec, TensorSpec
from autodecouple.schedules.actions import Op


def make_plan(
    lanes: list[int] | tuple[int, ...],
    detached: list[bool] | tuple[bool, ...] | bool = True,
    encodes: list[bool] | tuple[bool, ...] | bool = False,
    flops: list[tuple[int, int, int]] | None = None,
    overlaps: list[bool] | tuple[bool, ...] | bool = False,
    returning: float = 0.0,
) -> Plan:
    """A plan with a stage per entry of `lanes`; `flops` are (forward, head, backward) per stage.

    returning: of the backwards of stages beside cuts that overlap
    """
    num_cuts = len(lanes) - 1
    detached = [detached] * num_cuts if isinstance(detached, bool) else list(detached)
    encodes = [encodes] * num_cuts if isinstance(encodes, bool) else list(encodes)
    overlaps = [overlaps] * num_cuts if isinstance(overlaps, bool) else list(overlaps)
    beside = [any(overlaps[max(0, i - 1) : i + 1]) for i in range(len(lanes))]
    flops = flops or [(1, 1, 2)] * len(lanes)
    stages = tuple(
        StageSpec(
            index=i,
            nodes=(f"node{i}",),
            objective="criterion" if i == num_cuts else "supcon" if detached[i] else "bp",
            forward_flops=forward,
            head_flops=head,
            backward_flops=backward,
            lane=lane,
            returning=returning if beside[i] else 0.0,
        )
        for i, (lane, (forward, head, backward)) in enumerate(zip(lanes, flops, strict=True))
    )
    cuts = tuple(
        Cut(
            f"node{i}",
            (TensorSpec(f"h{i}", (2, 8), "float32"),),
            (f"h{i}",),
            (f"h{i}",),
            detached=detached[i],
            encodes=encodes[i],
            overlaps=overlaps[i],
        )
        for i in range(num_cuts)
    )
    return Plan(stages, cuts)


@st.composite
def plans(draw: st.DrawFn, detached: bool | None = None, max_stages: int = 6, one_stage_per_lane: bool = False) -> Plan:
    """Plans of 1 to `max_stages` stages on contiguous lanes; cuts all detached, all coupled, or (None) mixed, some of
    which overlap."""
    count = draw(st.integers(1, max_stages))
    kinds = [draw(st.booleans()) if detached is None else detached for _ in range(count - 1)]
    overlaps = [detached is None and kind and draw(st.booleans()) for kind in kinds]
    signals = [kind and draw(st.booleans()) for kind in kinds]  # a coupled cut has no head, so no signal of its own
    lanes = [0]
    for _ in range(count - 1):
        lanes.append(lanes[-1] + (1 if one_stage_per_lane else draw(st.integers(0, 1))))
    flops = [draw(st.tuples(*[st.integers(0, 9)] * 3)) for _ in range(count)]
    return make_plan(lanes, kinds, signals, flops, overlaps, draw(st.sampled_from([0.0, 0.25, 0.5])))


@st.composite
def costs(draw: st.DrawFn, plan: Plan, transfers: bool = True) -> TableCost:
    """Whole seconds per action, zero among them, and per cut."""
    seconds = st.integers(0, 9).map(float)
    table = {(stage, op): draw(seconds) for stage in range(len(plan.stages)) for op in Op}
    return TableCost(table, tuple(draw(seconds) for _ in plan.cuts) if transfers else ())
