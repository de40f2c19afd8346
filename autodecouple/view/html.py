"""Plans and timelines in a notebook, and as a page of one file."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from autodecouple.plans import Plan
from autodecouple.timeline import Timeline
from autodecouple.view import units
from autodecouple.view.summary import summarize
from autodecouple.view.svg import draw


def mimebundle(value: Plan | Timeline) -> dict[str, str]:
    """What a notebook chooses from: a table, the figure above its tables, and the figure alone.

    Inline SVG is better while a notebook is live; where it is re-published often only the SVG by itself survives.
    """
    figure = draw(value)
    return {"text/plain": str(value), "text/html": _fragment(value, figure), "image/svg+xml": figure}


def page(value: Plan | Timeline, title: str = "autodecouple") -> str:
    """A whole HTML page that refers to nothing outside itself."""
    body = Markup(_fragment(value, draw(value)))
    return _environment().get_template("page.html.j2").render(title=title, body=body)


def _fragment(value: Plan | Timeline, figure: str) -> str:
    template = _environment().get_template("fragment.html.j2")
    return template.render(figure=Markup(figure), summary=summarize(value))


@cache
def _environment() -> Environment:
    loader = PackageLoader("autodecouple.view", package_path="")
    return Environment(loader=loader, autoescape=True, finalize=_clean, undefined=StrictUndefined, trim_blocks=True)


def _clean(value: object) -> object:
    return value if isinstance(value, Markup) else units.clean(str(value))
