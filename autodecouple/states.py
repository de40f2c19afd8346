"""Everything that training goes on from, as one dict: collected, checked, restored, and kept in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autodecouple.errors import CheckpointError, PlanError
from autodecouple.executors import EXECUTORS
from autodecouple.executors.executor import Programs
from autodecouple.passes.codegen import rehome
from autodecouple.passes.inference import emit_inference
from autodecouple.pipeline import Pipeline, threads_per_lane
from autodecouple.plans import Plan
from autodecouple.stage import Stage
from autodecouple.stage_state import kind_of, restore_stage, stage_state

FORMAT = 1


def collect(pipeline: Pipeline, step: int) -> dict[str, Any]:
    """The state after `step` batches; the model's weights are under the user's own names."""
    return {
        "format": FORMAT,
        "model": pipeline.graph.model.state_dict(),
        "heads": {str(s.index): s.code.head.state_dict() for s in pipeline.stages if s.code.head is not None},
        "stages": [stage_state(stage) for stage in pipeline.stages],
        "step": step,
        "seed": pipeline.options.seed,
        "random": {"cpu": torch.get_rng_state(), "cuda": _cuda_states()},
        "plan": pipeline.plan.to_json(),
    }


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def restore(pipeline: Pipeline, state: Mapping[str, Any]) -> int:
    """Put a state back; returns the number of the next batch. Raises CheckpointError before anything changes."""
    _check(pipeline, state)
    pipeline.graph.model.load_state_dict(state["model"])
    for stage, saved in zip(pipeline.stages, state["stages"], strict=True):
        if stage.code.head is not None:
            stage.code.head.load_state_dict(state["heads"][str(stage.index)])
        restore_stage(stage, saved)
    pipeline.executor.scatter()
    torch.set_rng_state(state["random"]["cpu"].cpu())
    if torch.cuda.is_available() and len(state["random"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    return int(state["step"])


def _check(pipeline: Pipeline, state: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise CheckpointError("not a state of this version: pass what state_dict() returned")
    try:
        _check_fit(pipeline, state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the state is not whole: {type(error).__name__}: {error}") from error


def _check_fit(pipeline: Pipeline, state: Mapping[str, Any]) -> None:
    try:
        saved = Plan.from_json(state["plan"])
    except PlanError as error:
        raise CheckpointError(f"the state's plan cannot be read: {error}") from error
    if (mine := _cuts(pipeline.plan)) != (theirs := _cuts(saved)):
        raise CheckpointError(
            f"the state was saved with cuts after {theirs}, but this pipeline has {mine}: compile with"
            ' plan=Plan.from_json(state["plan"])'
        )
    if state["seed"] != pipeline.options.seed:
        raise CheckpointError(
            f"the state was saved with seed={state['seed']}, not {pipeline.options.seed}: pass that one"
        )
    _check_tensors("the model", pipeline.graph.model.state_dict(), state["model"])
    for stage, saved_stage in zip(pipeline.stages, state["stages"], strict=True):
        if stage.code.head is not None:
            _check_tensors(f"head {stage.index}", stage.code.head.state_dict(), state["heads"][str(stage.index)])
        for what, part in (("scheduler", stage.scheduler), ("optimizer", stage.optimizer)):
            if kind_of(part) != (kind := saved_stage["kinds"][what]):
                raise CheckpointError(
                    f"stage {stage.index} was saved with {what} {kind}, but has {kind_of(part)}: pass the same {what}="
                )
        if stage.optimizer is not None:
            _check_optimizer(stage, saved_stage["optimizer"])
        _check_gradients(stage, saved_stage)
    if not isinstance(state["step"], int) or not isinstance(state["random"]["cpu"], torch.Tensor):
        raise CheckpointError("the state is not whole: it lacks the step or the random state")


def _check_gradients(stage: Stage, saved: Mapping[str, Any]) -> None:
    """Of an accumulation under way: one gradient, or None, per parameter."""
    gradients = saved["gradients"] or [None] * len(stage.parameters)
    pairs = list(zip(stage.parameters, gradients, strict=False))
    fits = len(pairs) == len(gradients) == len(stage.parameters)
    fits = fits and all(gradient is None or gradient.shape == parameter.shape for parameter, gradient in pairs)
    if not fits or not isinstance(saved["pending"], int) or not isinstance(saved["skipped"], int):
        raise CheckpointError(f"the state's accumulation does not fit stage {stage.index}")


def _check_tensors(what: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Same names and shapes, or an error that shows the difference."""
    missing, extra = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
    shapes = [k for k in mine if k in theirs and getattr(mine[k], "shape", None) != getattr(theirs[k], "shape", None)]
    if missing or extra or shapes:
        parts = [f"{word} {', '.join(keys[:8])}" for word, keys in
                 (("lacks", missing), ("has besides", extra), ("has other shapes for", shapes)) if keys]  # fmt: skip
        raise CheckpointError(f"the state does not fit {what}: it {'; it '.join(parts)}")


def _check_optimizer(stage: Stage, saved: Mapping[str, Any] | None) -> None:
    assert stage.optimizer is not None
    mine = [len(group["params"]) for group in stage.optimizer.param_groups]
    theirs = [len(group["params"]) for group in saved["param_groups"]] if saved is not None else []
    if mine != theirs:
        raise CheckpointError(
            f"the optimizer of stage {stage.index} has {mine} parameters per group, the saved one {theirs}: pass the"
            " same optimizer= and loss= as when it was saved"
        )


def _cuts(plan: Plan) -> list[str]:
    return [f"{cut.after}{'' if cut.detached else ' (coupled)'}" for cut in plan.cuts]


def save(state: dict[str, Any], path: Path) -> None:
    """Write beside the target and rename: a crash leaves the old file whole."""
    check_folder(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def check_folder(path: Path) -> None:
    """Raises CheckpointError where the folder of a file is not there."""
    if not path.parent.is_dir():
        raise CheckpointError(f"the folder {path.parent} is not there: make it before saving {path.name}")


def load(path: Path) -> dict[str, Any]:
    try:
        _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is not a whole state file: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state")
    return state


def _check_sums(path: Path) -> None:
    """torch.load reads the values without looking at their checksums."""
    with zipfile.ZipFile(path) as file:
        if (damaged := file.testzip()) is not None:
            raise ValueError(f"{damaged} is damaged")


def move(pipeline: Pipeline, device: str) -> Pipeline:
    """The pipeline with all stages on one device, on as many lanes as before."""
    pipeline.executor.close()
    for stage in pipeline.stages:
        stage.place(torch.device(device))
    _move_rest(pipeline.graph.model, device)
    for code in pipeline.codes:
        rehome(code, torch.device(device))
    specs = tuple(dataclasses.replace(spec, device=device) for spec in pipeline.plan.stages)
    plan = dataclasses.replace(pipeline.plan, stages=specs)
    for stage in pipeline.stages:
        stage.plan = plan
    programs = Programs(plan, pipeline.options.schedule, pipeline.graph.smallest_batch)
    inference = emit_inference(pipeline.graph, plan)
    threads = threads_per_lane(programs.full)
    executor = EXECUTORS[pipeline.options.executor](pipeline.stages, programs.full, threads)
    return dataclasses.replace(pipeline, plan=plan, programs=programs, executor=executor, inference=inference)


def _move_rest(model: nn.Module, device: str) -> None:
    """Parameters and buffers that no stage uses."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(device)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; buffers that the forward assigns anew get their value and stay the same objects."""
    flags = {module: module.training for module in model.modules()}
    buffers = [(module, name, value) for module in flags for name, value in module._buffers.items()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
        for module, name, value in buffers:
            assigned = module._buffers.get(name)
            if isinstance(value, torch.Tensor) and isinstance(assigned, torch.Tensor) and assigned is not value:
                with torch.no_grad():
                    module._buffers[name] = value.copy_(assigned) if value.shape == assigned.shape else assigned
