"""A sheet to draw on that yields self-contained SVG: no script, no font, no reference to anything outside.

It is built as an XML tree, so whatever a name contains (`<`, `&`, `->`) is escaped. Colours stand as attributes, which
every viewer understands; a style sheet confined to the figure's own id replaces those of paper and ink in dark mode.
The figure paints its own paper, so it is legible on any page, whatever that page's theme.
"""

from __future__ import annotations

import hashlib
from xml.etree import ElementTree

from autodecouple.view import units

SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

_LIGHT = {"paper": "#ffffff", "ink": "#1f2328", "dim": "#59636e", "line": "#c4cad1", "alert": "#b3261e"}
_DARK = {"paper": "#0d1117", "ink": "#e6edf3", "dim": "#9aa4af", "line": "#3d444d", "alert": "#ff8a80"}
# Each carries white text with a contrast of at least 4.5, and neighbours differ for colour-blind eyes as well.
_STAGES = ("#2b66b1", "#a85510", "#1f7a5c", "#7b4bb3", "#a33b52", "#11707f", "#6a6a12", "#a3387f")


def stage_color(stage: int) -> str:
    return _STAGES[stage % len(_STAGES)]


def mix(color: str, other: str, share: float) -> str:
    """`color` with that share of `other` in it, both as #rrggbb."""
    pairs = [(int(color[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


class Canvas:
    """Shapes and texts in the order they are painted.

    `fill` and `stroke` are #rrggbb, or a role: paper, ink, dim, line, alert.
    """

    def __init__(self, width: float, height: float, title: str, description: str) -> None:
        # A wide figure scrolls instead of shrinking till nobody can read it.
        shrink = "max-width:100%;" if width <= 1600 else ""
        self._root = ElementTree.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg", "role": "img", "viewBox": f"0 0 {width:g} {height:g}",
                "width": f"{width:g}", "height": f"{height:g}", "style": f"{shrink}height:auto",
            },
        )  # fmt: skip
        self._say(self._root, "title", title)
        self._say(self._root, "desc", description)
        self._style = ElementTree.SubElement(self._root, "style")
        self.rect(0, 0, width, height, fill="paper", radius=8)

    def rect(
        self, x: float, y: float, width: float, height: float, *,
        fill: str = "none", stroke: str = "none", radius: float = 0, tip: str = "", **more: object,
    ) -> None:  # fmt: skip
        """`tip` is shown where the pointer rests."""
        more = {"x": x, "y": y, "width": width, "height": height, "rx": radius or None, **more}
        self._shape("rect", fill, stroke, tip, more)

    def polygon(self, points: list[tuple[float, float]], *, fill: str, **more: object) -> None:
        self._shape("polygon", fill, "none", "", {"points": " ".join(f"{x:g},{y:g}" for x, y in points), **more})

    def line(self, x1: float, y1: float, x2: float, y2: float, *, stroke: str = "line", **more: object) -> None:
        self._shape("line", "none", stroke, "", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, **more})

    def arrow(self, x1: float, y1: float, x2: float, y2: float, *, stroke: str = "dim", **more: object) -> None:
        """A line along one axis with a solid head at (x2, y2)."""
        dx, dy = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
        base_x, base_y = x2 - 7 * dx, y2 - 7 * dy
        self.line(x1, y1, base_x, base_y, stroke=stroke, stroke_width=1.5, **more)
        self.polygon([(x2, y2), (base_x - 4 * dy, base_y - 4 * dx), (base_x + 4 * dy, base_y + 4 * dx)], fill=stroke)

    def text(
        self, x: float, y: float, text: str, *, size: float = 12, fill: str = "ink", anchor: str = "start",
        mono: bool = False, bold: bool = False, width: float | None = None,
    ) -> None:  # fmt: skip
        """One line on the baseline y; one wider than `width` loses its middle and keeps it as a tip."""
        shown = text if width is None else units.shorten(text, max(1, int(width / (size * (0.61 if mono else 0.56)))))
        more: dict[str, object] = {
            "x": x, "y": y, "font_size": size, "font_family": MONO if mono else SANS,
            "font_weight": 600 if bold else None, "text_anchor": None if anchor == "start" else anchor,
        }  # fmt: skip
        element = self._shape("text", fill, "none", text if shown != text else "", more)
        # The tip, where there is one, is the first child: what follows it is its tail.
        if len(element):
            element[0].tail = units.clean(shown)
        else:
            element.text = units.clean(shown)

    def finish(self) -> str:
        """The figure as text, with an id made from its content, so that two figures on a page never meet."""
        content = ElementTree.tostring(self._root, encoding="unicode")
        name = f"ad-{hashlib.sha256(content.encode()).hexdigest()[:10]}"
        self._root.set("id", name)
        rules = (
            f"#{name} .ad-{part}-{role}{{{part}:{color}}}"
            for role, color in _DARK.items()
            for part in ("fill", "stroke")
        )
        self._style.text = f"@media (prefers-color-scheme: dark){{{''.join(rules)}}}"
        return ElementTree.tostring(self._root, encoding="unicode")

    def _shape(self, tag: str, fill: str, stroke: str, tip: str, more: dict[str, object]) -> ElementTree.Element:
        values = {key.replace("_", "-"): _number(value) for key, value in more.items() if value is not None}
        roles = [f"ad-{part}-{value}" for part, value in (("fill", fill), ("stroke", stroke)) if value in _LIGHT]
        if roles:
            values["class"] = " ".join(roles)
        values["fill"] = _LIGHT.get(fill, fill)
        if stroke != "none":
            values["stroke"] = _LIGHT.get(stroke, stroke)
        element = ElementTree.SubElement(self._root, tag, values)
        if tip:
            self._say(element, "title", tip)
        return element

    @staticmethod
    def _say(parent: ElementTree.Element, tag: str, text: str) -> None:
        ElementTree.SubElement(parent, tag).text = units.clean(text)


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
