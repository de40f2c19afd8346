"""Local losses: what a stage's head optimises instead of waiting for the next stage's gradient."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from autodecouple.errors import InputError
from autodecouple.objectives.associated import Associated
from autodecouple.objectives.auto import Auto
from autodecouple.objectives.backprop import Backprop
from autodecouple.objectives.deinforeg import DeInfoReg
from autodecouple.objectives.dgl import DGL
from autodecouple.objectives.downstream import Downstream
from autodecouple.objectives.early_exit import EarlyExit
from autodecouple.objectives.infonce import InfoNCE
from autodecouple.objectives.infopro import InfoPro
from autodecouple.objectives.loco import LoCo
from autodecouple.objectives.objective import Objective
from autodecouple.objectives.predsim import PredSim
from autodecouple.objectives.supcon import SupCon

__all__ = [
    "DGL",
    "OBJECTIVES",
    "Associated",
    "Auto",
    "Backprop",
    "DeInfoReg",
    "Downstream",
    "EarlyExit",
    "InfoNCE",
    "InfoPro",
    "LoCo",
    "Objective",
    "PredSim",
    "SupCon",
    "resolve",
]

KINDS: tuple[type[Objective], ...] = (
    SupCon, DeInfoReg, EarlyExit, PredSim, DGL, InfoPro, InfoNCE, Associated, LoCo, Downstream, Auto, Backprop,
)  # fmt: skip

OBJECTIVES: dict[str, Callable[[], Objective]] = {str(kind.name): kind for kind in KINDS}
"""What `loss=` takes by name; called, each gives the objective with its defaults."""


def resolve(loss: str | Objective | Sequence[str | Objective], num_hidden: int) -> tuple[Objective, ...]:
    """One objective per hidden stage (every stage but the last): one alone is repeated, several must be as many.

    Raises InputError for an unknown name, something that is not an objective, or a wrong number of them.
    """
    if isinstance(loss, str) or not isinstance(loss, Sequence):
        return (_one(loss),) * num_hidden
    if len(loss) != num_hidden:
        raise InputError(
            f"loss has {len(loss)} objectives, but {num_hidden + 1} stages have {num_hidden} hidden ones; "
            "the last stage has the criterion. Pass one for all, or one per hidden stage"
        )
    return tuple(_one(item) for item in loss)


def _one(loss: object) -> Objective:
    if isinstance(loss, str):
        return _named(loss)
    if isinstance(loss, type) and hasattr(loss, "head"):
        raise InputError(f"loss={loss.__name__} is a class; pass an objective: {loss.__name__}()")
    if not all(hasattr(loss, part) for part in ("name", "encodes", "head")):
        raise InputError(
            f"loss={loss!r} is no objective: it needs name, encodes and head(features, signal), "
            f"or pass a name: {', '.join(OBJECTIVES)}"
        )
    return loss  # type: ignore[return-value]


PAPERS = {
    "scpl": "supcon",
    "al": "associated",
    "associated learning": "associated",
    "gim": "infonce",
    "greedy infomax": "infonce",
    "auglocal": "downstream",
    "branchynet": "early_exit",
    "cross_entropy": "early_exit",
    "backprop": "bp",
    "backpropagation": "bp",
}
"""What the papers call some of them."""


def _named(name: str) -> Objective:
    if name in OBJECTIVES:
        return OBJECTIVES[name]()
    close = difflib.get_close_matches(name.lower(), [*OBJECTIVES, *PAPERS], n=1)
    hint = f"did you mean {PAPERS.get(close[0], close[0])!r}? " if close else ""
    if "," in name:
        hint = f"did you mean a list, {[each.strip() for each in name.split(',')]}? "
    raise InputError(f"loss={name!r} is not known; {hint}There are: {', '.join(OBJECTIVES)}")
