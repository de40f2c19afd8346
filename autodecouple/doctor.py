"""What an issue needs to know of a machine; no paths, no names of hosts or users."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from autodecouple._version import __version__

PACKAGES = (
    "networkx", "click", "rich", "jinja2", "torchvision", "timm", "transformers", "scikit-learn", "skorch", "lightning",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """Versions, threads, accelerators and which of them reach each other's memory directly; imports torch."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "autodecouple": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "accelerator": accelerator.type if accelerator else None,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "devices": _devices(),
        "peer_access": _peer_access(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def report(found: dict[str, Any]) -> str:
    """The same, as lines to paste."""
    return "\n".join(f"{key + ':':<17}{_line(value)}".rstrip() for key, value in found.items())


def _line(value: Any) -> str:
    match value:
        case None:
            return "none"
        case dict():
            return ", ".join(f"{name} {version}" for name, version in value.items())
        case list():
            return "; ".join(map(_line, value)) or "none"
        case _:
            return str(value)


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"cuda:{i} {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}" for i, p in enumerate(found)]


def _peer_access() -> list[str]:
    """Pairs of devices that copy to each other without passing through the host."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    return [f"cuda:{a} -> cuda:{b}" for a, b in pairs if torch.cuda.can_device_access_peer(a, b)]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
