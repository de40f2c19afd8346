"""Compilations one at a time, and none while another lane is inside compiled code.

torch.compile says in a variable of the whole process that it is tracing, and compiled code refuses to run while it is
set, in whatever thread.

    lane 0   run run [ compile ] run ...
    lane 1   run run             run run ...        waits for lane 0's compilation, and lane 0 for its call before that
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """Many may share, or one may be alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody shares; who comes meanwhile waits. Not to be entered from within `shared`."""
        with self._changed:
            self._changed.wait_for(lambda: self._sharing == 0)
            yield
