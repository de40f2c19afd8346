"""Python's collector of cycles, out of the way."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No collection meanwhile; also a decorator.

    What planning makes lives on and holds no cycles, but there is so much of it that the collector would walk over the
    whole captured graph, again and again: as long as all the rest together. So it is old at once: frozen and melted,
    unless the caller has frozen something of its own.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()
