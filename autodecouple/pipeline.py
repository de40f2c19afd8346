"""From a model and options to stages at work: the compiler, as a list of passes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from autodecouple.backends import make_stages
from autodecouple.devices import Device
from autodecouple.errors import InputError, PlanError
from autodecouple.executors import EXECUTORS, Executor
from autodecouple.executors.executor import Programs
from autodecouple.executors.job import Job
from autodecouple.graph import Graph
from autodecouple.objectives.criterion import Criterion
from autodecouple.objectives.gather import gathered_head
from autodecouple.objectives.objective import Objective, at_cut, read_at, signal_of, tie_of
from autodecouple.options import Capturing, Options, Wish
from autodecouple.passes import verify
from autodecouple.passes.candidates import Candidate, find_cuts, keep_whole
from autodecouple.passes.capturing.bind import bind
from autodecouple.passes.capturing.tied import Untied, untie
from autodecouple.passes.carry import carry_inputs, reserve, written_inputs
from autodecouple.passes.charge import (
    charge_flops,
    charge_nanoseconds,
    lane_costs,
    per_stage,
    time_links,
    with_seconds,
)
from autodecouple.passes.codegen import StageCode, emit_stages
from autodecouple.passes.downstream.bound import AtCut
from autodecouple.passes.equip import equip
from autodecouple.passes.inference import emit_inference
from autodecouple.passes.insert import drawn_in_kernels, insert_heads
from autodecouple.passes.measure import annotate
from autodecouple.passes.measuring.charges import Charge
from autodecouple.passes.partition import choose_cuts, find_classifier
from autodecouple.passes.place import assign_lanes
from autodecouple.passes.settle import settle
from autodecouple.passes.trace import capture
from autodecouple.plans import Plan, TensorSpec
from autodecouple.randomness import Randomness
from autodecouple.schedules import Program
from autodecouple.signals import check_classes, describe
from autodecouple.stage import Stage


def analyse(
    model: nn.Module | Graph, example_inputs: Any, example_target: Any = None, how: Capturing | None = None
) -> tuple[Graph, tuple[Candidate, ...]]:
    """The captured and measured model, and every place where it might be cut; a Graph is taken as it is."""
    graph = model if isinstance(model, Graph) else prepare(model, example_inputs, how or Capturing())
    graph = with_target(graph, example_target)
    return graph, find_cuts(graph)


def with_target(graph: Graph, example_target: Any) -> Graph:
    return graph if example_target is None else dataclasses.replace(graph, target=describe(example_target))


def prepare(model: nn.Module, example_inputs: Any, how: Capturing) -> Graph:
    """Capture and measure a model; ties that were undone for it are tied again if that fails."""
    if how.tied == "together":
        return annotate(capture(model, example_inputs, mode=how.mode, dynamic=how.dynamic))
    parted = untie(model)
    try:
        return note_untied(prepare(model, example_inputs, dataclasses.replace(how, tied="together")), parted)
    except BaseException:
        parted.tie()
        raise


def note_untied(graph: Graph, parted: Untied) -> Graph:
    """Say in the graph's warnings what was untied for it."""
    modules = [graph.train, *([graph.evaluation] if graph.evaluation is not None else [])]
    read = [node for module in modules for node in module.graph.find_nodes(op="get_attr") if node.users]
    used = {str(node.target) for node in read}
    return dataclasses.replace(graph, warnings=(*graph.warnings, parted.tie_unused(used).note))


def decide(graph: Graph, candidates: tuple[Candidate, ...], wish: Wish, example_inputs: Any = None) -> Plan:
    """The plan: cuts, then lanes, then what the user should know about it.

    example_inputs: where costs are measured the model runs on these; None is random ones of the example's sizes
    """
    wish = equipped(wish, graph, candidates)
    candidates = keep_whole(graph, candidates, wish.no_split) if wish.no_split else candidates
    wish = wish.placed(graph)
    if wish.recompute and any(tie_of(objective) == "overlapping" for objective in wish.objectives):
        raise InputError(
            "recompute=True would run the forward of stages that overlap three times, once for each way back: leave it"
            ' out, or take a loss other than "loco"'
        )
    if wish.cost == "flops":
        plan = arrange(graph, candidates, wish, charge_flops(graph, lanes_of(wish), wish.recompute))
    else:
        example = () if example_inputs is None else bind(graph, example_inputs)
        charges = charge_nanoseconds(graph, candidates, lanes_of(wish), example, wish.recompute, wish.optimizer)
        plan = with_seconds(arrange(graph, candidates, wish, charges), charges, wish.objectives)
        plan = dataclasses.replace(plan, links=time_links(lanes_of(wish)))
    return dataclasses.replace(plan, warnings=(*plan.warnings, *_warnings(graph, plan), *wish.notes))


def equipped(wish: Wish, graph: Graph, candidates: tuple[Candidate, ...], criterion: Any = None) -> Wish:
    """The wish with objectives that know the model, where they need it."""
    objectives, notes = equip(wish.objectives, graph, candidates, wish.n_stages, criterion)
    return dataclasses.replace(wish, objectives=objectives, notes=(*wish.notes, *notes))


def lanes_of(wish: Wish) -> tuple[Device, ...]:
    """The lanes that will have a stage: those of the given plan, or as many as there are stages at most."""
    if wish.plan is None:
        return wish.devices[: wish.n_stages]
    first = [wish.plan.stages[lane[0]] for lane in wish.plan.lanes if lane]
    return tuple(Device(stage.device, stage.speed) for stage in first)


def arrange(graph: Graph, candidates: tuple[Candidate, ...], wish: Wish, charges: Sequence[Charge]) -> Plan:
    """Cuts and lanes at these charges, one per lane; of a given plan they are as they stand there."""
    if wish.plan is not None:
        return _fit(wish.plan, graph, candidates, wish)
    classifier = find_classifier(graph, candidates, wish.detach_classifier) if wish.detach_classifier else ()
    here = per_stage(charges, wish.n_stages, wish.n_stages + bool(classifier))
    plan = choose_cuts(
        graph,
        candidates,
        wish.n_stages,
        wish.objectives,
        cut_at=wish.cut_at,
        memory_limit=wish.memory_limit,
        classifier=classifier,
        charges=reserve(here, wish.objectives),
    )
    plan = carry_inputs(plan, wish.objectives)
    costs = lane_costs(plan, charges, wish.objectives)
    return assign_lanes(plan, wish.devices, glued=(wish.n_stages,) if classifier else (), costs=costs)


def _fit(plan: Plan, graph: Graph, candidates: tuple[Candidate, ...], wish: Wish) -> Plan:
    """A given plan on this graph: its cuts, lanes and devices count, everything else is worked out again."""
    known = {candidate.node for candidate in candidates} | {node.name for node in graph.operations}
    named = [name for stage in plan.stages for name in stage.nodes] + [cut.after for cut in plan.cuts]
    if unknown := [name for name in named if name not in known]:
        raise PlanError(
            f"the plan does not fit {type(graph.model).__name__}: it names a node {unknown[0]!r} that the captured"
            f" model does not have; it was made for {plan.model or 'another model'}. Make a new one with plan()"
        )
    for cut, objective in zip(plan.cuts, wish.objectives, strict=True):
        if cut.tie != tie_of(objective):
            raise PlanError(f"the plan's cut after {cut.after!r} is {cut.tie}, but its loss is {objective.name!r}")
    cuts = [cut.after for cut in plan.cuts]
    charges = (Charge(graph, recompute=wish.recompute),) * len(plan.stages)
    fitted = choose_cuts(graph, candidates, len(plan.stages), wish.objectives, cut_at=cuts, charges=charges)
    lanes = [stage.lane for stage in plan.stages]
    turns = [*range(len(plan.lanes))] * (len(lanes) // len(plan.lanes))
    if lanes != turns and any(b - a not in (0, 1) for a, b in itertools.pairwise([0, *lanes])):
        raise PlanError(
            f"lanes must hold contiguous stages, or the stages in turn, equally many, counted from 0, but are {lanes}"
        )
    kept = _PLACED if [s.nodes for s in plan.stages] != [s.nodes for s in fitted.stages] else (*_PLACED, *_TIMED)
    stages = tuple(
        dataclasses.replace(stage, **{name: getattr(given, name) for name in kept})
        for stage, given in zip(fitted.stages, plan.stages, strict=True)
    )
    return carry_inputs(dataclasses.replace(fitted, stages=stages, links=plan.links), wish.objectives)


_PLACED = ("lane", "device", "speed")
_TIMED = ("forward_seconds", "backward_seconds", "head_seconds", "update_seconds")
"""What a plan with the same stages was given: nothing else tells."""


def _warnings(graph: Graph, plan: Plan) -> list[str]:
    notes = []
    if untrained := verify.untrained_parameters(graph):
        notes.append(f"no stage trains {', '.join(untrained)}: no loss depends on it")
    if drawn := drawn_in_kernels(graph.train.graph):
        names = ", ".join(node.name for node in drawn[:3]) + (f" and {len(drawn) - 3} more" if len(drawn) > 3 else "")
        notes.append(
            f"random numbers drawn inside a kernel or a whole module, by {names}: such"
            " operations take turns, and other threads must not draw from torch's default generator meanwhile"
        )
    if len(plan.lanes) > 1 and plan.balance < 0.5:
        slow = plan.bottleneck
        notes.append(f"stage {slow.index} takes {plan.costs[slow.index] / sum(plan.costs):.0%} of the work")
    return notes


@dataclass(frozen=True)
class Pipeline:
    """Stages at work, and all that led to them."""

    graph: Graph
    candidates: tuple[Candidate, ...]
    plan: Plan
    module: fx.GraphModule
    codes: tuple[StageCode, ...]
    criterion: Criterion
    stages: tuple[Stage, ...]
    programs: Programs
    executor: Executor
    inference: fx.GraphModule | None
    written: frozenset[str]
    options: Options

    def job(self, index: int, inputs: Any, target: Any) -> Job:
        """A batch, checked and ready to run; raises InputError before anything is lost.

        Where another process feeds the batches, inputs and target are not looked at.
        """
        if not self.executor.feeds:
            return Job(index, self.programs.full, self.plan, None, None, 0, self.options.seed)
        leaves = bind(self.graph, inputs)
        names = [node.name for node in self.graph.train.graph.find_nodes(op="placeholder")]
        rows = rows_of(self.graph, leaves)
        if rows < self.programs.smallest:
            raise InputError(
                f"a batch of {rows} row cannot be trained on: BatchNorm needs more than one value per channel. Drop the"
                " last batch (drop_last=True) or choose another batch size"
            )
        self._check_target(target, rows)
        program = self.programs.for_rows(rows)
        values = dict(zip(names, leaves, strict=True))
        return Job(index, program, self.plan, values, target, rows, self.options.seed, self.written)

    def output(self, job: Job) -> Any:
        """The model's output of a finished job, in its own structure; None where another process has it."""
        if not job.has_outputs:
            return None
        leaves = self.graph.outputs
        dims = [self.graph.measures[x.name].value for x in leaves if isinstance(x, fx.Node)]
        return self.criterion.unflatten(job.outputs([spec.batch_dim if spec is not None else None for spec in dims]))

    @functools.cached_property
    def signal(self) -> TensorSpec:
        """What targets must look like: of any classes, where neither a head nor the default criterion counts them."""
        counted = not self.criterion.own or any(getattr(o, "needs_classes", True) for o in self._local)
        return self.graph.signal if counted else dataclasses.replace(self.graph.signal, num_classes=None)

    @property
    def _local(self) -> list[Objective]:
        """The objectives of the detached cuts."""
        return [o for o, cut in zip(self.options.wish.objectives, self.plan.cuts, strict=True) if cut.detached]

    def _check_target(self, target: Any, rows: int) -> None:
        needs_classes = any(
            getattr(objective, "needs_target", True) and not getattr(objective, "takes_any_target", False)
            for objective in self._local
        )
        if needs_classes or not self.criterion.own:
            check_classes(target, rows, self.signal, per_row=self.criterion.own)
        elif isinstance(target, torch.Tensor) and target.ndim and target.shape[0] != rows:
            raise InputError(f"the target has {target.shape[0]} rows, but the batch has {rows}")


def build(model: nn.Module | Graph, example_inputs: Any, example_target: Any, options: Options) -> Pipeline:
    """Run every pass: trace, measure, candidates, partition, place, insert, codegen."""
    graph, candidates = analyse(model, example_inputs, example_target, options.capturing)
    options = dataclasses.replace(options, wish=equipped(options.wish, graph, candidates, options.criterion))
    plan = settle(decide(graph, candidates, options.wish, example_inputs), options.schedule, options.wish)
    verify.plan_fits(graph, plan)
    programs = Programs(plan, options.schedule, graph.smallest_batch)
    program = programs.full  # raises where the schedule does not suit the plan
    objectives = options.wish.placed(graph).objectives
    heads = [_head(graph, plan, index, objectives, options.seed) for index in range(len(plan.cuts))]
    constants = {index: leaf for index, leaf in enumerate(graph.outputs) if not isinstance(leaf, fx.Node)}
    criterion = Criterion(options.criterion, graph.out_spec, constants)
    module = insert_heads(graph, plan, heads, criterion)
    verify.heads_fit(module, graph, plan)
    codes = emit_stages(module, graph, plan)
    verify.stages_fit(codes, plan)
    dims = _batch_dims(graph, codes)
    stages = make_stages(options.backend, codes, plan, options.training, dims)
    inference, written = emit_inference(graph, plan), written_inputs(graph)
    executor = EXECUTORS[options.executor](stages, program, threads_per_lane(program))  # last: it starts workers
    return Pipeline(
        graph, candidates, plan, module, codes, criterion, stages, programs, executor, inference, written, options
    )


def threads_per_lane(program: Program) -> int:
    """CPU lanes share the cores that torch may use."""
    return max(1, torch.get_num_threads() // len(program.lanes))


def _head(graph: Graph, plan: Plan, index: int, objectives: Sequence[Objective], seed: int) -> nn.Module | None:
    """The head at a cut, initialised from a key of its own: it does not depend on the other cuts."""
    cut = plan.cuts[index]
    if not cut.detached:
        return None
    objective, _ = at_cut(objectives[index], cut)
    signal = signal_of(index, objectives, graph.signal)
    with verify.seeded(Randomness(seed).key(cut.after)), torch.device("cpu"):
        if isinstance(objective, AtCut):
            return objective.task_head()
        return gathered_head(objective, read_at(cut), signal)


def _batch_dims(graph: Graph, codes: tuple[StageCode, ...]) -> dict[str, int | None]:
    """The dimension along which micro-batches of each value that a head reads are joined."""
    dims: dict[str, int | None] = {}
    for code in codes:
        for name in code.head_inputs:
            value = graph.measures[code.origin(name)].value
            dims[name] = value.batch_dim if value is not None else None
        if code.mask is not None:
            dims[code.mask] = 0
    return dims


def rows_of(graph: Graph, leaves: list[Any]) -> int:
    """Rows of the batch: those of the first input that has them."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    dynamic = [leaf for spec, leaf in zip(graph.inputs, tensors, strict=True) if spec.batch_dim == 0]
    first = (dynamic or [leaf for leaf in tensors if leaf.ndim])[0]
    return int(first.shape[0])
