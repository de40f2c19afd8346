"""Plans and timelines as self-contained SVG figures."""

from __future__ import annotations

from autodecouple.plans import Plan
from autodecouple.timeline import Timeline
from autodecouple.view.gantt import timeline_svg
from autodecouple.view.strip import plan_svg

__all__ = ["draw", "plan_svg", "timeline_svg"]


def draw(value: Plan | Timeline) -> str:
    """The figure that suits the value."""
    return plan_svg(value) if isinstance(value, Plan) else timeline_svg(value)
