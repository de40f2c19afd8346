"""Killed at any moment, any process, by any signal: none hangs, and started again all end with the same weights."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from elastic import launch, run_apart
from torch.utils.data import DataLoader, TensorDataset
from training_tools import Batch, assert_same, before_actions, comparable, compiled, make_batches, sgd, train

from autodecouple import storage
from autodecouple.decoupled import Decoupled
from autodecouple.errors import AutodecoupleError
from autodecouple.executors.job import Job
from autodecouple.executors.ranks import Notes
from autodecouple.schedules.actions import Action

pytestmark = [
    pytest.mark.dist,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:.*had no two rows of one class"),
]

EPOCHS, EVERY = 3, 2
NUM_BATCHES = 15
"""Three epochs of four batches of eight rows, and one of five."""


def loader() -> DataLoader[Any]:
    (whole,) = make_batches("dropout", [37])
    return DataLoader(TensorDataset(*whole), batch_size=8, shuffle=True)


def all_batches() -> list[Batch]:
    """Of all epochs, in the order that a script with this seed sees them in."""
    torch.manual_seed(5)
    data = loader()
    return [(x, y) for _ in range(EPOCHS) for x, y in data]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    """The state after plain training, in one process, without any checkpoint."""
    assert storage.write  # imported once, for all that are forked
    return train(compiled("dropout", 4, "early_exit", executor="inline", optimizer=sgd), all_batches()).state


@dataclass(frozen=True)
class Case:
    """How one run goes: the processes, the one that is killed, by what and when, and how it is started again."""

    seed: int
    executor: str = "distributed"

    def chance(self, what: str) -> random.Random:
        return random.Random(f"{what} {self.seed}")

    @property
    def size(self) -> int:
        return (2, 4)[self.seed % 2]

    @property
    def victim(self) -> int:
        return self.chance("victim").randrange(self.size) if self.executor == "distributed" else 0

    @property
    def signal(self) -> int:
        return self.chance("signal").choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])

    @property
    def moment(self) -> str:
        return ("in a save", "in a step", "whenever")[self.seed % 3]

    @property
    def loop(self) -> str:
        return ("fit", "by hand", "by hand, in the background")[self.seed // 2 % 3]

    @property
    def is_restarted(self) -> bool:
        """By torchrun; else it is started again by hand."""
        return self.seed % 5 < 3

    def __str__(self) -> str:
        how = f"rank {self.victim} of {self.size}, {'restarted' if self.is_restarted else 'again'}, "
        return f"{self.seed}: {self.loop}, {how if self.executor == 'distributed' else ''}{self.moment}"


# ---------------------------------------------------------------- the script


def script(case: Case, folder: Path) -> dict[str, Any]:
    """What a user writes, apart from the fate of one process in the first attempt, and the log."""
    rank = int(os.environ.get("RANK", "0"))
    lanes = None if case.executor == "distributed" else ["cpu"] * 2
    decoupled = compiled("dropout", 4, "early_exit", devices=lanes, executor=case.executor, optimizer=sgd)
    torch.manual_seed(5)
    is_doomed = rank == case.victim and not (folder / "killed").exists()
    with fate(case, folder) if is_doomed else ExitStack(), decoupled:
        if case.loop == "fit":
            decoupled.fit(loader(), EPOCHS, checkpoint=folder / "c", save_every=EVERY, resume=True, progress=False)
        else:
            by_hand(decoupled, folder, background=case.loop != "by hand", log=rank == 0)
        return comparable(decoupled.state_dict())


def by_hand(decoupled: Decoupled, folder: Path, background: bool, log: bool) -> None:
    done = decoupled.resume(folder / "c")
    said = open(folder / "log", "a") if log else None  # noqa: SIM115
    print("resumed", done, file=said, flush=True) if said else None
    for number, (x, y) in enumerate(all_batches()):
        if number >= done:
            decoupled.train_step(x, y)
            if number % EVERY == 0:
                decoupled.save(folder / "c", background=background)  # which waits for the one before
                whole = number + 1 - EVERY * background
                print("saved", max(whole, done), file=said, flush=True) if said else None


def assert_nothing_saved_is_lost(folder: Path) -> None:
    """Every attempt went on from the last save that was known to be whole, or a later one."""
    saved = 0
    for line in (folder / "log").read_text().splitlines():
        what, number = line.split()
        assert what == "saved" or int(number) >= saved, line
        saved = max(saved, int(number))


# ---------------------------------------------------------------- the fate


@contextmanager
def fate(case: Case, folder: Path) -> Iterator[None]:
    def strike() -> None:
        (folder / "killed").write_text("")
        os.kill(os.getpid(), case.signal)
        threading.Event().wait()  # until the signal is delivered

    ways = {"in a step": in_a_step, "in a save": in_a_save, "whenever": whenever}
    with ways[case.moment](case.chance("moment"), strike):
        yield


@contextmanager
def in_a_step(chance: random.Random, strike: Callable[[], None]) -> Iterator[None]:
    """Before some action of some batch."""
    batch, skipped = chance.randrange(NUM_BATCHES), chance.randrange(4)
    actions: list[Action] = []

    def hook(job: Job, action: Action) -> None:
        if job.index == batch:
            actions.append(action)
            if len(actions) > skipped:
                strike()

    with before_actions(hook):
        yield


@contextmanager
def in_a_save(chance: random.Random, strike: Callable[[], None]) -> Iterator[None]:
    """Before some step of some save."""
    left = chance.randrange(30)

    def watched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                strike()
            return function(*args, **kwargs)

        return call

    steps = [(os, "fsync"), (os, "rename"), (os, "unlink"), (storage, "write"), (Notes, "leave"), (Notes, "hear")]
    with ExitStack() as stack:
        for owner, name in steps:
            stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name))))
        yield


@contextmanager
def whenever(chance: random.Random, strike: Callable[[], None]) -> Iterator[None]:
    """At a time that nobody knows."""
    timer = threading.Timer(chance.random(), strike)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


# ---------------------------------------------------------------- ranks

QUICK = (3, 10)
SLOW = [pytest.param(Case(seed), marks=pytest.mark.slow, id=str(Case(seed))) for seed in range(22) if seed not in QUICK]


@pytest.mark.parametrize("case", [*(pytest.param(Case(seed), id=str(Case(seed))) for seed in QUICK), *SLOW])
def test_a_killed_rank(case: Case, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Under torchrun: what is left of the ranks ends, and all of them go on from the last checkpoint."""

    def start(restarts: int) -> dict[int, Any] | None:
        return launch(case.size, lambda: script(case, tmp_path), tmp_path / "logs", restarts)

    found = start(1 if case.is_restarted else 0)
    if case.moment != "whenever":
        assert (tmp_path / "killed").exists()
    if not case.is_restarted and (tmp_path / "killed").exists():
        assert found is None
        found = start(0)
    assert found is not None and len(found) == case.size
    for state in found.values():
        assert_same(state, undisturbed)
    if case.loop != "fit":
        assert_nothing_saved_is_lost(tmp_path)


# ---------------------------------------------------------------- workers of one process


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=[] if case.seed == 1 else pytest.mark.slow)
        for case in (Case(seed, "processes") for seed in range(12))
    ],
)
def test_a_killed_process_of_one_training(case: Case, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """A worker that is killed in a step ends the training with an error; the parent takes its workers along."""

    def alone() -> Any:
        try:
            return script(case, tmp_path)
        except AutodecoupleError as error:
            return str(error)

    found = run_apart(alone)
    if (tmp_path / "killed").exists():
        assert found == "killed" if case.moment != "in a step" else "the worker process of lane" in found
        found = run_apart(alone)
    else:
        assert case.moment == "whenever"
    assert_same(found, undisturbed)
    if case.loop != "fit":
        assert_nothing_saved_is_lost(tmp_path)


# ---------------------------------------------------------------- the command

SCRIPT = """
import os, signal, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import autodecouple

torch.set_num_threads(1)
torch.manual_seed(0)
layers = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.1)) for _ in range(4)]
model = nn.Sequential(*layers, nn.Linear(6, 4))
data = TensorDataset(torch.randn(30, 6), torch.randint(4, (30,)))


class Dying(DataLoader):
    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if (os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.environ.get("RANK"), number) == ("0", "1", 3):
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


options = {} if "RANK" in os.environ else {"executor": "inline"}
decoupled = autodecouple.compile(model, 2, "early_exit", example_inputs=torch.randn(8, 6), **options)
loader = Dying(data, batch_size=8, shuffle=True)
decoupled.fit(loader, 2, checkpoint=f"{sys.argv[1]}/c", save_every=1, resume=True, progress=False)
torch.save(decoupled.state_dict()["model"], f"{sys.argv[1]}/{os.environ.get('RANK', 'alone')}.pt")
"""


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_torchrun_restarts_a_script_that_only_says_resume(tmp_path: Path) -> None:
    """The second rank is killed in its first attempt; the script knows nothing of that."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    for command, name in ((torchrun, "ranks"), ([], "alone")):
        (tmp_path / name).mkdir()
        run = [sys.executable, *command, str(file), str(tmp_path / name)]
        subprocess.run(run, env=environment, check=True, timeout=150, capture_output=True)
    expected, *found = (torch.load(tmp_path / name) for name in ("alone/alone.pt", "ranks/0.pt", "ranks/1.pt"))
    for state in found:
        assert_same(state, expected)
