"""The state in which a model is captured, set for a while and given back: mode, autocast, caches, loggers."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.export import _trace
from torch.nn.modules import transformer
from torch.nn.modules.batchnorm import _BatchNorm

Setting = tuple[Any, str, Any]
"""An object, the name of an attribute, and the value that it shall have."""

NOT_SYNCED: Setting = (nn.SyncBatchNorm, "forward", _BatchNorm.forward)
"""Where torch.distributed is initialised, SyncBatchNorm would talk to other ranks: replicas are a stage's, not ours."""

_CALL = "_compiled_call_impl"
"""Where nn.Module looks for a compiled form of its call."""

_lock = threading.Lock()
_originals: dict[tuple[int, str], list[Any]] = {}  # what is held now: [how often, the value it had]


@contextlib.contextmanager
def held(settings: Iterable[Setting]) -> Iterator[None]:
    """Let attributes have these values for a while, in several threads at once if need be.

    They come back when the last holder ends; an attribute that somebody else has set meanwhile stays as it is.
    """
    settings = tuple(settings)
    with _lock:
        for owner, name, value in settings:
            _originals.setdefault((id(owner), name), [0, getattr(owner, name)])[0] += 1
            setattr(owner, name, value)
    try:
        yield
    finally:
        with _lock:
            for owner, name, value in settings:
                _release(owner, name, value)


def _release(owner: Any, name: str, value: Any) -> None:
    entry = _originals[id(owner), name]
    entry[0] -= 1
    if entry[0]:
        return
    del _originals[id(owner), name]
    if getattr(owner, name) == value:
        setattr(owner, name, entry[1])


@contextlib.contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the model into one mode for a while; parts that the user froze with .eval() stay frozen in training."""
    before = {module: module.training for module in model.modules()}
    try:
        if not training or not model.training:
            model.train(training)
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


@contextlib.contextmanager
def symbolic(model: nn.Module) -> Iterator[None]:
    """Let what only looks like a decision on data stay open.

    `len(x)` in the model's own files gives the free size; nn.Transformer does not look whether a mask is causal, which
    is a hint to the kernel: the mask itself is applied anyway.
    """
    files = {type(module).__module__ for module in model.modules()}
    with contextlib.ExitStack() as stack:
        for name in files - {name for name in files if name.startswith("torch.")}:
            stack.enter_context(mock.patch.dict(vars(sys.modules[name]), {"len": _length}))
        stack.enter_context(mock.patch.object(transformer, "_detect_is_causal_mask", _is_said_to_be_causal))
        yield


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else len(value)


def _is_said_to_be_causal(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Export in a neutral state: the caller's autocast and no_grad must not be baked into the graph."""
    with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        for kind in {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def cache_settings(model: nn.Module) -> list[Setting]:
    """Models of transformers return a cache of keys and values by default, which no graph can hold: switch it off."""
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    found = [(config, name) for config in configs.values() for name in _CACHES]
    return [(config, name, False) for config, name in found if getattr(config, name, False) is True]


_CACHES = ("use_cache", "use_mems_eval", "use_mems_train")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's loggers and graph dumps off the terminal: what a failed export has to say is in the error.

    They speak as usual where the environment asks for them (TORCH_LOGS).
    """
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    found = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.split(".")[0] == "torch"]
    with (
        held((logger, "disabled", True) for logger in found),
        mock.patch.object(_trace, "print", lambda *_, **__: None, create=True),
    ):
        yield


@contextlib.contextmanager
def called_instead(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let a call of the module, hooks included, call the function instead for a while.

    `module._call_impl` is still the call itself.
    """
    before = vars(module).get(_CALL)
    setattr(module, _CALL, function)
    try:
        yield
    finally:
        delattr(module, _CALL)
        if before is not None:
            setattr(module, _CALL, before)
