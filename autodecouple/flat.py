"""A state as one flat dict of tensors and plain data, each under a name that does not depend on the cuts.

model.<name>  heads.<node at the cut>.<name>  optim.<parameter's key>.<state>  gradients.<parameter's key>
random.cpu  random.cuda.<index>  stages.<index>  loops.<rank>  progress
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

PLAIN = ("format", "step", "seed", "plan")


def flatten(state: Mapping[str, Any]) -> dict[str, Any]:
    """One name per tensor, and per stage for plain data; a tensor under several names stands there once."""
    aliases = _aliases(state["model"])
    flat = {f"model.{name}": value for name, value in state["model"].items() if name not in aliases}
    flat |= {f"heads.{place}.{k}": value for place, head in state["heads"].items() for k, value in head.items()}
    for key, entry in state["optim"].items():
        own = [name for name, value in entry.items() if isinstance(value, torch.Tensor) and "." not in str(name)]
        flat |= {f"optim.{key}.{name}": entry[name] for name in own}
        if len(own) < len(entry):
            flat[f"optim.{key}"] = {name: value for name, value in entry.items() if name not in own}
    flat |= {f"gradients.{key}": value for key, value in state["gradients"].items()}
    flat |= {f"stages.{index}": stage for index, stage in enumerate(state["stages"])}
    flat |= {f"random.cuda.{index}": value for index, value in enumerate(state["random"]["cuda"])}
    flat |= {f"loops.{rank}": loop for rank, loop in state.get("loops", {}).items()}
    flat["random.cpu"] = state["random"]["cpu"]
    flat["progress"] = {name: state[name] for name in PLAIN} | {"aliases": aliases, "heads": list(state["heads"])}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `flatten` was given; raises KeyError for what lacks a part."""
    sections: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in flat.items():
        section, _, rest = name.partition(".")
        sections[section][rest] = value
    progress = sections["progress"][""]
    model = sections["model"]
    model |= {name: model[first] for name, first in progress["aliases"].items()}
    random, stages, loops = sections["random"], sections["stages"], sections["loops"]
    return {
        **{name: progress[name] for name in PLAIN},
        "model": model,
        "heads": _heads(sections["heads"], progress["heads"]),
        "optim": _memories(sections["optim"]),
        "gradients": sections["gradients"],
        "stages": [stages[str(index)] for index in range(len(stages))],
        "random": {"cpu": random["cpu"], "cuda": [random[f"cuda.{index}"] for index in range(len(random) - 1)]},
        **({"loops": {int(rank): loop for rank, loop in loops.items()}} if loops else {}),
    }


def _aliases(model: Mapping[str, Any]) -> dict[str, str]:
    """Further names of tensors that are the same memory, each with the first name."""
    first: dict[Any, str] = {}
    aliases = {}
    for name, value in model.items():
        place = place_of(value)
        if place is not None and (known := first.setdefault(place, name)) != name:
            aliases[name] = known
    return aliases


def place_of(value: Any) -> Any:
    """The memory that a tensor is; None for what has none."""
    if not isinstance(value, torch.Tensor) or not value.numel():
        return None
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def _heads(section: Mapping[str, Any], places: Iterable[str]) -> dict[str, dict[str, Any]]:
    """By place, which is the name of a node and holds no dot; a head without tensors has only that."""
    heads: dict[str, dict[str, Any]] = {place: {} for place in places}
    for rest, value in section.items():
        place, _, name = rest.partition(".")
        heads[place][name] = value
    return heads


def _memories(section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By parameter: tensors stand under names of their own, without dots, and all else in one dict."""
    memories: dict[str, dict[str, Any]] = defaultdict(dict)
    for rest, value in section.items():
        if isinstance(value, torch.Tensor):
            key, _, name = rest.rpartition(".")
            memories[key][name] = value
        else:
            memories[rest] |= value
    return dict(memories)
