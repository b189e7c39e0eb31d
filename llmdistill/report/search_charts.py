"""The chart of a search among sub-networks: accuracy against cost, what was predicted beside what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from llmdistill.report import figures
from llmdistill.report.charts import line, svg, text, ticks

MAX_ASKED = 1000
"""Marks of sub-networks that were asked about; of more, so many are kept."""
LEGEND = (
    ("asked", 2.0, "asked about, predicted"),
    ("predicted", 5.0, "of the front, predicted"),
    ("dot measured", 5.0, "the same, measured"),
    ("dot chosen", 5.0, "the chosen one, measured"),
)

Data = Mapping[str, Any]


def shown_cost(name: str, value: float | None) -> str:
    """A cost as people read it, by the unit in its name."""
    if "_ms" in name:
        return figures.milliseconds(value)
    return figures.size(value) if name.endswith("_bytes") else figures.compact(value)


def titled(name: str) -> str:
    """latency_ms_batch_1 -> latency, batch 1"""
    first, unit, rest = name.partition("_ms")
    words = first + ("," + rest if unit and rest else rest)
    return words.removesuffix("_bytes").replace("_", " ")


def reason(search: Data) -> str:
    """Why the chosen one was chosen."""
    limits = [f"{titled(limit['cost'])} of at most {shown_cost(limit['cost'], limit['most'])}" for limit in search["limits"]]
    return f"the most accurate with {' and '.join(limits)}" if limits else "the cheapest that is about as accurate as the best"


def thinned(asked: Sequence[Data]) -> list[Data]:
    """At most MAX_ASKED, in equal steps."""
    return [asked[place * len(asked) // MAX_ASKED] for place in range(MAX_ASKED)] if len(asked) > MAX_ASKED else list(asked)


def measured_cost(search: Data, point: Data) -> float:
    """What was measured of the cost that is weighed; what arithmetic says where it needs no measuring."""
    return costs(point, "measured")[search["cost"]]


def costs(point: Data, how: str) -> dict[str, float]:
    """All costs, "predicted" or "measured"; arithmetic is both."""
    return {**point["predicted"], **point[how]}


def front_chart(search: Data, *, width: float = 800, height: float = 380) -> Markup:
    """Every point of the front twice, predicted and measured, joined by a line; limits are lines where they lie in the range."""
    points, asked, cost = search["points"], thinned(search["asked"]), search["cost"]
    if not points:
        return Markup("")
    left, right, top, bottom = 56.0, 230.0, 30.0, 40.0
    costs = [one["cost"] for one in asked] + [value for point in points for value in (point["predicted"][cost], measured_cost(search, point))]
    accuracies = [one["accuracy"] for one in asked] + [value for point in points for value in (point["predicted_accuracy"], point["measured_accuracy"])]
    span = max(costs) - min(costs) or max(costs)
    limits = [limit["most"] for limit in search["limits"] if limit["cost"] == cost and min(costs) - 0.2 * span <= limit["most"] <= max(costs) + 0.2 * span]
    x_ticks, y_ticks = ticks(min([*costs, *limits]), max([*costs, *limits])), ticks(min(accuracies), max(accuracies), 4)

    def x_at(value: float) -> float:
        return left + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (width - left - right)

    def y_at(value: float) -> float:
        return height - bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (height - top - bottom)

    body: list[str] = [text(0, 14, "accuracy on validation rows", style="chart-title")]
    for value in y_ticks:
        body += [line(left, y_at(value), width - right, y_at(value), "grid"), text(left - 8, y_at(value) + 4, f"{100 * value:.4g}%", anchor="end")]
    body += [text(x_at(value), height - bottom + 16, shown_cost(cost, value), anchor="middle") for value in x_ticks]
    body.append(text((left + width - right) / 2, height - 4, titled(cost), anchor="middle"))
    for most in limits:
        at_end = x_at(most) > (left + width - right) / 2
        told = text(x_at(most) + (-6 if at_end else 6), top + 10, f"limit {shown_cost(cost, most)}", anchor="end" if at_end else "start")
        body += [line(x_at(most), top, x_at(most), height - bottom, "limit"), told]
    body += [_mark(x_at(one["cost"]), y_at(one["accuracy"]), 2.0, "asked") for one in asked]
    for point in points:
        predicted = x_at(point["predicted"][cost]), y_at(point["predicted_accuracy"])
        measured = x_at(measured_cost(search, point)), y_at(point["measured_accuracy"])
        body += [line(*predicted, *measured, "join"), _mark(*predicted, 5.0, "predicted")]
        body.append(_mark(*measured, 5.0, "dot chosen" if point["subnet"] == search["chosen"] else "dot measured", _told(search, point)))
        if point["is_largest"] or point["is_smallest"]:
            below = measured[1] + 18 < height - bottom
            anchor = "end" if measured[0] > (left + width - right) / 2 else "start"
            body.append(
                text(measured[0], measured[1] + (18 if below else -10), "largest" if point["is_largest"] else "smallest", style="strong", anchor=anchor)
            )
    for place, (style, radius, told) in enumerate(LEGEND):
        y = top + 8 + 20 * place
        body += [_mark(width - right + 22, y, radius, style), text(width - right + 34, y + 4, told)]
    return svg(width, height, f"Accuracy against {titled(cost)}", body)


def _mark(x: float, y: float, radius: float, style: str, told: str = "") -> Markup:
    title = Markup("<title>{}</title>").format(told) if told else ""
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" class="{}">{}</circle>').format(x, y, radius, style, title)


def _told(search: Data, point: Data) -> str:
    cost = search["cost"]
    pairs = (("predicted", point["predicted_accuracy"], point["predicted"][cost]), ("measured", point["measured_accuracy"], measured_cost(search, point)))
    return "; ".join([point["subnet"], *(f"{how} {figures.percent(accuracy)} at {shown_cost(cost, value)}" for how, accuracy, value in pairs)])
