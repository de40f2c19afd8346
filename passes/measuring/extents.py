"""From where to where modules run."""

from __future__ import annotations

from collections.abc import Sequence


class Extents:
    """The first and last position at which each module runs.

    paths: by operations, the modules that it runs in, outermost first
    """

    def __init__(self, paths: Sequence[Sequence[str]]) -> None:
        self._paths = paths
        self._first: dict[str, int] = {}
        self._last: dict[str, int] = {}
        for position, path in enumerate(self._paths):
            for name in path:
                self._first.setdefault(name, position)
                self._last[name] = position

    def whole(self, start: int, stop: int) -> tuple[str, ...]:
        """The modules whose forward lies wholly in [start, stop), in order and none within another."""
        outermost = (
            next((name for name in path if name and start <= self._first[name] and self._last[name] < stop), "")
            for path in self._paths[start:stop]
        )
        return tuple(dict.fromkeys(filter(None, outermost)))
