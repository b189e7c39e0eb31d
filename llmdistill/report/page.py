"""The report's page: a pure function from report.json's data to one HTML file that asks the network for nothing.

Jinja escapes every value; the page's own policy (`default-src 'none'`) makes the browser refuse script and network even if an escape were forgotten.
A later technique adds a section by writing a template in sections/ and a line in SECTIONS; it is shown when the data has what it needs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdistill.report import charts, figures, search_charts
from llmdistill.report.compression_charts import Point, layer_map, trade_off
from llmdistill.report.pipeline_chart import pipeline_chart

TEMPLATES = Path(__file__).parent / "templates"
MAX_CURVE_POINTS = 200

Data = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page: its template is templates/sections/<anchor>.html.jinja and sees the whole report as `report`."""

    anchor: str
    title: str
    is_wanted: Callable[[Data], bool]


SECTIONS = (
    Section(anchor="students", title="Students side by side", is_wanted=lambda report: bool(report["students"])),
    Section(anchor="compression", title="Compression", is_wanted=lambda report: bool(report.get("compression"))),
    Section(anchor="search", title="Sub-networks", is_wanted=lambda report: bool(report.get("elastic"))),
    Section(anchor="exits", title="Early exits", is_wanted=lambda report: bool(report.get("exits"))),
    Section(
        anchor="errors",
        title="Where the students err",
        is_wanted=lambda report: any(student["confusion"] or student["mistakes"] for student in report["students"]),
    ),
    Section(anchor="samples", title="Sample rows", is_wanted=lambda report: bool(report.get("samples"))),
    Section(anchor="training", title="Training", is_wanted=lambda report: any(training["points"] for training in report.get("training", ()))),
    Section(anchor="teacher", title="Teacher", is_wanted=lambda report: bool(report.get("teacher"))),
    Section(anchor="pipeline", title="Pipeline", is_wanted=lambda report: bool(report["stages"])),
)


def render(report: Data) -> str:
    """The whole page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        figures=figures,
        share_bar=charts.share_bar,
        pipeline_chart=pipeline_chart,
        student_panels=student_panels,
        training_charts=training_charts,
        confusion_map=confusion_map,
        layer_map=layer_map,
        trade_offs=trade_offs,
        search_charts=search_charts,
        exit_charts=exit_charts,
    )
    sections = [section for section in SECTIONS if section.is_wanted(report)]
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.jinja").render(report=report, sections=sections, style=style)


def searches(found: Iterable[Data]) -> list[dict[str, Any]]:
    """What report.json says under `elastic`: name and search.json of each search, with no more of the sub-networks asked about than the chart has marks."""
    return [{**search, "asked": search_charts.thinned(search["asked"])} for search in found]


def student_panels(report: Data) -> str:
    """Accuracy with its interval, bytes, latency and throughput of teacher, students and baselines, each row in one colour."""
    teacher = report.get("teacher") or {}
    entries: list[Data] = [*report["students"], *report.get("baselines", ())]
    shown_colours = [charts.series_colour(index) for index in range(len(report["students"]))] + ["var(--other)"] * len(report.get("baselines", ()))
    if teacher.get("accuracy") is not None:
        entries = [{"name": "teacher", "accuracy": teacher["accuracy"], "accuracy_ci95": teacher.get("accuracy_ci95")}, *entries]
        shown_colours = ["var(--ink)", *shown_colours]
    has_gold = any(entry.get("accuracy") is not None for entry in entries)
    quality = charts.Measure(
        title="accuracy, 95% interval" if has_gold else "agreement with the teacher",
        values=[entry.get("accuracy" if has_gold else "agreement_with_teacher") for entry in entries],
        intervals=[entry.get("accuracy_ci95" if has_gold else "agreement_with_teacher_ci95") for entry in entries],
        show=figures.percent,
    )
    measures = [
        quality,
        charts.Measure(title="weights on disk", values=[entry.get("weight_bytes") for entry in entries], show=figures.size),
        charts.Measure(title="latency, one row", values=[entry.get("latency_ms_batch_1") for entry in entries], show=figures.milliseconds),
        charts.Measure(title="tokens/s, 32 rows", values=[entry.get("tokens_per_second_batch_32") for entry in entries], show=figures.compact),
    ]
    return charts.panels([str(entry["name"]) for entry in entries], shown_colours, measures, label="Students side by side")


def trade_offs(report: Data) -> list[str]:
    """Accuracy of each student, and held-out loss of each compressed one, against the kept share of the largest one's bytes."""
    largest = max(student["weight_bytes"] for student in report["students"])
    accuracies = [
        Point(name=student["name"], share=student["weight_bytes"] / largest, quality=student["accuracy"], interval=student["accuracy_ci95"])
        for student in report["students"]
        if student["accuracy"] is not None
    ]
    compressed = report["compression"]
    losses = [Point(name="uncompressed", share=1.0, quality=compressed[0]["before"]["held_out_loss_nats"])] + [
        Point(name=student["name"], share=student["after"]["weight_bytes"] / student["before"]["weight_bytes"], quality=student["after"]["held_out_loss_nats"])
        for student in compressed
    ]
    return [
        trade_off(accuracies, title="accuracy on test rows, 95% interval", show=figures.percent),
        trade_off(losses, title="loss on held-out rows, nats", show=figures.significant),
    ]


def exit_charts(report: Data) -> list[str]:
    """Loss of quality, and accuracy where it is known, against the layers that a token goes through, a line for each calibration."""
    drawn = []
    for key, title in (("mean_loss", "loss of quality on calibration rows"), ("accuracy", "accuracy on calibration rows")):
        curves = []
        for index, found in enumerate(report["exits"]):
            points = sorted((point["mean_layers"], point[key]) for point in found["curve"] if point[key] is not None)
            curves.append(charts.Curve(name=found["name"], points=points, colour=charts.series_colour(index)))
        drawn.append(charts.lines(curves, title=title, x_label="decoder layers a token", as_percent=True))
    return drawn


def training_charts(report: Data) -> list[str]:
    """One chart for every loss or accuracy that the training logs hold, with a line for each student. A sum is left out where its parts are shown."""
    histories = [training for training in report.get("training", ()) if training["points"]]
    names = list(dict.fromkeys(str(entry["name"]) for entry in [*report["students"], *histories]))
    measured = dict.fromkeys(key for training in histories for point in training["points"] for key in point if "loss" in key or "accuracy" in key)
    shown = [key for key in measured if not any(other.startswith(f"{key}_") for other in measured)]
    drawn = []
    for key in sorted(shown, key=lambda key: ("accuracy" in key, "validation" in key)):
        curves = [
            charts.Curve(name=training["name"], points=_thinned(training["points"], key), colour=charts.series_colour(names.index(training["name"])))
            for training in histories
        ]
        drawn.append(charts.lines(curves, title=key.replace("_", " "), x_label="step", as_percent="accuracy" in key))
    return drawn


def _thinned(points: list[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """At most MAX_CURVE_POINTS points, each the mean of its neighbours."""
    present = [(float(point["step"]), float(point[key])) for point in points if point.get(key) is not None and "step" in point]
    stride = -(-len(present) // MAX_CURVE_POINTS) or 1
    groups = [present[start : start + stride] for start in range(0, len(present), stride)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def confusion_map(student: Data) -> str:
    matrix = student["confusion"]
    columns, counts = list(matrix["classes"]), [list(row) for row in matrix["counts"]]
    if any(row[-1] for row in counts):
        columns.append("unreadable")
    else:
        counts = [row[:-1] for row in counts]
    return charts.heat_map(matrix["classes"], columns, counts, label=f"Confusion matrix of {student['name']}")
