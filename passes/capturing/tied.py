"""Parameters with several names: they tie ends of a network together, and `untie` parts them.

Between two uses of one parameter no cut is legal: `lm_head.weight is embedding.weight` leaves a language model none.

    embedding -- layers -- head        embedding -- layers -- head
        +------ weight ------+             weight             weight
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autodecouple.errors import InputError

Names = tuple[str, ...]


def tied_names(model: nn.Module) -> tuple[Names, ...]:
    """The names of each trainable parameter that has several, in the model's order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def way_out(model: nn.Module, name: str) -> str:
    """What can be done about a trainable parameter that is used on both sides of a wished cut."""
    group = next((group for group in tied_names(model) if name in group), ())
    if not group:
        return (
            f'{name!r} is one parameter under one name that the forward uses several times, so tied="untie" cannot'
            " part it: cut elsewhere, or make a module for each use"
        )
    return (
        f'it has the names {_listed(group)}; tied="untie" makes them {len(group)} parameters, which start equal and'
        " train apart"
    )


@dataclass(frozen=True)
class Untied:
    """What `untie` did to a model, and the way back.

    names: of each parameter that was tied, those that are parameters of their own now
    """

    model: nn.Module
    names: tuple[Names, ...]
    before: tuple[_Slot, ...]

    def tie(self) -> None:
        """Put the same objects back under all names; what the other names have learned since is lost."""
        _restore(self.before)

    def tie_unused(self, used: Collection[str]) -> Untied:
        """Let names that no operation reads share the first parameter of their group that one does read.

        They would hold values that nothing trains, like the `shared` table of a translator whose two ends each have
        their own name for it. used: the names that the captured graph of the untied model reads
        """
        parted = []
        for group in self.names:
            apart = tuple(name for name in group if name in used) or group[:1]
            for name in set(group) - set(apart):
                _assign(self.model, name, self.model.get_parameter(apart[0]))
            parted.append(apart)
        return dataclasses.replace(self, names=tuple(group for group in parted if len(group) > 1))

    @property
    def note(self) -> str:
        """One sentence or two for the plan's warnings."""
        if not self.names:
            return 'tied="untie" changed nothing: no two names of one trainable parameter are both used'
        sentences = [f"untied, so that they train apart from equal values: {'; '.join(map(_listed, self.names))}"]
        if any(_ties_itself(module) for module in self.model.modules()):
            sentences.append(
                "The model's config.tie_word_embeddings is still true, so that tie_weights(), or loading the saved"
                " model, may tie them again: set it to False"
            )
        return ". ".join(sentences)


def untie(model: nn.Module) -> Untied:
    """Give each name of a trainable parameter a Parameter of its own, in place: same values, same `state_dict` keys.

    The first name keeps its Parameter, which is the one that optimizers made before know; the others get copies with
    its attributes and hooks. A module under two names runs the same parameters under both: each further name gets a
    copy of the module. Buffers and frozen parameters stay shared. Raises InputError, and leaves the model as it was,
    where something cannot be copied or stays tied.
    """
    names = tied_names(model)
    before = [_slot(model, name) for group in names for name in group]
    try:
        with torch.inference_mode(False), torch.no_grad():
            _part_modules(model, "", {id(model)}, model, before)
            for group in tied_names(model):
                for name in group[1:]:
                    _assign(model, name, _copy(model.get_parameter(name), {}, f"parameter {name!r}"))
        if left := tied_names(model):
            raise InputError(f'tied="untie" cannot part {_listed(left[0])}: {type(model).__name__} ties them itself')
    except BaseException:
        _restore(before)
        raise
    return Untied(model, names, tuple(before))


@contextlib.contextmanager
def untied(model: nn.Module) -> Iterator[Untied]:
    """Untie for a while; afterwards the model holds the same objects as before, whatever was raised."""
    parted = untie(model)
    try:
        yield parted
    finally:
        parted.tie()


@dataclass(frozen=True)
class _Slot:
    """An attribute of a module, and the parameter or module that it held."""

    owner: nn.Module
    key: str
    value: Any


def _slot(model: nn.Module, name: str) -> _Slot:
    path, _, key = name.rpartition(".")
    owner = model.get_submodule(path)
    return _Slot(owner, key, getattr(owner, key))


def _assign(model: nn.Module, name: str, value: Any) -> None:
    """By setattr, not in the module's dict: recurrent layers keep lists of their parameters up to date there."""
    slot = _slot(model, name)
    setattr(slot.owner, slot.key, value)


def _restore(slots: Collection[_Slot]) -> None:
    for slot in slots:
        setattr(slot.owner, slot.key, slot.value)


def _part_modules(module: nn.Module, path: str, seen: set[int], model: nn.Module, before: list[_Slot]) -> None:
    """Replace each module that holds trainable parameters, and was seen under another name, by a copy of its own."""
    for key, child in list(module._modules.items()):
        if child is None:
            continue
        name = f"{path}.{key}".lstrip(".")
        if id(child) in seen:
            if not any(p.requires_grad for p in child.parameters()):
                continue
            before.append(_Slot(module, key, child))
            child = _copy_module(child, name, model)
            setattr(module, key, child)
        seen.add(id(child))
        _part_modules(child, name, seen, model, before)


def _copy_module(module: nn.Module, name: str, model: nn.Module) -> nn.Module:
    """A copy with parameters of its own; buffers, frozen parameters and modules outside of it stay the same objects."""
    inside = set(module.modules())
    memo: dict[int, Any] = {id(other): other for other in model.modules() if other not in inside}
    memo |= {id(buffer): buffer for buffer in module.buffers()}
    for key, parameter in module.named_parameters():
        trainable = parameter.requires_grad
        memo[id(parameter)] = _copy(parameter, {}, f"parameter {f'{name}.{key}'!r}") if trainable else parameter
    copied: nn.Module = _copy(module, memo, f"module {name!r}, which has two names")
    return copied


def _copy(value: Any, memo: dict[int, Any], what: str) -> Any:
    try:
        copied = copy.deepcopy(value, memo)
    except Exception as error:
        raise InputError(
            f'tied="untie" must copy {what}, but {type(error).__name__}: {error}. Part the names'
            ' in the model itself, or leave them together with tied="together"'
        ) from error
    if isinstance(value, nn.Parameter):
        _carry_over(value, copied)
    return copied


def _carry_over(parameter: Any, copied: Any) -> None:
    """What a user hung on a parameter, and its copy in torch leaves out: attributes and hooks."""
    for key, value in vars(parameter).items():
        vars(copied).setdefault(key, value)
    for hook in (parameter._backward_hooks or {}).values():
        copied.register_hook(hook)
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
        copied.register_post_accumulate_grad_hook(hook)


def _ties_itself(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "tie_word_embeddings", False))


def _listed(names: Names) -> str:
    shown = [repr(name) for name in names[:4]]
    return " = ".join(shown) + (f" and {len(names) - 4} more names" if len(names) > 4 else "")
