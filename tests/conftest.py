"""What every test shares: one thread per operator, no thread left behind, hypothesis profiles, the data folder."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# The order in which a parallel sum adds depends on the number of threads, and the last bits with it. Bitwise laws need
# that number fixed, and several stages at once on few cores run faster when each operator keeps to one.
torch.set_num_threads(1)

# A shell starts what it puts into the background with Ctrl-C ignored, and so would be its tests of Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Stages start threads and capture models: no example has a fair deadline.
settings.register_profile("dev", deadline=None, max_examples=25, print_blob=True)
settings.register_profile("ci", deadline=None, max_examples=50, print_blob=True, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


SLOW_SECONDS = 900
"""What a slow test may take where other work keeps the machine busy; hanging it may not."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            own = item.get_closest_marker("timeout")
            item.add_marker(pytest.mark.timeout(max((SLOW_SECONDS, *(own.args if own else ())))), append=False)


def _workers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("autodecouple-")}


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Fail a test that ends with worker threads running which did not run before it."""
    before = _workers()
    yield
    if not _workers() - before:
        return
    gc.collect()  # a pipeline that nobody holds any more closes itself
    deadline = time.monotonic() + 2.0
    while (left := _workers() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, f"threads left behind: {', '.join(sorted(thread.name for thread in left))}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: `$AUTODECOUPLE_DATA`, or `../shared/data` beside the checkout."""
    folder = Path(os.environ.get("AUTODECOUPLE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("data is absent")
    return folder
