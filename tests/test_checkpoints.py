"""Checkpoints come back exactly under any cuts, are whole or not there, and are written while training goes on."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LRScheduler, SequentialLR
from training_tools import assert_same, comparable, compiled, make_batches, make_model

import autodecouple
from autodecouple import checkpoints, storage
from autodecouple.decoupled import Decoupled
from autodecouple.errors import CheckpointError
from autodecouple.flat import flatten, unflatten
from autodecouple.plans import Plan

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*had no two rows of one class"),
    pytest.mark.filterwarnings("ignore:the state was saved with other cuts"),
    pytest.mark.timeout(120),
]

Params = list[nn.Parameter]


def decayed(params: Params) -> torch.optim.Optimizer:
    """Weight decay for matrices only, and another rate for the rest."""
    matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 0.02}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.01)


class Paced(torch.optim.SGD):
    """A state that is no tensor, beside one whose name has a dot and a list."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["paces"] = state.get("paces", 0) + 1
                state["a.b"] = p.detach().clone()
                state["many"] = [p.detach().clone(), 2.5]
        return super().step(closure)


OPTIMIZERS: dict[str, Callable[[Params], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    "decayed": decayed,
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.01),
    "paced": lambda params: Paced(params, lr=0.05, momentum=0.9),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler] | None] = {
    "none": None,
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "lambda": lambda o: LambdaLR(o, lambda t: 0.5**t),
    "sequential": lambda o: SequentialLR(o, [ExponentialLR(o, 0.9), CosineAnnealingLR(o, 10)], milestones=[2]),
}


def rates(decoupled: Decoupled) -> dict[str, float]:
    """The learning rate of each of the model's parameters, read where the optimizer reads it."""
    names = {id(parameter): name for name, parameter in decoupled.model.named_parameters()}
    groups = [group for optimizer in decoupled.optimizers for group in optimizer.param_groups]
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"] if id(p) in names}


def moments(decoupled: Decoupled) -> dict[str, Any]:
    """What the optimizers know of each of the model's parameters, from the optimizers themselves."""
    names = {id(parameter): name for name, parameter in decoupled.model.named_parameters()}
    pairs = [pair for optimizer in decoupled.optimizers for pair in optimizer.state.items()]
    return {names[id(p)]: dict(state) for p, state in pairs if id(p) in names}


def head_states(decoupled: Decoupled) -> dict[str, Any]:
    """By the node and the values that they read."""
    heads = [stage.code.head for stage in decoupled.stages[:-1]]
    pairs = zip(decoupled.plan.cuts, heads, strict=True)
    return {f"{cut.after} {cut.features}": dict(head.state_dict()) for cut, head in pairs if head is not None}


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """The first save imports torch.distributed.checkpoint, which takes a while."""
    assert storage.write


# ---------------------------------------------------------------- any cuts


@settings(max_examples=14)
@given(
    stages=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    lanes=st.integers(1, 3),
    executor=st.sampled_from(["inline", "streams"]),
    count=st.integers(0, 4),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
    accumulate=st.integers(1, 2),
    through=st.sampled_from(["folder", "background", "memory"]),
)
def test_model_and_optimizer_come_back_under_any_cuts(
    stages: tuple[int, int],
    lanes: int,
    executor: str,
    count: int,
    optimizer: str,
    scheduler: str,
    accumulate: int,
    through: str,
) -> None:
    """Weights, buffers, moments, step counts, rates and common heads, to the last bit; other heads as compiled."""
    options = {"optimizer": OPTIMIZERS[optimizer], "scheduler": SCHEDULERS[scheduler], "accumulate": accumulate}
    with scratch() as folder:
        with compiled("norm", stages[0], **options) as decoupled:
            for pair in make_batches("norm", [6] * count):
                decoupled.train_step(*pair)
            decoupled.save(folder / "c", background=through == "background")
            state = decoupled.state_dict()
            expected = [dict(decoupled.model.state_dict()), moments(decoupled), rates(decoupled)]
            expected = [{name: copied(value) for name, value in part.items()} for part in expected]
            heads = {place: copied(head) for place, head in head_states(decoupled).items()}
        with compiled("norm", stages[1], lanes=min(lanes, stages[1]), executor=executor, **options) as resumed:
            fresh = {place: copied(head) for place, head in head_states(resumed).items()}
            if through == "memory":
                resumed.load_state_dict(state)
            else:
                resumed.load(folder / "c")
            found = [dict(resumed.model.state_dict()), moments(resumed), rates(resumed)]
            assert_same(found, expected)
            assert_same(head_states(resumed), {place: heads.get(place, head) for place, head in fresh.items()})
            assert all(stage.pending == count % accumulate for stage in resumed.stages)
            resumed.train_step(*make_batches("norm", [6], seed=9)[0])
            assert resumed.state_dict()["step"] == count + 1


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: copied(inner) for name, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


@settings(max_examples=8)
@given(
    n_stages=st.integers(1, 4),
    counts=st.tuples(st.integers(0, 3), st.integers(1, 3)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
    accumulate=st.integers(1, 3),
    loss=st.sampled_from(["supcon", "deinforeg"]),
)
def test_with_the_same_plan_training_goes_on_as_if_never_stopped(
    n_stages: int, counts: tuple[int, int], optimizer: str, scheduler: str, accumulate: int, loss: str
) -> None:
    """Dropout, half an accumulation, the heads' own statistics: all losses and parameters, to the last bit."""
    options = {"optimizer": OPTIMIZERS[optimizer], "scheduler": SCHEDULERS[scheduler], "accumulate": accumulate}
    batches = make_batches("dropout", [6] * sum(counts))
    with scratch() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*had no two rows|.*lr_scheduler.step|.*epoch parameter")
        with compiled("dropout", n_stages, loss, **options) as decoupled:
            for pair in batches[: counts[0]]:
                decoupled.train_step(*pair)
            decoupled.save(folder / "c", background=True)
            expected = [decoupled.train_step(*pair) for pair in batches[counts[0] :]]
            whole = decoupled.state_dict()
        with compiled("dropout", n_stages, loss, **options) as resumed:
            resumed.load(folder / "c")
            found = [resumed.train_step(*pair) for pair in batches[counts[0] :]]
            assert [step.losses for step in found] == [step.losses for step in expected]
            assert_same(comparable(resumed.state_dict()), comparable(whole))


def test_a_warning_names_the_heads_that_do_not_come_back(tmp_path: Path) -> None:
    with compiled("norm", 3, cut_at=["0", "3"]) as decoupled:
        decoupled.save(tmp_path / "c")
        mine = [cut.after for cut in decoupled.plan.cuts]
    with compiled("norm", 3, cut_at=["1", "3"]) as resumed:
        theirs = [cut.after for cut in resumed.plan.cuts]
        assert mine[1] == theirs[1]
        expected = f"heads after {theirs[0]} stay as compiled, and those saved after {mine[0]} are left out"
        with pytest.warns(UserWarning, match=expected) as caught:
            resumed.load(tmp_path / "c")
        assert caught[0].filename == __file__
    with compiled("norm", 3, plan=Plan.from_json((tmp_path / "c" / "plan.json").read_text())) as again:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again.load(tmp_path / "c")
        assert [cut.after for cut in again.plan.cuts] == mine


class Skip(nn.Module):
    """The head after `relu` reads the skip connection, too, if its parameters are of the same stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.skip, self.down, self.last = (nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        aside = self.skip(h).sigmoid()
        return self.last(self.down(h).relu() + aside)


def test_a_head_that_reads_other_values_is_another_head(tmp_path: Path) -> None:
    """At the same node, but of other shapes."""

    def make(cuts: list[str]) -> Decoupled:
        x = torch.randn(4, 5)
        return autodecouple.compile(Skip(), loss="early_exit", cut_at=cuts, devices=["cpu"], example_inputs=(x,))

    with make(["relu"]) as decoupled:
        assert decoupled.plan.cuts[0].features == ("relu", "sigmoid")
        decoupled.save(tmp_path / "c")
        expected = {name: value.clone() for name, value in decoupled.model.state_dict().items()}
    with make(["sigmoid", "relu"]) as resumed:
        assert resumed.plan.cuts[1].features == ("relu",)
        with pytest.warns(UserWarning, match="heads after sigmoid, relu stay as compiled"):
            resumed.load(tmp_path / "c")
        assert_same(dict(resumed.model.state_dict()), expected)


def test_coupled_stages_give_their_weights_to_detached_ones(tmp_path: Path) -> None:
    """Backprop for a start, local losses afterwards."""
    options: dict[str, Any] = {"optimizer": OPTIMIZERS["adamw"]}
    with compiled("norm", 2, "bp", **options) as decoupled:
        decoupled.train_step(*make_batches("norm", [6])[0])
        decoupled.save(tmp_path / "c")
        expected = {name: value.clone() for name, value in decoupled.model.state_dict().items()}
    with compiled("norm", 2, "supcon", **options) as resumed:
        with pytest.warns(UserWarning, match="stay as compiled"):
            resumed.load(tmp_path / "c")
        assert_same(dict(resumed.model.state_dict()), expected)


class Shared(nn.Module):
    """Every stage reads one frozen weight and one table."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        self.register_buffer("table", torch.randn(5))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = (layer(x) * self.table * self.frozen).tanh()
        return x


def test_copies_on_other_devices_come_back_too(tmp_path: Path) -> None:
    """A stage on another device than a frozen weight's home reads a copy: it kept the value of before the load."""
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 1])

    def make() -> Decoupled:
        return autodecouple.compile(
            Shared(), 4, "early_exit", devices=["cpu", "cpu:0"] * 2, example_inputs=(x,), executor="inline"
        )

    with make() as decoupled:
        decoupled.save(tmp_path / "c")
        expected = decoupled.train_step(x, y).losses
    with make() as resumed:
        resumed.load(tmp_path / "c")
        assert resumed.train_step(x, y).losses == expected


# ---------------------------------------------------------------- parameter groups and schedulers


class Rates:
    """A rate of its own for every stage: 0.01, 0.02, ..."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, params: Params) -> torch.optim.Optimizer:
        self.calls += 1
        return torch.optim.SGD(params, lr=self.calls / 100, momentum=0.9)


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_rates_that_meet_in_one_stage_stay_apart(scheduler: str, tmp_path: Path) -> None:
    """Three stages' rates .01, .02, .03 came back in two stages as .02 and .02, without a word."""
    with compiled("norm", 3, optimizer=Rates(), scheduler=SCHEDULERS[scheduler]) as decoupled:
        for pair in make_batches("norm", [6] * 3):
            decoupled.train_step(*pair)
        decoupled.save(tmp_path / "c")
        expected = [copied(rates(decoupled))]
        decoupled.train_step(*make_batches("norm", [6])[0])
        decoupled.synchronize()
        expected.append(copied(rates(decoupled)))
    assert len(set(expected[0].values())) == 3
    with compiled("norm", 1, optimizer=Rates(), scheduler=SCHEDULERS[scheduler]) as resumed:
        resumed.load(tmp_path / "c")
        assert rates(resumed) == expected[0]
        assert len(resumed.optimizers[0].param_groups) == 3
        resumed.train_step(*make_batches("norm", [6])[0])
        resumed.synchronize()
        assert rates(resumed) == pytest.approx(expected[1], rel=1e-12)  # and the scheduler goes on from each
        resumed.save(tmp_path / "d")
    with compiled("norm", 4, optimizer=Rates(), scheduler=SCHEDULERS[scheduler]) as back:
        back.load(tmp_path / "d")
        assert rates(back) == pytest.approx(expected[1], rel=1e-12)


def test_a_new_head_takes_the_rates_of_its_group(tmp_path: Path) -> None:
    """It starts as compiled, but at the rate that the others have come down to: also where all of its group is new, as
    are the matrices of a stage that is a BatchNorm."""
    options: dict[str, Any] = {"optimizer": decayed, "scheduler": lambda o: ExponentialLR(o, 0.5)}
    with compiled("norm", 1, **options) as decoupled:
        for pair in make_batches("norm", [6] * 3):
            decoupled.train_step(*pair)
        decoupled.save(tmp_path / "c")
    with compiled("norm", 3, cut_at=["0.0", "0"], **options) as resumed:
        assert all(p.ndim == 1 for p in resumed.stages[1].code.body.parameters())
        resumed.load(tmp_path / "c")
        for optimizer, schedule in zip(resumed.optimizers, resumed.schedulers, strict=True):
            assert all(g["lr"] == (0.01 if g["weight_decay"] else 0.02) / 8 for g in optimizer.param_groups)
            assert schedule.last_epoch == 3


class Filtered:
    """Trains matrices only."""

    def __call__(self, params: Params) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in params if p.ndim > 1], lr=0.05, momentum=0.9)


def test_parameters_that_the_user_left_out_stay_out(tmp_path: Path) -> None:
    with compiled("plain", 2, optimizer=Filtered()) as decoupled:
        decoupled.train_step(*make_batches("plain", [6])[0])
        decoupled.save(tmp_path / "c")
    with compiled("plain", 3, optimizer=Filtered()) as resumed:
        resumed.load(tmp_path / "c")
    everything = compiled("plain", 3, optimizer=OPTIMIZERS["momentum"])
    with everything, pytest.raises(CheckpointError, match=r"it lacks .*model\.0\.0\.bias, .*weights alone"):
        everything.load(tmp_path / "c")


def test_moments_lie_as_their_parameters_do(tmp_path: Path) -> None:
    """A file holds them row by row; channels_last kernels would meet other strides after every resume."""
    model = make_model("norm").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y = make_batches("norm", [6])[0]
    with autodecouple.compile(model, 2, "early_exit", devices=["cpu"], optimizer=OPTIMIZERS["adamw"]) as decoupled:
        decoupled.train_step(x, y)
        expected = {name: {k: m.stride() for k, m in entry.items()} for name, entry in moments(decoupled).items()}
        assert expected["1.0.weight"]["exp_avg"] == (36, 1, 12, 4)
        decoupled.save(tmp_path / "c")
        decoupled.load(tmp_path / "c")
        found = {name: {k: m.stride() for k, m in entry.items()} for name, entry in moments(decoupled).items()}
        assert found == expected


# ---------------------------------------------------------------- tied parameters


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))
        self.out = nn.Linear(6, 11)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.layers(self.embedding(tokens)).mean(1))


def tied(n_stages: int, **options: Any) -> Decoupled:
    torch.manual_seed(n_stages)  # other initial weights for everyone
    example = (torch.zeros(4, 5, dtype=torch.int64),)
    return autodecouple.compile(
        Tied(), n_stages, "bp" if n_stages == 1 else "supcon", devices=["cpu"], example_inputs=example,
        optimizer=OPTIMIZERS["adamw"], **options,
    )  # fmt: skip


def test_a_tied_parameter_is_kept_once(tmp_path: Path) -> None:
    tokens, y = torch.randint(0, 11, (4, 5)), torch.randint(0, 11, (4,))
    with tied(1) as decoupled:
        decoupled.train_step(tokens, y)
        decoupled.save(tmp_path / "c")
        expected = {name: value.clone() for name, value in decoupled.model.state_dict().items()}
    names = {name for name in storage.read(tmp_path / "c") if "weight" in name and name.startswith("model.")}
    assert "model.embedding.weight" in names and "model.out.weight" not in names
    with tied(1) as resumed:
        resumed.load(tmp_path / "c")
        assert_same(dict(resumed.model.state_dict()), expected)
        assert resumed.model.out.weight is resumed.model.embedding.weight
    model = Tied()
    load_model(model, tmp_path / "c" / "model.safetensors", strict=True)
    assert_same(dict(model.state_dict()), expected)
    with tied(3, tied="untie") as apart, pytest.raises(CheckpointError, match=r"lacks model\.out\.weight"):
        apart.load(tmp_path / "c")


def test_untied_parameters_come_back_apart(tmp_path: Path) -> None:
    tokens, y = torch.randint(0, 11, (4, 5)), torch.randint(0, 11, (4,))
    with tied(3, tied="untie") as decoupled:
        decoupled.train_step(tokens, y)
        decoupled.save(tmp_path / "c")
        expected = {name: value.clone() for name, value in decoupled.model.state_dict().items()}
    assert not torch.equal(expected["out.weight"], expected["embedding.weight"])
    with tied(2, tied="untie") as resumed:
        resumed.load(tmp_path / "c")
        assert_same(dict(resumed.model.state_dict()), expected)


# ---------------------------------------------------------------- what lies in the folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint, and the state that it was taken of."""
    path = tmp_path_factory.mktemp("kept") / "c"
    options: dict[str, Any] = {"optimizer": OPTIMIZERS["paced"], "accumulate": 2, "scheduler": SCHEDULERS["sequential"]}
    with compiled("norm", 3, "early_exit", **options) as decoupled:
        for pair in make_batches("norm", [6] * 3):
            decoupled.train_step(*pair)
        decoupled.save(path)
        return path, decoupled.state_dict()


def test_flat_and_back(kept: tuple[Path, dict[str, Any]]) -> None:
    state = kept[1]
    assert_same(unflatten(flatten(state)), state)
    assert_same(checkpoints.load(kept[0]), state)


def test_other_programs_read_it(kept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """torch's own converter finds every tensor under its name, safetensors the model, json the plan."""
    path, state = kept
    dcp_to_torch_save(path, tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=False)
    for name, value in state["model"].items():
        assert torch.equal(found[f"model.{name}"], value)
    for key, entry in state["optim"].items():
        assert torch.equal(found[f"optim.{key}.momentum_buffer"], entry["momentum_buffer"])
    assert found["progress"]["step"] == 3
    assert_same(load_file(path / "model.safetensors"), state["model"])
    model = make_model("norm")
    model.load_state_dict(load_file(path / "model.safetensors"))
    assert json.loads((path / "plan.json").read_text())["cuts"]


def test_it_can_be_read_by_whom_anything_else_can(kept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """safetensors makes its files for the owner's eyes only: an evaluation by somebody else could not read them."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert stat.S_IMODE(kept[0].stat().st_mode) == stat.S_IMODE((tmp_path / "folder").stat().st_mode)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in kept[0].iterdir()}
    assert set(modes.values()) == {stat.S_IMODE((tmp_path / "file").stat().st_mode)}, modes


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


@pytest.mark.parametrize("place", ["metadata", "plain data"])
def test_reading_runs_no_code(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.distributed.checkpoint reads its metadata and plain data by pickle, which may hold any code."""
    path = tmp_path / "c"
    path.mkdir()
    monkeypatch.setattr(storage, "_check_plain", lambda *_: None)
    storage.finish([storage.write({"model.w": torch.ones(2), "progress": Evil()}, path)], path)
    if place == "metadata":
        (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    sums = {file.name: [file.stat().st_size, checkpoints.checksum(file)] for file in path.iterdir()}
    (path / "sums.json").write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match=r"(?s)not a whole checkpoint: UnpicklingError.*print"):
        checkpoints.load(path)
    assert "code ran" not in capsys.readouterr().out


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    """Found out when it is saved, not when it is needed; the checkpoint of before is kept."""
    with compiled("norm", 2, optimizer=OPTIMIZERS["sgd"]) as decoupled:
        decoupled.save(tmp_path / "c")
        decoupled.optimizers[0].param_groups[0]["rule"] = lambda: None
        with pytest.raises(CheckpointError, match=r"stages\.0 holds what a checkpoint cannot"):
            decoupled.save(tmp_path / "c")
        del decoupled.optimizers[0].param_groups[0]["rule"]
        assert os.listdir(tmp_path) == ["c"]
        decoupled.load(tmp_path / "c")


# ---------------------------------------------------------------- damage


@settings(max_examples=40)
@given(data=st.data())
def test_damage_anywhere_is_found(kept: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    """Any file cut short anywhere, any bytes changed, any file missing."""
    with scratch() as folder:
        path = Path(shutil.copytree(kept[0], folder / "c"))
        file = path / data.draw(st.sampled_from(sorted(os.listdir(path))))
        content = bytearray(file.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["cut", "flip", "missing"]))
        if kind == "missing":
            file.unlink()
        elif kind == "cut":
            file.write_bytes(content[:position])
        else:
            content[position] ^= data.draw(st.integers(1, 255))
            file.write_bytes(content)
        try:
            state = checkpoints.load(path)
        except CheckpointError:
            return
        assert file.name == "sums.json"  # a blank or a leading zero in it says the same
        assert_same(state, kept[1])


def test_a_damaged_checkpoint_changes_nothing(kept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = Path(shutil.copytree(kept[0], tmp_path / "c"))
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(content)
    with compiled("norm", 3, "early_exit", optimizer=OPTIMIZERS["paced"], accumulate=2) as decoupled:
        before = decoupled.state_dict()
        with pytest.raises(CheckpointError, match="__0_0.distcp is damaged"):
            decoupled.load(path)
        assert_same(decoupled.state_dict(), before)


# ---------------------------------------------------------------- where it is written


def test_a_kill_at_any_moment_leaves_one_of_them_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk as it is before every step of a save, which is what a kill there leaves: the old or the new one loads,
    and the next save is none the worse."""
    path, seen = tmp_path / "disk" / "c", tmp_path / "seen"
    path.parent.mkdir()
    with compiled("norm", 2, optimizer=OPTIMIZERS["adamw"]) as decoupled:
        decoupled.save(path)
        old = decoupled.state_dict()
        decoupled.train_step(*make_batches("norm", [6])[0])
        new = decoupled.state_dict()
        count = 0

        def watched(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                shutil_copytree(path.parent, seen / str(count))
                count += 1
                return function(*args, **kwargs)

            return call

        shutil_copytree = shutil.copytree
        with monkeypatch.context() as patch:
            for module, name in ((os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (storage, "save_file")):
                patch.setattr(module, name, watched(getattr(module, name)))
            decoupled.save(path)
        assert os.listdir(path.parent) == ["c"]
        found = []
        for index in range(count):
            state = checkpoints.load(seen / str(index) / "c")
            assert_same(state, old if state["step"] == 0 else new)
            found.append(state["step"])
            if index % 3 == 0 or found[-1:] != found[-2:-1]:
                decoupled.save(seen / str(index) / "c")
                assert_same(checkpoints.load(seen / str(index) / "c"), new)
                assert os.listdir(seen / str(index)) == ["c"]
        assert found == sorted(found) and set(found) == {0, 1}


SAVING = """
import sys, torch
torch.set_num_threads(1)
from torch import nn
import autodecouple
model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
decoupled = autodecouple.compile(
    model, 2, "early_exit", devices=["cpu"], example_inputs=(torch.zeros(4, 64),), executor="inline",
    optimizer=lambda params: torch.optim.Adam(params, lr=0.01),
)
while True:
    decoupled.train_step(torch.ones(4, 64), torch.zeros(4, dtype=torch.int64))
    decoupled.save(sys.argv[1], background=sys.argv[2] == "background")
    print(decoupled.state_dict()["step"], flush=True)
"""


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("how", ["at once", "background"])
def test_a_process_killed_while_it_saves(how: str, tmp_path: Path) -> None:
    """By a signal that no process can catch; the last checkpoint that was reported, or a later one, is whole."""
    for delay in (0.0, 0.004, 0.011):
        run = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(tmp_path / "c"), how], stdout=subprocess.PIPE, text=True
        )
        assert run.stdout is not None
        with run:
            lines = [run.stdout.readline() for _ in range(4)]
            time.sleep(delay)
            run.send_signal(signal.SIGKILL)
        reported = int(lines[-1]) - (how == "background")  # the last one may just have begun
        assert checkpoints.load(tmp_path / "c")["step"] >= reported


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk full in the middle: the checkpoint of the epoch before is whole, and nothing else is left."""
    with compiled("norm", 2) as decoupled:
        decoupled.save(tmp_path / "c")
        before = {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()}
        for module, name in ((storage, "save_file"), (os, "fsync"), (os, "rename")):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, raiser(OSError(28, "no space left on device")))
                with pytest.raises(CheckpointError, match="what was there before still is: OSError.*no space"):
                    decoupled.save(tmp_path / "c")
            assert os.listdir(tmp_path) == ["c"]
            assert {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()} == before
        decoupled.load(tmp_path / "c")


def raiser(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


def test_nothing_else_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is written, and by fit before anything is trained."""
    (tmp_path / "file").write_text("a state of one file")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "figure.png").write_text("")
    (tmp_path / "empty").mkdir()
    pairs = make_batches("norm", [6])
    refused = {
        tmp_path / "file": "is a file, and a checkpoint is a folder",
        tmp_path / "results": r"would be replaced: figure\.png",
        tmp_path / "nowhere" / "c": "is not there: make it",
        tmp_path: "holds what is no part of a checkpoint",
    }
    with compiled("norm", 2) as decoupled:
        for path, message in refused.items():
            for background in (False, True):
                with pytest.raises(CheckpointError, match=message):
                    decoupled.save(path, background=background)
            with pytest.raises(CheckpointError, match=message):
                decoupled.fit(pairs, checkpoint=path, progress=False)
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", lambda *_: False)
            with pytest.raises(CheckpointError, match="nothing can be written into"):
                decoupled.fit(pairs, checkpoint=tmp_path / "c", progress=False)
        assert decoupled.state_dict()["step"] == 0
        assert sorted(os.listdir(tmp_path)) == ["empty", "file", "results"]
        monkeypatch.chdir(tmp_path)
        decoupled.save("empty")
        decoupled.load("empty")
        (tmp_path / "link").symlink_to(tmp_path / "empty")
        decoupled.save("link")
        assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["empty", "file", "link", "results"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with compiled("norm", 2) as decoupled:
        torch.save(decoupled.state_dict(), tmp_path / "state.pt")
        with pytest.raises(CheckpointError, match=r"is a file.*load_state_dict\(torch.load\(\.\.\.\)\)"):
            decoupled.load(tmp_path / "state.pt")
        decoupled.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        with pytest.raises(CheckpointError, match=r"not a whole checkpoint: .*sums\.json"):
            decoupled.load(tmp_path / "folder")
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            decoupled.load(tmp_path / "nowhere")


# ---------------------------------------------------------------- behind the training


class Gate:
    """Holds the writer until it may go on; counts how often it came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.came, self.write = threading.Event(), 0, storage.write
        monkeypatch.setattr(storage, "write", self)

    def __call__(self, *args: Any) -> Any:
        self.came += 1
        assert self.open.wait(20)
        return self.write(*args)


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is taken at once: later batches are not in it. Reading the model does not wait for it."""
    gate, batches = Gate(monkeypatch), make_batches("norm", [6] * 4)
    with compiled("norm", 2, optimizer=OPTIMIZERS["adamw"], accumulate=2) as decoupled:
        decoupled.train_step(*batches[0])
        expected = decoupled.state_dict()
        decoupled.save(tmp_path / "c", background=True)
        for pair in batches[1:]:
            decoupled.train_step(*pair)
        decoupled(batches[0][0])
        assert decoupled.state_dict()["step"] == 4
        assert not (tmp_path / "c").exists()
        gate.open.set()
        decoupled.synchronize()
        assert_same(comparable(checkpoints.load(tmp_path / "c")), comparable(expected))


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with compiled("norm", 2) as decoupled:
        decoupled.save(tmp_path / "c", background=True)
        decoupled.train_step(*make_batches("norm", [6])[0])
        opener = threading.Timer(0.2, gate.open.set)
        opener.start()
        decoupled.save(tmp_path / "c", background=True)
        opener.join()
        assert checkpoints.load(tmp_path / "c")["step"] == 0 or gate.came == 2
    assert checkpoints.load(tmp_path / "c")["step"] == 1 and gate.came == 2


@pytest.mark.parametrize("through", ["save", "synchronize", "close", "load", "fit"])
def test_the_writer_s_errors_reach_the_caller_once(
    through: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoupled = compiled("norm", 2)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", raiser(OSError(28, "no space left on device")))
        decoupled.save(tmp_path / "c", background=True)
        calls: dict[str, Callable[[], Any]] = {
            "save": lambda: decoupled.save(tmp_path / "c"),
            "synchronize": decoupled.synchronize,
            "close": decoupled.close,
            "load": lambda: decoupled.load(tmp_path / "c"),
            "fit": lambda: decoupled.fit(make_batches("norm", [6]), checkpoint=tmp_path / "c", progress=False),
        }
        with pytest.raises(CheckpointError, match="no space left on device"):
            calls[through]()
    assert os.listdir(tmp_path) == []
    decoupled.save(tmp_path / "c")  # closed or not
    decoupled.close()


def test_an_error_of_training_is_not_hidden_by_one_of_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "write", raiser(OSError(28, "no space left on device")))
    with pytest.raises(KeyError, match="the user's own"), compiled("norm", 2) as decoupled:
        decoupled.save(tmp_path / "c", background=True)
        raise KeyError("the user's own")


@pytest.mark.slow
@pytest.mark.dist
def test_a_program_that_ends_at_once_still_has_its_checkpoint(tmp_path: Path) -> None:
    """The interpreter waits for the writer."""
    code = SAVING.replace("while True:", "for _ in range(1):").replace(
        'print(decoupled.state_dict()["step"], flush=True)', ""
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c"), "background"], check=True, timeout=60)
    assert checkpoints.load(tmp_path / "c")["step"] == 1
