"""Train any model in gradient-isolated stages, pipelined without bubbles.

decoupled = autodecouple.compile(model, n_stages=4, loss="supcon")
for x, y in loader:
    step = decoupled.train_step(x, y)
model = decoupled.model
"""

import importlib
from typing import TYPE_CHECKING, Any

from autodecouple._version import __version__

if TYPE_CHECKING:
    from autodecouple.api import capture, compile, plan, simulate
    from autodecouple.decoupled import Decoupled
    from autodecouple.devices import Device
    from autodecouple.objectives import Associated, DeInfoReg, Downstream, EarlyExit, SupCon
    from autodecouple.plans import Plan
    from autodecouple.replication import DataParallel
    from autodecouple.timeline import Timeline

__all__ = [
    "Associated",
    "DataParallel",
    "DeInfoReg",
    "Decoupled",
    "Device",
    "Downstream",
    "EarlyExit",
    "Plan",
    "SupCon",
    "Timeline",
    "__version__",
    "capture",
    "compile",
    "plan",
    "simulate",
]

# Names are fetched when first used: `autodecouple --help` should not wait for torch.
_HOMES = {
    "api": ("capture", "compile", "plan", "simulate"),
    "decoupled": ("Decoupled",),
    "devices": ("Device",),
    "objectives": ("Associated", "DeInfoReg", "Downstream", "EarlyExit", "SupCon"),
    "plans": ("Plan",),
    "replication": ("DataParallel",),
    "timeline": ("Timeline",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
