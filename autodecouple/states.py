"""Everything that training goes on from, as one dict by names: collected, checked and put back, under any cuts."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autodecouple import optimizers
from autodecouple.errors import CheckpointError, PlanError
from autodecouple.executors import EXECUTORS
from autodecouple.executors.executor import Programs
from autodecouple.optimizers import Saved
from autodecouple.passes.codegen import rehome
from autodecouple.passes.inference import emit_inference
from autodecouple.pipeline import Pipeline, threads_per_lane
from autodecouple.plans import Plan
from autodecouple.stage import Stage

FORMAT = 2
LAST = "output"
"""Where the last stage's head lies, the criterion: the name of an fx graph's output, which no other node has."""


class OtherCutsWarning(UserWarning):
    """Some heads could not come back, since the cuts are others."""


def collect(pipeline: Pipeline, step: int) -> dict[str, Any]:
    """The state after `step` batches, by names that do not depend on the cuts.

    model: under the user's own names; heads: by the node at their cut; optim, and gradients of an accumulation under
    way: by the parameter's key; stages: the rest of what each stage holds
    """
    stages, keys = pipeline.stages, parameter_keys(pipeline)
    waiting = [p for stage in stages if stage.pending for p in stage.parameters if p.grad is not None]
    return {
        "format": FORMAT,
        "model": pipeline.graph.model.state_dict(),
        "heads": {place: head.state_dict() for place, head in _heads(pipeline).items()},
        "optim": {key: entry for stage in stages for key, entry in optimizers.memories(stage, keys).items()},
        "gradients": {keys[id(parameter)]: parameter.grad for parameter in waiting},
        "stages": [optimizers.progress(stage, keys) for stage in stages],
        "step": step,
        "seed": pipeline.options.seed,
        "random": {"cpu": torch.get_rng_state(), "cuda": _cuda_states()},
        "plan": pipeline.plan.to_json(),
    }


def parameter_keys(pipeline: Pipeline) -> dict[int, str]:
    """`model.<name>` or `heads.<node at the cut>.<name>` of each parameter, by its id; the first of several names."""
    named = [(f"model.{name}", parameter) for name, parameter in pipeline.graph.model.named_parameters()]
    for place, head in _heads(pipeline).items():
        named += [(f"heads.{place}.{name}", parameter) for name, parameter in head.named_parameters()]
    keys: dict[int, str] = {}
    for key, parameter in named:
        keys.setdefault(id(parameter), key)
    return keys


def _heads(pipeline: Pipeline) -> dict[str, nn.Module]:
    """By the node that they read; a coupled cut has none."""
    places = [*(cut.after for cut in pipeline.plan.cuts), LAST]
    return {place: code.head for place, code in zip(places, pipeline.codes, strict=True) if code.head is not None}


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def restore(pipeline: Pipeline, state: Mapping[str, Any]) -> int:
    """Put a state back; returns the number of the next batch. Raises CheckpointError before anything changes.

    A state of other cuts gives the model, its optimizer state and the heads at cuts that both have. Other heads stay as
    they are, and a warning names them.
    """
    kept = _check(pipeline, state)
    keys, saved = parameter_keys(pipeline), _saved(state, kept)
    pipeline.graph.model.load_state_dict(state["model"])
    _renew_copies(pipeline)
    for place, head in _heads(pipeline).items():
        if place in kept:
            head.load_state_dict(state["heads"][place])
    for stage in pipeline.stages:
        optimizers.put_back(stage, keys, saved)
        for parameter in stage.parameters:
            key = keys[id(parameter)]
            gradient = state["gradients"].get(key) if key in saved.homes else None
            parameter.grad = None if gradient is None else gradient.clone().to(parameter.device)
    pipeline.executor.scatter()
    torch.set_rng_state(state["random"]["cpu"].cpu())
    if torch.cuda.is_available() and len(state["random"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    _warn_of_others(pipeline, state, kept)
    return int(state["step"])


def _renew_copies(pipeline: Pipeline) -> None:
    """What nothing writes, a frozen weight or a table, is read on another device than its home from a copy."""
    model = pipeline.graph.model
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for code in pipeline.codes:
        for name, tensor in code.body.named_buffers():
            if name in own and own[name] is not tensor:
                tensor.copy_(own[name].detach())


def _saved(state: Mapping[str, Any], kept: Collection[str]) -> Saved:
    """Of the model's parameters and the kept heads'."""
    return Saved.of(state, lambda key: key.startswith("model.") or key.split(".")[1] in kept)


def _warn_of_others(pipeline: Pipeline, state: Mapping[str, Any], kept: Collection[str]) -> None:
    new = [place for place in _heads(pipeline) if place not in kept]
    dropped = [place for place in state["heads"] if place not in kept]
    if new or dropped:
        parts = [f"the heads after {', '.join(new)} stay as compiled" if new else ""]
        parts += [f"those saved after {', '.join(dropped)} are left out" if dropped else ""]
        said = ", and ".join(filter(None, parts))
        warnings.warn(f"the state was saved with other cuts: {said}", OtherCutsWarning, stacklevel=4)


# ---------------------------------------------------------------- whether a state fits


def _check(pipeline: Pipeline, state: Mapping[str, Any]) -> frozenset[str]:
    """Look at all of it; returns the places of the heads that come back."""
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise CheckpointError("not a state of this version: pass what state_dict() returned")
    try:
        return _check_fit(pipeline, state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the state is not whole: {type(error).__name__}: {error}") from error


def _check_fit(pipeline: Pipeline, state: Mapping[str, Any]) -> frozenset[str]:
    try:
        theirs = Plan.from_json(state["plan"])
    except PlanError as error:
        raise CheckpointError(f"the state's plan cannot be read: {error}") from error
    if state["seed"] != pipeline.options.seed:
        raise CheckpointError(
            f"the state was saved with seed={state['seed']}, not {pipeline.options.seed}: pass that one"
        )
    _check_tensors("the model", pipeline.graph.model.state_dict(), state["model"])
    if [cut.after for cut in pipeline.plan.cuts] == [cut.after for cut in theirs.cuts]:
        _check_objectives(pipeline.plan, theirs)
    kept = _common(pipeline.plan, theirs)
    for place, head in _heads(pipeline).items():
        if place in kept:
            _check_tensors(f"the head after {place}", head.state_dict(), state["heads"][place])
    _check_optimizers(pipeline, state, kept)
    complete = len(state["stages"]) == len(theirs.stages) and isinstance(state["step"], int)
    if not complete or not isinstance(state["random"]["cpu"], torch.Tensor):
        raise CheckpointError("the state is not whole: it lacks a stage, the step or the random state")
    return kept


def _common(mine: Plan, theirs: Plan) -> frozenset[str]:
    """Places whose heads are the same: they lie at the same node, read the same values and have the same objective."""
    return frozenset(place[0] for place in _places(mine) & _places(theirs)) | {LAST}


def _check_objectives(mine: Plan, theirs: Plan) -> None:
    """At the same cuts another loss is most likely a mistake; at other cuts the list of losses meets others."""
    for here, there in zip(mine.stages, theirs.stages, strict=True):
        if here.objective != there.objective:
            raise CheckpointError(
                f"stage {here.index} was saved with loss {there.objective!r}, but has {here.objective!r}: pass the same"
                " loss="
            )


def _places(plan: Plan) -> set[tuple[str, tuple[str | None, ...], str, bool]]:
    """The last says whether the head is given an encoding: such heads have other shapes than the first."""
    return {
        (cut.after, (*cut.features, *cut.sides, cut.input), stage.objective, plan.signal_source(index) is not None)
        for index, (cut, stage) in enumerate(zip(plan.cuts, plan.stages, strict=False))
        if cut.detached
    }


def _check_optimizers(pipeline: Pipeline, state: Mapping[str, Any], kept: frozenset[str]) -> None:
    keys, saved = parameter_keys(pipeline), _saved(state, kept)
    for stage in pipeline.stages:
        optimizers.check(stage, keys, saved)
    trained = [parameter for stage in pipeline.stages for parameter in _grouped(stage)]
    mine = {keys[id(parameter)]: parameter for parameter in trained}
    known = {key: p for key, p in mine.items() if key.startswith("model.") or key.split(".")[1] in kept}
    _check_tensors("the trained parameters", known, {key: known.get(key) for key in saved.homes})
    gradients = {key: value for key, value in state["gradients"].items() if key in saved.homes}
    _check_tensors("the gradients", {key: mine[key] for key in gradients}, gradients)
    if not all(isinstance(stage[count], int) for stage in saved.stages for count in ("pending", "skipped")):
        raise CheckpointError("the state is not whole: it lacks how many batches wait for their update")


def _grouped(stage: Stage) -> list[nn.Parameter]:
    """What the stage's optimizer trains: all of its parameters, unless the user's function left some out."""
    groups = stage.optimizer.param_groups if stage.optimizer is not None else []
    return [parameter for group in groups for parameter in group["params"]]


def _check_tensors(what: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Same names, shapes and types, or an error that shows the difference."""
    missing, extra = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
    common = [key for key in mine if key in theirs]
    shapes, types = ([k for k in common if getattr(mine[k], part, None) != getattr(theirs[k], part, None)]
                     for part in ("shape", "dtype"))  # fmt: skip
    if missing or extra or shapes or types:
        kinds = (
            ("lacks", missing),
            ("has besides", extra),
            ("has other shapes for", shapes),
            ("has other types for", types),
        )
        parts = [f"{word} {_listed(keys)}" for word, keys in kinds if keys]
        raise CheckpointError(
            f"the state does not fit {what}: it {'; it '.join(parts)}. To begin with the saved weights alone, load them"
            " into the model before compile()"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


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
