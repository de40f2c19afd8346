"""The command line: what goes to stdout, what to stderr, which exit code, and what the messages say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

import autodecouple
from autodecouple import targets
from autodecouple.cli import main
from autodecouple.cost import FlopCost
from autodecouple.errors import CutError, InputError
from autodecouple.plans import Cut, Plan, StageSpec, TensorSpec
from autodecouple.schedules import SCHEDULES
from autodecouple.simulator import run as run_schedule
from autodecouple.timeline import Timeline

MODEL = """
import torch
from torch import nn
print("this is printed by user code")

def net():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 4))

made = net()
number = 3

def broken():
    raise KeyError("from user code")
"""
ARGS = ("model.py:net", "--input", "4x8", "--stages", "2")


def example_plan(n_stages: int = 2, cost: int = 300) -> Plan:
    stages = tuple(
        StageSpec(k, (f"linear_{k}", f"relu_{k}"), "supcon" if k < n_stages - 1 else "criterion",
                  cost * 10**6, 200 * 10**6 * (k + 1), 10**6, lane=k)
        for k in range(n_stages)
    )  # fmt: skip
    cuts = tuple(
        Cut(f"relu_{k}", (TensorSpec(f"relu_{k}", (4, 16), "float32"),), (f"relu_{k}",), (f"relu_{k}",))
        for k in range(n_stages - 1)
    )
    return Plan(stages, cuts, "Net", (TensorSpec("input", (4, 8), "float32"),), ("mind the gap",))


class FakeApi(SimpleNamespace):
    """Stands in for `autodecouple.api` and keeps what it was asked."""

    asked: dict[str, Any]

    def plan(self, model: Any, **options: Any) -> Plan:
        self.asked = {"model": model, **options}
        print("tracing, says some library")
        if "nowhere" in options["cut_at"]:
            raise CutError("cannot cut after 'nowhere'")
        return example_plan(options["n_stages"])

    def cuts(self, model: Any, example_inputs: Any, **capturing: Any) -> tuple[Any, ...]:
        self.asked = {"model": model, "example_inputs": example_inputs}
        return (
            SimpleNamespace(node="linear", module="0", cut=None, reason="two tensors cross"),
            SimpleNamespace(node="relu", module="1", cut=example_plan().cuts[0], reason=""),
        )

    def code(self, model: Any, **options: Any) -> tuple[str, ...]:
        return ("def forward(self, x):\n    return x\n", "def forward(self, y):\n    return y")

    def simulate(self, plan: Plan, schedule: Any, batches: int) -> Timeline:
        self.asked = {"schedule": schedule}
        return run_schedule(plan, schedule, FlopCost(plan, schedule.num_micro_batches), batches)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the user's model, as the current one; nothing of it stays in the interpreter."""
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in [n for n in set(sys.modules) - known if n.startswith(("model", "_autodecouple_target"))]:
        del sys.modules[name]


@pytest.fixture
def api(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setitem(sys.modules, "autodecouple.api", fake)
    monkeypatch.setattr(autodecouple, "api", fake, raising=False)
    return fake


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def test_inspect_prints_the_plan(api: FakeApi) -> None:
    result = invoke("inspect", *ARGS)
    assert result.exit_code == 0
    assert result.stdout == f"{example_plan()}\n"
    assert "user code" in result.stderr and "some library" in result.stderr


def test_options_reach_the_compiler(api: FakeApi) -> None:
    wishes = ("--loss", "supcon,bp", "--devices", "cpu,cpu", "--cut-at", "a", "--cut-at", "b", "--max-memory", "4GiB")
    capturing = ("--mode", "eval", "--tied", "untie", "--dynamic", "1", "--dynamic", "2", "--no-split", "Block")
    result = invoke("inspect", *ARGS, *wishes, *capturing, "--cost", "measured")
    assert result.exit_code == 0
    model, inputs = api.asked.pop("model"), api.asked.pop("example_inputs")
    assert len(model) == 5 and [(tuple(x.shape), x.device.type) for x in inputs] == [((4, 8), "meta")]
    assert api.asked == {
        "n_stages": 2,
        "loss": ["supcon", "bp"],
        "cost": "measured",
        "devices": ["cpu", "cpu"],
        "cut_at": ("a", "b"),
        "memory_limit": 4 * 2**30,
        "no_split": ("Block",),
        "mode": "eval",
        "tied": "untie",
        "dynamic": (1, 2),
        "schedule": "streaming",
    }


def test_json_is_a_plan_and_warnings_go_to_stderr(api: FakeApi) -> None:
    result = invoke("inspect", *ARGS, "--json")
    assert Plan.from_json(result.stdout) == example_plan()
    assert "warning: mind the gap" in result.stderr


def test_quiet_leaves_only_what_user_code_prints(api: FakeApi) -> None:
    result = invoke("--quiet", "inspect", *ARGS, "--json", "--svg", "plan.svg")
    assert "warning" not in result.stderr and "wrote" not in result.stderr


def test_files_are_written(api: FakeApi, folder: Path) -> None:
    result = invoke("inspect", *ARGS, "--svg", "plan.svg", "--html", "plan.html")
    assert result.exit_code == 0 and "wrote plan.svg" in result.stderr
    assert ElementTree.parse(folder / "plan.svg").getroot().tag.endswith("svg")
    assert (folder / "plan.html").read_text().startswith("<!doctype html>")


def test_a_file_that_cannot_be_written_is_an_error_and_stdout_stays_empty(api: FakeApi) -> None:
    result = invoke("inspect", *ARGS, "--svg", "missing/plan.svg")
    assert result.exit_code == 1 and "missing/plan.svg" in result.stderr and not result.stdout


@pytest.mark.parametrize(("minimum", "code"), [("0.5", 0), ("0.99", 1), ("2", 2)])
def test_check_fails_below_its_balance(api: FakeApi, minimum: str, code: int) -> None:
    result = invoke("inspect", *ARGS, "--check", minimum)
    assert result.exit_code == code
    if code == 1:
        assert "error: balance 0.857 is below --check 0.99; the slowest is stage 1" in result.stderr
        assert result.stdout


def test_errors_of_ours_are_one_line_and_exit_1(api: FakeApi) -> None:
    result = invoke("inspect", *ARGS, "--cut-at", "nowhere")
    assert result.exit_code == 1 and not result.stdout
    assert result.stderr.splitlines()[-1] == "error: cannot cut after 'nowhere'"
    assert "Traceback" not in result.stderr


def test_errors_of_user_code_keep_their_type_and_say_where(api: FakeApi) -> None:
    result = invoke("inspect", "model.py:broken", "--input", "1")
    assert isinstance(result.exception, KeyError)
    assert "model.py:broken" in result.exception.__notes__[0]


def test_interrupt_is_130(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "plan", interrupt, raising=False)
    result = invoke("inspect", *ARGS)
    assert result.exit_code == 130 and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("inspect", "model.py:net"), "--input"),
        (("inspect", "model.py:net", "--input", "8by3"), "'8by3' is not an input; write 8x3x32x32"),
        (("inspect", "model.py:net", "--input", "8x3:float33"), "no dtype is called 'float33'"),
        (("inspect", "model.py:net", "--input", "8x0"), "every size must be 1 or more"),
        (
            ("inspect", "model.py:net", "--input", "8", "--max-memory", "much"),
            "'much' is not a memory size; write 4GiB",
        ),
        (("simulate", "model.py:net"), "a model needs --input"),
        (("simulate", "model.py:net", "--input", "8", "--schedule", "magic"), "'streaming'"),
        (("simulate", "x.json", "--micro-batches", "4"), "the schedule streaming takes whole batches"),
        (("simulate", "x.json", "--input", "8"), "leave --input out"),
        (("nonsense",), "No such command"),
    ],
)
def test_usage_errors_are_2_and_say_what_to_write(api: FakeApi, args: tuple[str, ...], message: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2 and message in result.stderr and not result.stdout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("resnet18", "'resnet18' is not a target; write package.module:factory"),
        ("no_such_module:f", "no module is called 'no_such_module'"),
        ("model.py:nett", "there is no 'nett'; did you mean 'net'?"),
        ("missing.py:net", "no file is called 'missing.py'"),
        ("model.py:number", "gives int, not a torch.nn.Module"),
    ],
)
def test_unknown_targets_are_explained(api: FakeApi, target: str, message: str) -> None:
    result = invoke("inspect", target, "--input", "4x8")
    assert result.exit_code == 1 and f"error: {message}" in result.stderr.replace(f"'{target}': ", "").replace(
        f"'{target}' gives", "gives"
    )


@pytest.mark.parametrize("package", ["torchvision", "timm", "hf"])
def test_missing_packages_name_the_extra(api: FakeApi, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, *rest: Any) -> Any:
        top = name.partition(".")[0]
        if top in ("torchvision", "timm", "transformers"):
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    result = invoke("inspect", f"{package}:some", "--input", "4x8")
    extra = "nlp" if package == "hf" else "vision"
    assert result.exit_code == 1 and f"pip install 'autodecouple[{extra}]'" in result.stderr


@pytest.mark.parametrize("target", ["model:net", "model:Net", "model:made", "model.py:net"])
def test_targets_may_be_functions_classes_and_modules(folder: Path, target: str) -> None:
    from torch import nn

    assert isinstance(targets.load(target), nn.Sequential)


def test_models_of_a_zoo_are_built_weightless_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    def stubborn(name: str) -> nn.Module:
        layer = nn.Linear(2, 2)
        float(layer.weight.detach().sum())  # cannot be read on the meta device
        return layer

    monkeypatch.setitem(targets._ZOOS, "timm", lambda name: nn.Linear(2, 2))
    monkeypatch.setitem(targets._ZOOS, "hf", stubborn)
    assert all(p.is_meta for p in targets.load("timm:a", weightless=True).parameters())
    assert not any(p.is_meta for p in targets.load("timm:a").parameters())
    assert not any(p.is_meta for p in targets.load("hf:a", weightless=True).parameters())


@pytest.mark.parametrize("cost, weightless", [("flops", True), ("measured", False)])
def test_only_a_model_that_runs_is_given_weights(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, cost: str, weightless: bool
) -> None:
    from torch import nn

    monkeypatch.setitem(targets._ZOOS, "timm", lambda name: nn.Linear(2, 2))
    assert invoke("inspect", "timm:a", "--input", "4x2", "--cost", cost).exit_code == 0
    assert all(p.is_meta is weightless for p in api.asked["model"].parameters())


def test_module_missing_inside_user_code_is_not_mistaken_for_the_target(folder: Path) -> None:
    (folder / "model_broken.py").write_text("import surely_absent\n")
    with pytest.raises(ModuleNotFoundError, match="surely_absent"):
        targets.load("model_broken:f")


def test_inputs_are_positional_or_named() -> None:
    parse = targets.InputShape.parse
    tensors = targets.example_inputs([parse("8x3x32x32"), parse("8:int64")])
    assert isinstance(tensors, tuple) and [tuple(t.shape) for t in tensors] == [(8, 3, 32, 32), (8,)]
    named = targets.example_inputs([parse("input_ids=8x128:int64")])
    assert isinstance(named, dict) and str(named["input_ids"].dtype) == "torch.int64"
    with pytest.raises(InputError, match="all named"):
        targets.example_inputs([parse("a=8"), parse("8")])
    with pytest.raises(InputError, match="twice"):
        targets.example_inputs([parse("a=8"), parse("a=8")])


@pytest.mark.parametrize(
    ("given", "expected"),
    [("1024", 1024), ("4GiB", 2**32), ("4G", 4 * 10**9), ("1.5kB", 1500), ("10B", 10), ("1e9", 10**9)],
)
def test_memory_sizes(given: str, expected: int) -> None:
    assert targets.parse_bytes(given) == expected


def test_cuts_lists_legal_places_and_reasons(api: FakeApi) -> None:
    result = invoke("cuts", "model.py:net", "--input", "4x8")
    assert result.exit_code == 0
    for words in ("two tensors cross", "relu_0 (N, 16) float32", "1 legal cut of 2 places"):
        assert words in result.stdout
    rows = json.loads(invoke("cuts", "model.py:net", "--input", "4x8", "--json").stdout)
    assert [row["node"] for row in rows] == ["linear", "relu"]
    assert rows[0]["cut"] is None and rows[1]["cut"]["after"] == "relu_0" and rows[1]["reason"] == ""


def test_simulate_shows_and_writes_a_timeline(api: FakeApi, folder: Path) -> None:
    files = ("--svg", "t.svg", "--html", "t.html", "--trace", "t.json")
    result = invoke("simulate", *ARGS, "--batches", "5", *files)
    assert result.exit_code == 0 and "makespan" in result.stdout
    assert all(f"wrote {name}" in result.stderr for name in files[1::2])
    events = json.loads((folder / "t.json").read_text())["traceEvents"]
    assert max(event["args"].get("batch", 0) for event in events) == 4


def test_simulate_reads_an_edited_plan_without_a_model(api: FakeApi, folder: Path) -> None:
    (folder / "plan.json").write_text(example_plan(3).to_json())
    result = invoke("simulate", "plan.json", "--batches", "3", "--json")
    timeline = json.loads(result.stdout)
    assert timeline["num_lanes"] == 3 and len(timeline["spans"]) == 3 * 3 * 4
    assert timeline["spans"][0] == {"lane": 0, "action": "0F0", "batch": 0, "start": 0.0, "stop": pytest.approx(0.0003)}
    (folder / "plan.json").write_text("{}")
    assert "not a plan" in invoke("simulate", "plan.json").stderr
    assert invoke("simulate", "absent.json").exit_code == 1


def test_simulate_sets_micro_batches_where_the_schedule_has_them(api: FakeApi) -> None:
    assert invoke("simulate", *ARGS, "--schedule", "micro_batched", "--micro-batches", "3").exit_code == 0
    assert type(api.asked["schedule"]) is type(SCHEDULES["micro_batched"])
    assert api.asked["schedule"].num_micro_batches == 3


def test_code_prints_one_source_per_stage(api: FakeApi) -> None:
    result = invoke("code", *ARGS)
    assert result.exit_code == 0 and result.stdout.count("def forward") == 2
    compile(result.stdout, "stages", "exec")


def test_every_command_runs_on_the_real_compiler(folder: Path) -> None:
    """The fake above promises what the compiler does; this keeps the promise."""
    inspected = invoke("-q", "inspect", *ARGS, "--devices", "cpu,cpu", "--json")
    assert inspected.exit_code == 0
    plan = Plan.from_json(inspected.stdout)
    assert len(plan.stages) == 2 and plan.stages[1].lane == 1
    (folder / "plan.json").write_text(inspected.stdout)
    simulated = invoke("simulate", "plan.json", "--schedule", "barrier", "--json")
    assert json.loads(simulated.stdout)["num_lanes"] == 2
    rows = json.loads(invoke("cuts", *ARGS[:3], "--json").stdout)
    assert plan.cuts[0].after in [row["node"] for row in rows if row["cut"]]
    assert invoke("code", *ARGS).stdout.count("# stage") == 2
    failed = invoke("inspect", *ARGS, "--cut-at", "nowhere")
    assert failed.exit_code == 1 and "error: " in failed.stderr and "'nowhere'" in failed.stderr


def test_doctor_has_what_an_issue_needs() -> None:
    shown, found = invoke("doctor").stdout, json.loads(invoke("doctor", "--json").stdout)
    for key in ("autodecouple", "python", "torch", "devices", "peer_access", "threads"):
        assert key in found and f"{key}:" in shown
    assert str(Path.home()) not in shown


def test_help_and_version_work_and_warn_that_code_is_executed() -> None:
    assert "TARGET's code is executed" in " ".join(invoke("--help").stdout.split())
    for command in ("inspect", "cuts", "code"):
        assert "TARGET's code is executed" in " ".join(invoke(command, "--help").stdout.split())
    assert invoke("--version").stdout.startswith("autodecouple, version ")


def test_help_does_not_import_torch() -> None:
    code = "import sys, autodecouple.cli; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
