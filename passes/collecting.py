"""Python's collector of cycles, out of the way."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No collection meanwhile; also a decorator.

    What planning makes lives on and holds no cycles, but there is so much of it that the collector would walk over the
    whole captured graph, again and again: as long as all the rest together.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
