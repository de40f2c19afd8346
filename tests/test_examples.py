"""What a newcomer runs and reads: examples, benchmarks, the notebook and the README do what they say."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from autodecouple.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "cuts.ipynb"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """Imports an example the way `python examples/NAME.py` does: its folder comes first on the path."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_quickstart(example, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("quickstart").main(["--epochs", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "4 stages" in printed and "backprop" in printed and "makespan" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"plan.html", "timeline.svg", "trace.json"}
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_vision_tables_every_method(example, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["bp", "supcon", "deinforeg:alpha=0", "early_exit:pool=1,hidden=None"]
    options = shlex.split("--rows 200 --epochs 1 --threads 1 --devices cpu,cpu --amp bf16")
    results = example("vision").main([*options, "--json", str(tmp_path / "out.json"), "--loss", *methods])
    assert [result.method for result in results] == methods
    assert [result.lanes for result in results] == [1, 2, 2, 2]
    assert results[0].num_parameters < min(result.num_parameters for result in results[1:])
    printed = capsys.readouterr().out
    assert all(f"| {method} |" in printed for method in methods)
    assert [row["method"] for row in json.loads((tmp_path / "out.json").read_text())] == methods


def test_vision_pads_digits_for_vgg(example) -> None:
    """VGG halves an image four times: of 8x8 pixels nothing would be left."""
    options = shlex.split("--model vgg --width 0.1 --rows 64 --hold-out 32 --epochs 1 --threads 1")
    (result,) = example("vision").main([*options, "--loss", "supcon"])
    assert result.stages == 4 and 0 <= result.accuracy <= 1


@pytest.mark.parametrize("model", ["lstm", pytest.param("transformer", marks=pytest.mark.slow)])
def test_text_cuts_both_networks_into_four(example, model: str) -> None:
    options = shlex.split(f"--model {model} --width 12 --rows 200 --epochs 1 --threads 1")
    backprop, supcon = example("text").main(options)
    assert (backprop.stages, supcon.stages) == (1, 4)


@pytest.mark.parametrize("name", ["vision", "text"])
@pytest.mark.parametrize("wrong", [["--loss", "supcom"], ["--dataset", "cifar10"], ["--epochs", "many"]])
def test_wrong_options_are_refused(example, name: str, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        example(name).main(wrong)
    assert exit_.value.code == 2 and wrong[1] in capsys.readouterr().err


def test_two_lanes_trains_the_same_parameters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    options = shlex.split("--width 32 --batch-size 16 --batches 3 --rounds 2")
    monkeypatch.setattr(sys, "argv", ["run.py", *options, "--json", str(out)])
    runpy.run_path(str(ROOT / "benchmarks" / "two_lanes" / "run.py"), run_name="__main__")
    found = json.loads(out.read_text())
    assert found["equal_parameters"] and found["ratio"] > 0 and len(found["rounds"]) == 2
    assert "equal to the last bit" in capsys.readouterr().out


def test_the_readmes_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)  # the README is ours
    assert len(blocks) == 8 and names["model"] is names["decoupled"].model  # type: ignore[attr-defined]


def test_the_readmes_output_is_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```console\n\$ autodecouple (.*?)\n(.*?)```", README, re.DOTALL)
    assert blocks
    monkeypatch.chdir(ROOT)
    for command, printed in blocks:
        found = CliRunner().invoke(cli, shlex.split(command))
        assert found.exit_code == 0 and found.stdout.strip() == printed.strip()


def test_the_notebook_is_small_and_clean() -> None:
    """It is saved with its outputs: none may be an error or name a place on somebody's disk."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", [])]
    assert len(text) < 300_000 and len(outputs) >= 5
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
