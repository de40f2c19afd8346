"""The whole decision as data: names and numbers, no torch objects, JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autodecouple.errors import PlanError

FORMAT = 2
"""Version of the JSON layout; raised when a field changes its meaning."""

_BYTES = {"float64": 8, "int64": 8, "complex64": 8, "complex128": 16, "float32": 4, "int32": 4,
          "float16": 2, "bfloat16": 2, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "int": 8, "float": 8}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """A value that enters, crosses or leaves: name, shape at the example batch, dtype.

    `batch_dim` is the dimension that grows with the batch, None where none does. A plain number that travels
    (a sequence length) has dtype "int" or "float" and shape (). `num_classes` is set for class indices only.
    `free_dims` are further dimensions of an input that may differ from batch to batch.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    batch_dim: int | None = 0
    num_classes: int | None = None
    free_dims: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _BYTES.get(self.dtype, 1)

    def __str__(self) -> str:
        marks: dict[int | None, str] = {self.batch_dim: "N", **dict.fromkeys(self.free_dims, "*")}
        dims = [marks.get(i, str(size)) for i, size in enumerate(self.shape)]
        return f"{self.name} ({', '.join(dims)}) {self.dtype}"


@dataclass(frozen=True)
class Cut:
    """Where two stages meet.

    after:      the last node before the cut
    crossing:   every value that travels to the next stage
    carrying:   those of them that carry a gradient, the one that most of the stage leads to first
    features:   those of `carrying` that the head reads: together they see every parameter of the stage
    mask:       the value that says which tokens of the first features count, where there is one; `mask_meaning` says
                how: "keep" or "ignore" them where True, or "additive" (0 where they count, negative elsewhere)
    copied:     those cloned at the cut, since something later writes into their memory
    module:     the module that ends here ("layer2.1"), "" inside one
    detached:   no gradient crosses; False couples the two stages as in backpropagation
    overlaps:   but for one: the gradient of the next stage's own loss comes back, and goes no further
    encodes:    the head passes on a signal of its own, so the loss of the next stage that encodes waits for it
    recomputed: values that later stages use as well and compute again, of what crosses and what the model owns
    input:      the model's input that the head compares with, None for most; it crosses the cuts before this one
    sides:      further values of what crosses that the head reads, where it is made of the model's own blocks
    """

    after: str
    crossing: tuple[TensorSpec, ...]
    carrying: tuple[str, ...]
    features: tuple[str, ...]
    mask: str | None = None
    mask_meaning: str = "keep"
    copied: tuple[str, ...] = ()
    module: str = ""
    detached: bool = True
    encodes: bool = False
    recomputed: tuple[str, ...] = ()
    input: str | None = None
    sides: tuple[str, ...] = ()
    overlaps: bool = False

    @property
    def num_bytes(self) -> int:
        return sum([spec.num_bytes for spec in self.crossing])

    @property
    def tie(self) -> str:
        """What it does to the stages beside it: "detached", "coupled" or "overlapping"."""
        return "overlapping" if self.overlaps else "detached" if self.detached else "coupled"

    @property
    def attached(self) -> bool:
        """Whether the next stage sends a gradient back."""
        return self.tie != "detached"

    def spec(self, name: str) -> TensorSpec:
        for spec in self.crossing:  # asked for every cut there is: a generator takes twice as long
            if spec.name == name:
                return spec
        raise KeyError(name)


@dataclass(frozen=True)
class StageSpec:
    """One stage: its nodes, what a training step of the example batch costs, where it runs."""

    index: int
    nodes: tuple[str, ...]
    objective: str
    """Name of the objective on its end: "criterion" for the last stage, "bp" before a coupled cut."""
    forward_flops: int = 0
    backward_flops: int = 0
    head_flops: int = 0
    """Forward and backward of the head."""
    num_parameters: int = 0
    parameter_bytes: int = 0
    """Of the parameters that are trained here."""
    frozen_bytes: int = 0
    """Of buffers and parameters that are not trained; a buffer that the forward writes counts twice, for its backup."""
    head_parameter_bytes: int = 0
    activation_bytes: int = 0
    """What the stage is sent, and what its forward leaves for its backward and for the next stage."""
    optimizer_bytes: int = 0
    step_bytes: int = 0
    """Most that a step takes beside all these weights and states, at any moment: activations, gradients of weights and
    values, and what operations need while they run. Forward, head, backward and update are each followed; in the
    backward the weights' gradients come while activations go, so that it is less than their sum."""
    costliest_node: str = ""
    costliest_flops: int = 0
    lane: int = 0
    device: str = "cpu"
    modules: tuple[str, ...] = ()
    """The modules whose forward runs here, in order and none within another; empty where unknown."""
    speed: float = 1.0
    """Of its lane, relative to the others."""
    returning: float = 0.0
    """Beside a cut that overlaps: the share of the backward that gives what was sent here its gradient, for which the
    stage before waits; the rest is of the weights."""
    forward_seconds: float | None = None
    """As timed on its device, None where nothing was; so are the next two, and all or none of a plan."""
    backward_seconds: float | None = None
    head_seconds: float | None = None
    """Forward and backward of the head; of the criterion on the last stage."""
    update_seconds: float = 0.0
    """Of the optimizer, where a run has shown it."""
    versions: int = 1
    """Batches that are under way here at once, where the schedule lets stages train on older weights: each keeps its
    activations and, if they are several, a copy of the weights that it went forward with."""

    @property
    def flops(self) -> int:
        """Training FLOPs of one step: forward, backward and head."""
        return self.forward_flops + self.backward_flops + self.head_flops

    @property
    def seconds(self) -> float | None:
        """Measured seconds of one training step, None where it was not timed."""
        parts = (self.forward_seconds, self.backward_seconds, self.head_seconds)
        timed = [part for part in parts if part is not None]
        return math.fsum((*timed, self.update_seconds)) if len(timed) == len(parts) else None

    @property
    def memory_bytes(self) -> int:
        """Peak of a training step on this stage: weights, optimizer state and what the step takes, head included.

        The optimizer counts as Adam, updating one parameter at a time; a kernel's own workspace does not count.
        """
        weights = self.parameter_bytes + self.frozen_bytes + self.head_parameter_bytes
        return weights + self.optimizer_bytes + self.step_bytes + self.stashed_bytes

    @property
    def stashed_bytes(self) -> int:
        """Of older weights, and of the activations of further batches under way."""
        others = self.versions - 1
        return (self.versions * self.parameter_bytes if others else 0) + others * self.activation_bytes


@dataclass(frozen=True)
class Link:
    """What lies between two neighbouring lanes, as measured: a transfer takes latency + bytes / bytes_per_second."""

    bytes_per_second: float
    latency_seconds: float = 0.0

    def seconds(self, num_bytes: float) -> float:
        return self.latency_seconds + num_bytes / self.bytes_per_second


@dataclass(frozen=True)
class Plan:
    """Stages in order and the cuts between them; a pure value that prints as a table and draws in a notebook.

    links:     from each lane to the next, where they were measured
    recompute: every stage keeps what it was sent and gives, and runs its forward again as a part of its backward
    """

    stages: tuple[StageSpec, ...]
    cuts: tuple[Cut, ...] = ()
    model: str = ""
    inputs: tuple[TensorSpec, ...] = ()
    warnings: tuple[str, ...] = field(default=(), compare=False)
    links: tuple[Link, ...] = ()
    recompute: bool = False

    def __post_init__(self) -> None:
        if len(self.cuts) != len(self.stages) - 1:
            raise PlanError(
                f"{len(self.stages)} stages need {len(self.stages) - 1} cuts, but the plan has {len(self.cuts)}"
            )
        if len({stage.seconds is None for stage in self.stages}) > 1:
            raise PlanError("some stages of the plan have seconds and others have none: give them to all, or to none")

    @property
    def is_timed(self) -> bool:
        """Whether every stage was timed: seconds then count instead of FLOPs."""
        return all(stage.seconds is not None for stage in self.stages)

    @property
    def costs(self) -> tuple[float, ...]:
        """What a training step of each stage takes: seconds where they were timed, else FLOPs over relative speed."""
        if self.is_timed:
            return tuple(stage.seconds or 0.0 for stage in self.stages)
        return tuple(stage.flops / stage.speed for stage in self.stages)

    @property
    def balance(self) -> float:
        """Mean stage cost / slowest stage cost: 1.0 is perfect."""
        slowest = max(self.costs)
        return sum(self.costs) / slowest / len(self.stages) if slowest > 0 else 1 / len(self.stages)

    @property
    def speedup(self) -> float:
        """Total cost / slowest stage cost, waits included: what streaming over one lane per stage reaches."""
        from autodecouple.waits import periods  # which knows plans, not the other way round

        slowest = max(periods(self))
        return sum(self.costs) / slowest if slowest > 0 else 1.0

    @property
    def lanes(self) -> tuple[tuple[int, ...], ...]:
        """Stage indices per lane, in the lanes' order."""
        count = max(stage.lane for stage in self.stages) + 1
        return tuple(tuple(s.index for s in self.stages if s.lane == lane) for lane in range(count))

    @property
    def staleness(self) -> tuple[int, ...]:
        """By stage, how many of its own updates the weights lack on which a batch is trained: mostly none."""
        return tuple(stage.versions - 1 for stage in self.stages)

    @property
    def bottleneck(self) -> StageSpec:
        """The slowest stage."""
        return self.stages[self.costs.index(max(self.costs))]

    def coupled_after(self, stage: int) -> bool:
        """Whether the gradient of the next stage comes back into this one."""
        return stage < len(self.cuts) and not self.cuts[stage].detached

    def overlaps_after(self, stage: int) -> bool:
        """Whether the next stage's own loss trains this one, too, whose weights so wait for it."""
        return stage < len(self.cuts) and self.cuts[stage].overlaps

    def splits_backward(self, stage: int) -> bool:
        """Whether a stage first gives back a gradient, and later trains its weights: beside a cut that overlaps."""
        return self.overlaps_after(stage) or (stage > 0 and self.cuts[stage - 1].overlaps)

    def signal_source(self, stage: int) -> int | None:
        """The stage whose head encodes the signal that this stage's loss compares with, None for the target.

        Encodings are for heads that encode, too: all others, and the criterion, compare with the target itself.
        """
        if stage >= len(self.cuts) or not self.cuts[stage].encodes:
            return None
        return max((index for index, cut in enumerate(self.cuts[:stage]) if cut.encodes), default=None)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=indent)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what `to_json` wrote, edited by hand or not; raises PlanError naming what is wrong."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"not JSON: {error}") from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise PlanError(f'not a plan of this version: expected an object with "format": {FORMAT}')
        data["stages"] = tuple(_build(StageSpec, s, f"stages[{i}]") for i, s in enumerate(data.get("stages", ())))
        data["cuts"] = tuple(_build(Cut, c, f"cuts[{i}]") for i, c in enumerate(data.get("cuts", ())))
        data["inputs"] = tuple(_build(TensorSpec, t, f"inputs[{i}]") for i, t in enumerate(data.get("inputs", ())))
        data["links"] = tuple(_build(Link, t, f"links[{i}]") for i, t in enumerate(data.get("links", ())))
        plan = _build(Plan, data, "plan")
        assert isinstance(plan, Plan)
        return plan

    def __str__(self) -> str:
        from autodecouple.view import text  # the view knows plans, not the other way round

        return text.plan_table(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from autodecouple.view import html

        return html.mimebundle(self)


def _build(kind: type[Any], data: Any, where: str) -> Any:
    """A frozen dataclass from its JSON form: lists become tuples, nested specs are built, keys are checked."""
    if not isinstance(data, Mapping):
        raise PlanError(f"{where}: expected an object, found {data!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(data) - set(fields)):
        raise PlanError(f"{where}: unknown key {unknown[0]!r}; a {kind.__name__} has {', '.join(fields)}")
    required = [f.name for f in fields.values() if _is_required(f)]
    if missing := [name for name in required if name not in data]:
        raise PlanError(f"{where}: key {missing[0]!r} is missing")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    if kind is Cut:
        crossing = values["crossing"]
        values["crossing"] = tuple(_build(TensorSpec, c, f"{where}.crossing[{i}]") for i, c in enumerate(crossing))
    return kind(**values)


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
