"""Every entry of the zoo."""

from __future__ import annotations

import functools
from importlib import import_module

from zoo.entry import Entry

SOURCES = (
    *("torchvision_models", "timm_models", "transformers_models", "transformers_media"),
    *("recurrent", "dense", "audio", "graphs", "sequences", "functions", "awkward", "states", "interfaces"),
)


@functools.cache
def catalogue() -> tuple[Entry, ...]:
    found = [entry for source in SOURCES for entry in import_module(f"zoo.{source}").entries()]
    names = [entry.name for entry in found]
    assert len(set(names)) == len(names), "two entries have one name"
    return tuple(found)
