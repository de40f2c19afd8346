"""The command line: results on stdout, everything else on stderr; exit 0, 1 (the job failed), 2 (usage), 130 (Ctrl-C).

torch is imported inside commands only, so that `--help` is immediate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autodecouple import targets
from autodecouple._version import __version__
from autodecouple.errors import AutodecoupleError, PlanError
from autodecouple.plans import Plan
from autodecouple.schedules import SCHEDULES, Schedule
from autodecouple.terminal import ErrorGroup, Parsed, busy, options, say, show, write
from autodecouple.timeline import Timeline
from autodecouple.view.summary import summarize, summarize_cuts

if TYPE_CHECKING:
    from types import ModuleType

    from torch import nn


_FILE = click.Path(dir_okay=False, path_type=Path)
_INPUT = Parsed("shape", targets.InputShape.parse)
_INPUT_HELP = "Shape of an input, as 8x3x32x32, 8x128:int64 or input_ids=8x128:int64; repeat for several."
_target = click.argument("target")
_input = click.option("--input", "inputs", type=_INPUT, multiple=True, required=True, help=_INPUT_HELP)
_optional_input = click.option("--input", "inputs", type=_INPUT, multiple=True, help=_INPUT_HELP)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_drawings = options(
    click.option("--svg", type=_FILE, help="Write a figure."),
    click.option("--html", type=_FILE, help="Write a page of one file."),
)
_capturing = options(
    click.option("--mode", type=click.Choice(["train", "eval"]), default="train", show_default=True,
                 help="Capture the model as it trains, or, where only that goes, as it evaluates."),
    click.option("--tied", type=click.Choice(["together", "untie"]), default="together", show_default=True,
                 help="A parameter with several names: one stage for its uses, or a parameter for each name."),
    click.option("--dynamic", multiple=True, type=click.IntRange(1), metavar="DIM",
                 help="A dimension of the inputs, beside the batch, that may change; repeat for several."),
)  # fmt: skip
_wishes = options(
    _capturing,
    click.option("--stages", type=click.IntRange(1), default=4, show_default=True, help="Number of stages."),
    click.option("--loss", default="supcon", show_default=True, help="Objective; or one per hidden stage, a,b,c."),
    click.option("--devices", help="Lanes, as cuda:0,cuda:1 or cpu,cpu; by default all there are."),
    click.option("--cut-at", multiple=True, metavar="NAME", help="Cut after this node or module; repeat for each cut."),
    click.option("--no-split", multiple=True, metavar="NAME", help="Never cut inside this module or class."),
    click.option("--cost", type=click.Choice(["flops", "measured"]), default="flops", show_default=True,
                 help="Balance FLOPs, or seconds: the model then runs on the devices, with its weights."),
    click.option(
        "--max-memory", type=Parsed("bytes", targets.parse_bytes), help="Largest memory of a stage, as 4GiB or 500MB."
    ),
)  # fmt: skip
_schedules = click.option("--schedule", type=click.Choice(list(SCHEDULES)), default="streaming", show_default=True)


@click.group(cls=ErrorGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="autodecouple")
@click.option("-q", "--quiet", is_flag=True, help="No progress, notices or warnings on stderr.")
@click.pass_context
def main(ctx: click.Context, quiet: bool) -> None:
    """Split a torch model into stages that train without waiting for each other.

    TARGET names a model: package.module:factory or path/to/file.py:factory (a module, or what gives one when called
    without arguments), torchvision:resnet18, timm:NAME, or hf:CONFIG (a config.json or a model type such as bert).
    TARGET's code is executed: name only what you trust.
    """
    if quiet:
        ctx.with_resource(warnings.catch_warnings())
        warnings.simplefilter("ignore")


@main.command()
@_target
@_input
@_wishes
@_schedules
@click.option("--check", type=click.FloatRange(0, 1), metavar="MIN", help="Exit 1 if the balance is lower than this.")
@_json
@_drawings
def inspect(
    target: str, check: float | None, as_json: bool, svg: Path | None, html: Path | None, **wishes: Any
) -> None:
    """Show how TARGET would be split: stages, cuts, cost, memory, bottleneck. TARGET's code is executed."""
    plan = _plan(target, **wishes)
    _present(plan, plan.to_json() if as_json else None, svg, html)
    if as_json:
        for warning in plan.warnings:
            say(f"warning: {warning}")
    if check is not None and plan.balance < check:
        slowest = plan.bottleneck.index
        raise PlanError(f"balance {plan.balance:.3f} is below --check {check:g}; the slowest is stage {slowest}")


@main.command()
@_target
@_input
@_capturing
@_json
def cuts(target: str, inputs: tuple[targets.InputShape, ...], as_json: bool, **capturing: Any) -> None:
    """List every legal cut of TARGET and, elsewhere, why there is none. TARGET's code is executed."""
    model, api = _load(target)
    with busy("looking for cuts"), _given(inputs):
        found = api.cuts(model, targets.example_inputs(inputs), **capturing)
    if as_json:
        names = ("node", "module", "reason")
        rows = [
            {name: getattr(place, name) for name in names} | {"cut": place.cut and dataclasses.asdict(place.cut)}
            for place in found
        ]
        click.echo(json.dumps(rows, indent=2))
    else:
        show(summarize_cuts(found))


@main.command()
@_target
@_optional_input
@_wishes
@_schedules
@click.option("--batches", type=click.IntRange(1), default=32, show_default=True)
@click.option("--micro-batches", type=click.IntRange(1), help="Slices of a batch, where the schedule has them.")
@_json
@_drawings
@click.option("--trace", type=_FILE, help="Write trace events for ui.perfetto.dev or chrome://tracing.")
def simulate(
    target: str, schedule: str, batches: int, micro_batches: int | None, as_json: bool,
    svg: Path | None, html: Path | None, trace: Path | None, **wishes: Any,
) -> None:  # fmt: skip
    """Predict when each lane does what, for TARGET or for a PLAN.json of `inspect --json`."""
    rule = _schedule(schedule, micro_batches)
    plan = _read(target, **wishes) if target.endswith(".json") and ":" not in target else _plan(target, **wishes)
    from autodecouple import api

    timeline = api.simulate(plan, schedule=rule, batches=batches)
    _present(timeline, _timeline_json(timeline) if as_json else None, svg, html)
    if trace:
        from autodecouple.view.trace import trace_events

        write(trace, json.dumps(trace_events(timeline)))


@main.command()
@_target
@_input
@_wishes
def code(target: str, **wishes: Any) -> None:
    """Print the Python that is generated for each stage of TARGET. TARGET's code is executed."""
    model, api = _load(target, weightless=False)
    with busy("generating"), _given(wishes["inputs"]):
        sources = api.code(model, **_arguments(**wishes))
    click.echo("\n\n".join(f"# stage {k}\n{source.rstrip()}" for k, source in enumerate(sources)))


@main.command()
@_json
def doctor(as_json: bool) -> None:
    """Print versions and devices, to paste into an issue."""
    from autodecouple.doctor import examine, report

    found = examine()
    click.echo(json.dumps(found, indent=2) if as_json else report(found))


def _plan(target: str, **wishes: Any) -> Plan:
    if not wishes["inputs"]:
        raise click.UsageError("a model needs --input SHAPE; only a PLAN.json does without")
    model, api = _load(target, weightless=wishes["cost"] == "flops")
    with busy("planning"), _given(wishes["inputs"]):
        plan: Plan = api.plan(model, **_arguments(**wishes))
    return plan


def _load(target: str, *, weightless: bool = True) -> tuple[nn.Module, ModuleType]:
    with busy(f"building {target}"):
        from autodecouple import api

        return targets.load(target, weightless=weightless), api


@contextlib.contextmanager
def _given(inputs: tuple[targets.InputShape, ...]) -> Iterator[None]:
    """What the model itself raises on the example says what that was."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, AutodecoupleError):
            given = " and ".join(f"{'x'.join(map(str, item.shape))}:{item.dtype}" for item in inputs)
            error.add_note(f"the inputs were {given}; indices of tokens are integers: --input 8x128:int64")
        raise


def _arguments(
    inputs: tuple[targets.InputShape, ...], stages: int, loss: str, devices: str | None, max_memory: int | None,
    **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """The options in the words of the API."""
    return {
        **others,
        "example_inputs": targets.example_inputs(inputs),
        "n_stages": stages,
        "loss": loss.split(",") if "," in loss else loss,
        "devices": devices.split(",") if devices else None,
        "memory_limit": max_memory,
    }


def _read(path: str, inputs: tuple[targets.InputShape, ...], **_: Any) -> Plan:
    if inputs:
        raise click.UsageError(f"{path} is a plan, which has its inputs already: leave --input out")
    try:
        return Plan.from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise click.FileError(path, error.strerror or str(error)) from error


def _schedule(name: str, micro_batches: int | None) -> Schedule:
    """The named schedule, in that many slices; not every schedule has slices."""
    schedule: Any = SCHEDULES[name]
    if micro_batches is None or micro_batches == schedule.num_micro_batches:
        return schedule  # type: ignore[no-any-return]
    fields = {field.name for field in dataclasses.fields(schedule) if field.init}
    if "num_micro_batches" not in fields:
        raise click.UsageError(f"the schedule {name} takes whole batches: leave --micro-batches out")
    return dataclasses.replace(schedule, num_micro_batches=micro_batches)  # type: ignore[no-any-return]


def _present(value: Plan | Timeline, as_json: str | None, svg: Path | None, html: Path | None) -> None:
    """Files first, so that a failing write leaves stdout empty."""
    if svg:
        from autodecouple.view.svg import draw

        write(svg, draw(value))
    if html:
        from autodecouple.view.html import page

        write(html, page(value))
    if as_json is None:
        show(summarize(value))
    else:
        click.echo(as_json)


def _timeline_json(timeline: Timeline) -> str:
    spans = [
        {"lane": s.lane, "action": str(s.action), "batch": s.batch, "start": s.start, "stop": s.stop}
        for s in timeline.spans
    ]
    facts = {name: getattr(timeline, name) for name in ("title", "num_lanes", "makespan", "bubble", "busy")}
    return json.dumps({**facts, "spans": spans}, indent=2)
