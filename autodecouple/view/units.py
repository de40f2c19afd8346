"""Numbers as people read them, and names that are safe to show."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_UNPRINTABLE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def amount(value: float) -> str:
    """Three digits and a decimal prefix: `1.23 M`, `45.6 k`, `7`."""
    return _scaled(value, 1000.0, _PREFIXES)


@dataclass(frozen=True)
class Scale:
    """One unit and one number of decimals for a column of numbers, so that they compare at a glance."""

    prefix: str
    decimals: int

    @staticmethod
    def of(largest: float) -> Scale:
        """Three digits for the largest entry."""
        index = next((i for i in reversed(range(len(_PREFIXES))) if largest >= 1000**i), 0)
        whole = len(f"{largest / 1000**index:.0f}")
        return Scale(_PREFIXES[index], max(0, 3 - whole) if index else 0)

    @property
    def of_seconds(self) -> str:
        """The unit of a column of nanoseconds."""
        return {"": "ns", "k": "µs", "M": "ms", "G": "s"}.get(self.prefix, f"{self.prefix}ns")

    def __call__(self, value: float) -> str:
        return f"{value / 1000 ** _PREFIXES.index(self.prefix):,.{self.decimals}f}"


def flops(value: float) -> str:
    return _scaled(value, 1000.0, tuple(f"{prefix}FLOP" for prefix in _PREFIXES))


def size(num_bytes: float) -> str:
    """`12.0 MiB`, the units that `--max-memory` takes."""
    return _scaled(num_bytes, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def duration(seconds: float) -> str:
    """`1.25 ms`."""
    magnitude = abs(seconds)
    if magnitude == 0:
        return "0 s"
    if magnitude >= 1:
        return f"{seconds:,.{max(0, 3 - len(f'{magnitude:.0f}'))}f} s"
    return _scaled(seconds * 1e9, 1000.0, ("ns", "µs", "ms", "s"))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def count(number: int, noun: str) -> str:
    """`1 stage`, `1,500 spans`, `32 batches`."""
    plural = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def shorten(text: str, width: int) -> str:
    """At most `width` characters: the middle goes, since names differ at their ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def clean(text: str) -> str:
    """Without control characters and lone surrogates: XML and UTF-8 cannot hold them, terminals would obey them."""
    return _UNPRINTABLE.sub("\ufffd", text)


def _scaled(value: float, step: float, units: tuple[str, ...]) -> str:
    index = 0
    # 999.5 would print as 1000 of the smaller unit, so it moves to the next one already.
    while abs(value) >= step - 0.5 and index < len(units) - 1:
        value, index = value / step, index + 1
    decimals = 0 if index == 0 and float(value).is_integer() else max(0, 3 - len(f"{abs(value):.0f}"))
    return f"{value:.{decimals}f} {units[index]}".rstrip()
