"""Tables, figures, pages and traces: all is shown, nothing leaks, whatever the names."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodecouple.plans import Cut, Plan, StageSpec, TensorSpec
from autodecouple.schedules.actions import Action, Op
from autodecouple.timeline import Span, Timeline
from autodecouple.view import gantt, html, svg, text, trace, units

SVG = "{http://www.w3.org/2000/svg}"
NASTY = [
    "<b>&amp;</b>",
    "a\"b'c",
    "x -> y",
    "]]>",
    "[bold red]x[/]",
    "\x00\x1b[31m",
    "{{ 7 * 7 }}",
    "\ud800",
    "é" * 300,
    "",
]


def make_plan(costs: tuple[int, ...] = (300, 500, 200), **changes: object) -> Plan:
    stages = tuple(
        StageSpec(
            index=k,
            nodes=(f"conv2d_{k}", f"batch_norm_{k}", f"relu_{k}"),
            objective="criterion" if k == len(costs) - 1 else "supcon",
            forward_flops=cost * 3 * 10**6,
            backward_flops=cost * 6 * 10**6,
            head_flops=cost * 10**6,
            num_parameters=1_230_000,
            parameter_bytes=4_920_000,
            costliest_node=f"conv2d_{k}",
            costliest_flops=cost * 5 * 10**6,
            lane=k,
            device=f"cuda:{k}",
        )
        for k, cost in enumerate(costs)
    )
    cuts = tuple(
        Cut(f"relu_{k}", (TensorSpec("mask", (8, 16), "bool"), TensorSpec(f"relu_{k}", (8, 64, 4, 4), "float32")),
            (f"relu_{k}",), (f"relu_{k}",), module=f"layer{k}.1")
        for k in range(len(costs) - 1)
    )  # fmt: skip
    plan = Plan(stages, cuts, "ResNet", (TensorSpec("x", (8, 3, 32, 32), "float32"),), ("dropout is not keyed",))
    return dataclasses.replace(plan, **changes)


def make_timeline(num_lanes: int = 3, batches: int = 4) -> Timeline:
    spans = []
    for batch in range(batches):
        for lane in range(num_lanes):
            start = 5.0 + 0.010 * batch + 0.002 * lane
            for op, seconds in ((Op.FORWARD, 0.002), (Op.LOSS, 0.001), (Op.BACKWARD, 0.004), (Op.UPDATE, 0.001)):
                micro_batch = 0 if op in (Op.FORWARD, Op.BACKWARD) else None
                spans.append(Span(lane, Action(lane, op, micro_batch), batch, start, start + seconds))
                start += seconds
    return Timeline(tuple(sorted(spans, key=lambda span: span.start)), num_lanes, "streaming <predicted>")


names = st.one_of(st.sampled_from(NASTY), st.text(max_size=40))
specs = st.builds(
    TensorSpec, names, st.lists(st.integers(0, 4096), max_size=5).map(tuple), names, st.none() | st.just(0)
)
big = st.integers(0, 10**15)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    count = draw(st.integers(1, 6))
    costs = ("forward_flops", "backward_flops", "head_flops", "num_parameters", "parameter_bytes", "costliest_flops")
    fields = dict.fromkeys(costs, big)
    nodes, objectives = st.lists(names, min_size=1, max_size=12).map(tuple), st.sampled_from(("supcon", "bp", "<o>"))
    stages = tuple(
        draw(st.builds(StageSpec, st.just(k), nodes, objectives, lane=st.just(k % 2), device=names,
                       costliest_node=names, modules=st.lists(names, max_size=9).map(tuple), **fields))
        for k in range(count)
    )  # fmt: skip
    cuts = []
    for _ in range(count - 1):
        crossing = draw(st.lists(specs, min_size=1, max_size=4))
        cuts.append(
            Cut(
                draw(names),
                tuple(crossing),
                (crossing[0].name,),
                (crossing[0].name,),
                module=draw(names),
                detached=draw(st.booleans()),
            )
        )
    return Plan(stages, tuple(cuts), draw(names), tuple(draw(st.lists(specs, max_size=2))), (draw(names),))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_any_plan_can_be_shown(plan: Plan) -> None:
    root = ElementTree.fromstring(svg.plan_svg(plan))
    assert root.tag == f"{SVG}svg"
    assert set(html.mimebundle(plan)) == {"text/plain", "text/html", "image/svg+xml"}
    assert "\x1b" not in text.plan_table(plan)


@pytest.mark.parametrize("name", NASTY)
def test_names_are_text_and_never_markup(name: str) -> None:
    stage = dataclasses.replace(make_plan((1,)).stages[0], nodes=(name,), objective=name, device=name, modules=(name,))
    plan = Plan((stage,), model=name, warnings=(name,))
    page = html.page(plan, title=name)
    assert "<b>" not in page and "&amp;amp;" not in page.replace("&lt;b&gt;&amp;amp;", "")
    shown = "".join(ElementTree.fromstring(svg.plan_svg(plan)).itertext())
    assert units.clean(name)[:8] in shown and units.clean(name)[:8] in text.plan_table(plan)
    page.encode()  # a lone surrogate could not be written to a file


@pytest.mark.parametrize("figure", [svg.plan_svg(make_plan()), svg.timeline_svg(make_timeline())])
def test_figures_are_self_contained_and_accessible(figure: str) -> None:
    root = ElementTree.fromstring(figure)
    tags = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert not tags & {"script", "foreignObject", "image", "use", "a", "link"}
    assert figure.replace('xmlns="http://www.w3.org/2000/svg"', "").count("http") == 0
    assert "url(" not in figure and "@import" not in figure and "@font-face" not in figure
    assert root.get("role") == "img"
    assert [child.tag.removeprefix(SVG) for child in root][:2] == ["title", "desc"]


def test_style_reaches_its_own_figure_only() -> None:
    first, second = (ElementTree.fromstring(svg.plan_svg(make_plan(costs))) for costs in ((1, 2), (2, 1)))
    assert first.get("id") != second.get("id")
    css = first.find(f"{SVG}style")
    assert css is not None and css.text is not None
    selectors = re.findall(r"([^{}]+)\{[^{}]*\}", css.text.removeprefix("@media (prefers-color-scheme: dark){"))
    assert selectors and all(selector.startswith(f"#{first.get('id')} ") for selector in selectors)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_boxes_are_as_wide_as_their_share_of_the_cost(costs: list[int]) -> None:
    plan = make_plan(tuple(costs))
    root = ElementTree.fromstring(svg.plan_svg(plan))
    boxes = [box for box in root.iter(f"{SVG}rect") if box.get("data-stage")]
    widths = [float(box.get("width", "nan")) for box in boxes]
    assert [box.get("data-stage") for box in boxes] == [str(k) for k in range(len(costs))]
    for width, cost in zip(widths, costs, strict=True):
        assert width == pytest.approx(sum(widths) * cost / sum(costs), abs=0.05)


def test_a_wall_stands_at_detached_cuts_only() -> None:
    plan = make_plan()
    coupled = dataclasses.replace(plan, cuts=(plan.cuts[0], dataclasses.replace(plan.cuts[1], detached=False)))
    walls = [svg.plan_svg(p).count("stroke-dasharray") for p in (plan, coupled)]
    assert walls == [2, 1]
    assert "· coupled" in svg.plan_svg(coupled) and "· coupled" not in svg.plan_svg(plan)


def test_figure_of_a_plan_says_what_crosses_and_the_heads() -> None:
    shown = [element.text for element in ElementTree.fromstring(svg.plan_svg(make_plan())).iter(f"{SVG}text")]
    assert shown.count("supcon") == 2 and shown.count("criterion") == 1 and shown.count("slowest") == 1
    assert "relu_0 (N, 64, 4, 4) float32" in shown and "+ mask (N, 16) bool" in shown


def bars(figure: str) -> list[ElementTree.Element]:
    """The boxes of spans: those that say when."""
    found = ElementTree.fromstring(figure).iter(f"{SVG}rect")
    return [box for box in found if box.find(f"{SVG}title") is not None]


def test_every_span_lies_at_its_time_on_its_lane() -> None:
    timeline = make_timeline()
    boxes = bars(svg.timeline_svg(timeline))
    assert len(boxes) == len(timeline.spans)
    left = min(float(box.get("x", "nan")) for box in boxes)
    right = max(float(box.get("x", "nan")) + float(box.get("width", "nan")) for box in boxes)
    scale, rows = (right - left) / timeline.makespan, sorted({float(box.get("y", "nan")) for box in boxes})
    for box, span in zip(boxes, timeline.spans, strict=True):
        assert float(box.get("x", "nan")) == pytest.approx(left + (span.start - timeline.start) * scale, abs=0.02)
        assert float(box.get("width", "nan")) == pytest.approx(span.seconds * scale, abs=0.02)
        assert rows.index(float(box.get("y", "nan"))) == span.lane


def test_stage_and_op_decide_the_color() -> None:
    timeline = make_timeline()
    fills = zip(bars(svg.timeline_svg(timeline)), timeline.spans, strict=True)
    colors = {(span.action.stage, span.action.op): box.get("fill") for box, span in fills}
    assert len(set(colors.values())) == len(colors) == 12


def test_large_timelines_are_cut_off_and_say_so() -> None:
    figure = svg.timeline_svg(make_timeline(num_lanes=4, batches=700))
    assert len(bars(figure)) == gantt.MAX_SPANS
    assert "the first 1,500 of 11,200 spans are drawn" in figure
    assert len(figure) < 500_000


@pytest.mark.parametrize("spans", [(), (Span(0, Action(0, Op.UPDATE), 0, 1.0, 1.0),)])
def test_timelines_without_time_can_be_shown(spans: tuple[Span, ...]) -> None:
    timeline = Timeline(spans, 1)
    assert set(html.mimebundle(timeline)) == {"text/plain", "text/html", "image/svg+xml"}
    assert trace.trace_events(timeline)["traceEvents"]


def test_trace_holds_every_span_once_sorted_with_named_lanes(tmp_path: Path) -> None:
    timeline = make_timeline()
    trace.write_trace(timeline, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"} == {
        lane: f"lane {lane}" for lane in range(3)
    }
    assert [e["ts"] for e in spans] == sorted(e["ts"] for e in spans) and spans[0]["ts"] == 0
    assert all(e["dur"] >= 0 and e["pid"] == 0 for e in spans)
    assert math.isclose(max(e["ts"] + e["dur"] for e in spans), timeline.makespan * 1e6)
    expected = Counter((s.lane, str(s.action), s.batch) for s in timeline.spans)
    assert Counter((e["tid"], e["name"], e["args"]["batch"]) for e in spans) == expected
    assert spans[0]["args"] == {"stage": 0, "op": "forward", "batch": 0, "micro_batch": 0}


def test_table_holds_stages_cuts_bottleneck_and_warnings() -> None:
    plan = make_plan()
    shown = text.plan_table(plan)
    assert shown == str(plan)
    for stage in plan.stages:
        assert f"{stage.nodes[0]} … {stage.nodes[-1]}" in shown and f"{stage.lane}: {stage.device}" in shown
    for cut in plan.cuts:
        assert f"{cut.features[0]} (N, 64, 4, 4) float32" in shown and f"3 nodes, to {cut.module}" in shown
    for words in (
        "ResNet, input x (N, 3, 32, 32) float32: 3 stages", "+ mask (N, 16) bool", "balance 0.67", "speedup 2.00x",
        "slowest: stage 1, 5.00 GFLOP a step; its costliest node is conv2d_1 (2.50 GFLOP, 50 % of the stage)",
        "warning: dropout is not keyed", "criterion", "supcon",
    ):  # fmt: skip
        assert words in shown
    assert max(map(len, shown.splitlines())) <= text.WIDTH


def test_table_says_what_fewer_lanes_and_coupled_cuts_change() -> None:
    plan = make_plan()
    on_one = dataclasses.replace(plan, stages=tuple(dataclasses.replace(s, lane=0) for s in plan.stages))
    assert "1.00x on the 1 lane of this plan" in text.plan_table(on_one)
    coupled = dataclasses.replace(plan, cuts=tuple(dataclasses.replace(c, detached=False) for c in plan.cuts))
    assert "speedup at most" in text.plan_table(coupled) and "coupled" in text.plan_table(coupled)


def test_color_only_when_asked() -> None:
    assert "\x1b" not in text.plan_table(make_plan())
    assert "\x1b" in text.plan_table(make_plan(), color=True)


def test_timeline_table_holds_lanes_medians_and_makespan() -> None:
    shown = text.timeline_table(make_timeline())
    for words in (
        "streaming <predicted>",
        "32.0 ms",
        "4.00 ms",
        "makespan 42.0 ms for 4 batches, bubble 24 %",
        "2.29x",
    ):
        assert words in shown


def test_page_is_one_file_for_light_and_dark() -> None:
    page = html.page(make_plan(), "a <title> & more")
    assert page.startswith("<!doctype html>") and page.count("<svg") == 1 and "prefers-color-scheme" in page
    assert "<title>a &lt;title&gt; &amp; more</title>" in page
    assert "<script" not in page and "src=" not in page and "<link" not in page


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.amount(0), "0"), (units.amount(999), "999"), (units.amount(999_999), "1.00 M"),
        (units.amount(11_689_512), "11.7 M"), (units.flops(2.5e9), "2.50 GFLOP"), (units.flops(7), "7 FLOP"),
        (units.size(1024), "1.00 KiB"), (units.size(3 * 2**30), "3.00 GiB"), (units.duration(0), "0 s"),
        (units.duration(0.00123), "1.23 ms"), (units.duration(75.25), "75.2 s"), (units.duration(5e-7), "500 ns"),
        (units.count(1, "batch"), "1 batch"), (units.count(1500, "batch"), "1,500 batches"),
        (units.shorten("abcdefghij", 5), "ab…ij"), (units.Scale.of(2.5e9)(3e8), "0.30"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert shown == expected


def test_view_needs_no_torch() -> None:
    modules = ", ".join(f"autodecouple.view.{name}" for name in ("text", "svg", "html", "trace"))
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
