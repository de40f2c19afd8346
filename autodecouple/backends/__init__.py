"""What runs a stage's work: eager code, compiled code, or CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autodecouple.backends.backend import EAGER, Backend, resolve_backend
from autodecouple.passes.codegen import StageCode
from autodecouple.plans import Plan
from autodecouple.stage import Stage, Training
from autodecouple.stashing import StashingStage


def make_stages(
    backend: Backend,
    codes: Sequence[StageCode],
    plan: Plan,
    training: Training,
    batch_dims: Mapping[str, int | None],
) -> tuple[Stage, ...]:
    """The stages of a plan, at work; torch's compiler is loaded where it is asked for only."""
    given = [(index, code, plan, training, batch_dims) for index, code in enumerate(codes)]
    if backend.name == "compile":
        from autodecouple.backends.compiled import CompiledStage

        return tuple(CompiledStage(*each, options=backend.options) for each in given)
    if backend.name == "cuda_graphs":
        from autodecouple.backends.graphed import GraphedStage, Notices
        from autodecouple.backends.recorder import Recorders

        recorders, notices = Recorders(), Notices()
        return tuple(GraphedStage(*each, recorders=recorders, notices=notices) for each in given)
    kinds = [Stage if spec.versions == 1 else StashingStage for spec in plan.stages]
    return tuple(kind(*each) for kind, each in zip(kinds, given, strict=True))


__all__ = ["EAGER", "Backend", "make_stages", "resolve_backend"]
