"""What a command line names: models (`package.module:factory`, `torchvision:resnet18`, ...) and their inputs.

Resolving a target runs its code. Nothing here imports torch before it is needed.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from autodecouple.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMS = "package.module:factory, path/to/file.py:factory, torchvision:NAME, timm:NAME or hf:CONFIG"
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")


@dataclass(frozen=True)
class InputShape:
    """One `--input`: `8x3x32x32`, `8x128:int64`, or `input_ids=8x128:int64` for a keyword input."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    name: str | None = None

    @staticmethod
    def parse(text: str) -> InputShape:
        match = re.fullmatch(r"(?:([A-Za-z_]\w*)=)?(\d+(?:x\d+)*)(?::(\w+))?", text)
        if match is None:
            raise InputError(f"{text!r} is not an input; write 8x3x32x32, 8x128:int64 or input_ids=8x128:int64")
        name, sizes, dtype = match.groups()
        if dtype and dtype not in DTYPES:
            raise InputError(f"{text!r}: no dtype is called {dtype!r}; choose one of {', '.join(DTYPES)}")
        shape = tuple(map(int, sizes.split("x")))
        if 0 in shape:
            raise InputError(f"{text!r}: every size must be 1 or more")
        return InputShape(shape, dtype or "float32", name)

    def tensor(self) -> torch.Tensor:
        """On the meta device: a shape and a dtype without memory."""
        import torch

        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="meta")


def parse_bytes(text: str) -> int:
    """`4GiB`, `500MB`, `1e9`: bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?) ?(?:([kMGT])(i?)B?|B)?", text)
    if match is None:
        raise InputError(f"{text!r} is not a memory size; write 4GiB, 500MB or a number of bytes")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix or " "))


def example_inputs(inputs: Sequence[InputShape]) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor]:
    """Positional inputs as a tuple, named ones as a dict; raises InputError where they are mixed or repeated."""
    names = [item.name for item in inputs if item.name is not None]
    if not names:
        return tuple(item.tensor() for item in inputs)
    if len(names) < len(inputs):
        raise InputError(f"inputs are all named or none is; named: {', '.join(names)}")
    if len(set(names)) < len(names):
        raise InputError(f"an input is named twice: {', '.join(names)}")
    return {name: item.tensor() for name, item in zip(names, inputs, strict=True)}


def load(target: str, *, weightless: bool = False) -> nn.Module:
    """The model that `target` names, built without downloading weights; its code is executed.

    weightless: a model of a zoo need not fit into memory; it is built on the meta device where its constructor allows
    Raises InputError where the target does not exist or is no model; what the target's own code raises passes through.
    """
    kind, separator, name = target.partition(":")
    if not separator or not kind or not name:
        raise InputError(f"{target!r} is not a target; write {FORMS}")
    zoo = _ZOOS.get(kind)
    if zoo is None:
        return _from_module(target)
    return _on_meta(zoo, name) if weightless else zoo(name)


def _from_module(target: str) -> nn.Module:
    from torch import nn

    source, _, name = target.rpartition(":")
    value: Any = _import(source)
    for part in name.split("."):
        value = _attribute(value, part, target)
    made = value
    if not isinstance(value, nn.Module) and callable(value):
        try:
            made = value()
        except BaseException as error:
            error.add_note(f"raised by {target}, which autodecouple calls without arguments to get the model")
            raise
    if not isinstance(made, nn.Module):
        raise InputError(
            f"{target!r} gives {type(made).__name__}, not a torch.nn.Module; name a function that returns one"
        )
    return made


def _import(source: str) -> ModuleType:
    """A module by its dotted name, or from a file; the current directory can be imported from, as under `python -m`."""
    if source.endswith(".py"):
        return _import_file(Path(source))
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        # A module missing inside the user's code is theirs to see, with its traceback.
        if error.name is None or not f"{source}.".startswith(f"{error.name}."):
            raise
        raise InputError(f"no module is called {error.name!r} (looked for {source!r}); targets are {FORMS}") from error


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"no file is called {str(path)!r}")
    # Its neighbours can be imported, as when the file is run; it stands in sys.modules, as dataclasses and pickle need.
    sys.path.insert(0, str(path.resolve().parent))
    name = path.stem if path.stem not in sys.modules else f"_autodecouple_target_{path.stem}"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _attribute(owner: Any, name: str, target: str) -> Any:
    if hasattr(owner, name):
        return getattr(owner, name)
    near = difflib.get_close_matches(name, [n for n in vars(owner) if not n.startswith("_")])
    raise InputError(f"{target!r}: there is no {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")


def _torchvision(name: str) -> nn.Module:
    models = _package("torchvision.models", "vision")
    _check_name("torchvision", name, models.list_models())
    model: nn.Module = models.get_model(name, weights=None)
    return model


def _timm(name: str) -> nn.Module:
    timm = _package("timm", "vision")
    if not timm.is_model(name):  # which knows tags such as resnet50.a1_in1k
        _check_name("timm", name, timm.list_models())
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _hf(config: str) -> nn.Module:
    """A classifier from a config.json, or from the defaults of a model type such as `bert`."""
    transformers = _package("transformers", "nlp")
    path = Path(config)
    if path.exists():
        made = transformers.AutoConfig.from_pretrained(path)
    else:
        _check_name("hf", config, list(transformers.CONFIG_MAPPING))
        made = transformers.AutoConfig.for_model(config)
    model: nn.Module = transformers.AutoModelForSequenceClassification.from_config(made)
    return model


_ZOOS: dict[str, Callable[[str], nn.Module]] = {"torchvision": _torchvision, "timm": _timm, "hf": _hf}


def _on_meta(zoo: Callable[[str], nn.Module], name: str) -> nn.Module:
    import torch

    try:
        with torch.device("meta"):
            return zoo(name)
    except (NotImplementedError, RuntimeError):  # a constructor that reads the values of its weights
        return zoo(name)


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:
            raise
        raise InputError(f"{package} is not installed; run: pip install 'autodecouple[{extra}]'") from error


def _check_name(kind: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise InputError(f"{kind} has no model called {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
