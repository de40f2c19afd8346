"""Which line of the user's, and which of the model's modules, an error comes from."""

from __future__ import annotations

import inspect
import linecache
import os
import re
import traceback
from types import FrameType

import torch
from torch import nn

from autodecouple.errors import TraceError
from autodecouple.passes.capturing.observe import OpaqueError
from autodecouple.passes.capturing.untraced import LostError

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_OWN = tuple(os.path.join(folder, "") for folder in (os.path.dirname(torch.__file__), _PACKAGE))

WAYS_OUT = (
    "  A graph needs the same operations for every batch. Ways out: replace Python control flow on tensor values"
    " (`if tensor:`, `.item()`, loops over data) by tensor operations such as torch.where; pass options that decide it"
    " as constants; put that part into a submodule, which then runs whole; or, where only the training mode needs it,"
    ' capture the evaluation mode, mode="eval".'
)


def explain(model: nn.Module, error: Exception, refused: dict[str, str]) -> TraceError:
    """Which line stopped the capture, and what can be done about it.

    refused: why modules around that line cannot run whole, by their path
    """
    place = user_line(error)
    where = f"\n  at {place}" if place else ""
    tried = "".join(f"\n  {path!r} cannot run whole instead: {reason}" for path, reason in list(refused.items())[:3])
    return TraceError(
        f"cannot capture {type(model).__name__} as a graph: {first_line(error)}{where}{tried}\n{WAYS_OUT}"
    )


def first_line(error: BaseException) -> str:
    """Type and first line of an error, without the pages that torch puts below."""
    lines = (line.strip() for line in str(error).splitlines())
    first = next((line for line in lines if line), "")
    name = type(error).__name__
    if isinstance(error, (LostError, OpaqueError)):
        return first
    return f"{name}: {first[:300]}" if first else name


def reason(error: Exception) -> str:
    """In one line: what, and at which line of the user's."""
    place = user_line(error)
    return f"{first_line(error)} ({place})" if place else first_line(error)


def user_line(error: BaseException) -> str:
    """The innermost frame outside torch and this package, as file:line with its source; "" if there is none."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not os.path.abspath(frame.filename).startswith(_OWN) and not frame.filename.startswith("<")
    ]
    if not frames:
        return ""
    frame = frames[-1]
    source = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{frame.filename}:{frame.lineno}: {source}"


def modules_of(model: nn.Module, error: BaseException) -> list[str]:
    """Paths of the modules in whose methods the error was raised, innermost first; the model itself is "".

    While torch.export traces, `self` is a proxy that shares the module's attributes: they tell which one it is.
    """
    paths = {id(vars(module)): path for path, module in model.named_modules()}
    owners = [_owner(frame) for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [paths[id(vars(m))] for m in owners if m is not None and id(vars(m)) in paths]
    named = re.search(r"model attribute: ([\w.]+)", str(error))  # found only after the trace: no frame tells
    found += [path for path in paths.values() if named and path and named[1].startswith(f"{path}.")]
    return list(dict.fromkeys(reversed(found)))


def _owner(frame: FrameType) -> nn.Module | None:
    """The module whose method runs in a frame; one that is an argument of a function is none."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if not isinstance(first, nn.Module):
        return None
    method = inspect.unwrap(getattr(type(first), code.co_name, _owner))
    return first if code.co_varnames[0] == "self" or getattr(method, "__code__", None) is code else None
