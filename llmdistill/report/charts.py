"""The report's charts as inline SVG, drawn here so that the page is one file without script or network.

Colours and type come from the page's style sheet (classes and `--series-N` variables), so a chart follows the reader's light or dark theme.
Every label passes through `escape`; each mark carries its figures in a <title>, which browsers show on hover and screen readers speak.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

NUM_SERIES_COLOURS = 8


def svg(width: float, height: float, label: str, body: Sequence[str]) -> Markup:
    return Markup('<svg viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" height="{1:.0f}" role="img" aria-label="{2}">{3}</svg>').format(
        width, height, label, Markup("".join(body))
    )


def text(x: float, y: float, content: object, *, style: str = "", anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(x, y, style, anchor, content)


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, style)


def shortened(content: str, num_characters: int) -> str:
    return content if len(content) <= num_characters else content[: num_characters - 1] + "…"


def series_colour(index: int) -> str:
    return f"var(--series-{index % NUM_SERIES_COLOURS + 1})"


def ticks(low: float, high: float, num_wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover low..high."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / num_wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * multiple for multiple in (1, 2, 5, 10) if power * multiple >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def tick_label(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.10g}"


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Lines: loss curves


@dataclass(frozen=True, kw_only=True)
class Curve:
    name: str
    points: Sequence[tuple[float, float]]
    colour: str


def lines(curves: Sequence[Curve], *, title: str, x_label: str, width: float = 500, height: float = 250, as_percent: bool = False) -> Markup:
    """A line for each curve, named at its end."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return Markup("")
    left, right, top, bottom = 48.0, 118.0, 30.0, 36.0
    x_values = [x for curve in curves for x, _ in curve.points]
    y_values = [y for curve in curves for _, y in curve.points]
    x_ticks, y_ticks = ticks(min(x_values), max(x_values)), ticks(min([*y_values, 0.0]), max(y_values), 4)
    x_low, x_high, y_low, y_high = min(x_values), max(max(x_values), min(x_values) + 1e-9), y_ticks[0], y_ticks[-1]

    def x_at(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def y_at(y: float) -> float:
        return height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    body = [text(0, 14, title, style="chart-title")]
    for y in y_ticks:
        body += [
            line(left, y_at(y), width - right, y_at(y), "grid"),
            text(left - 8, y_at(y) + 4, f"{100 * y:.3g}%" if as_percent else tick_label(y), anchor="end"),
        ]
    for x in x_ticks:
        if x_low <= x <= x_high:
            body.append(text(x_at(x), height - bottom + 16, tick_label(x), anchor="middle"))
    body.append(text((left + width - right) / 2, height - 4, x_label, anchor="middle"))
    ends = _spread([y_at(curve.points[-1][1]) for curve in curves], 15, top, height - bottom)
    for curve, end in zip(curves, ends, strict=True):
        path = "M" + "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in curve.points)
        last_x, last_y = curve.points[-1]
        value = f"{100 * last_y:.1f}%" if as_percent else f"{last_y:.3g}"
        body.append(
            Markup('<path d="{}" class="curve" style="stroke:{}"><title>{}: {} at the end</title></path>').format(path, curve.colour, curve.name, value)
        )
        body.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3.5" class="dot" style="fill:{}"/>').format(x_at(last_x), y_at(last_y), curve.colour))
        body.append(Markup('<rect x="{:.1f}" y="{:.1f}" width="8" height="8" rx="2" style="fill:{}"/>').format(width - right + 10, end - 4, curve.colour))
        body.append(text(width - right + 22, end + 4, shortened(curve.name, 15)))
    return svg(width, height, title, body)


def _spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart until none overlaps, keeping their order and, where there is room, their place."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = list(positions)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    if order and placed[order[-1]] > high:
        placed[order[-1]] = max(high, low + gap * (len(order) - 1))
        for before, after in zip(order[-2::-1], order[:0:-1], strict=False):
            placed[before] = min(placed[before], placed[after] - gap)
    return placed


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Panels: several measures of the same few things, side by side


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One panel; a value is a bar from zero, or, with an interval, a dot with its error bar on a scale that need not start at zero."""

    title: str
    values: Sequence[float | None]
    show: Callable[[float], str]
    intervals: Sequence[Sequence[float] | None] | None = None


def panels(names: Sequence[str], colours: Sequence[str], measures: Sequence[Measure], *, label: str) -> Markup:
    """Rows are students (and what they are compared with), columns are measures; each column has its own scale."""
    name_width, row_height, top, gap = 164.0, 34.0, 30.0, 24.0
    panel_width = 192.0 if len(measures) > 2 else 300.0
    width, height = name_width + len(measures) * (panel_width + gap) - gap, top + row_height * len(names) + 24
    body: list[str] = []
    for row, name in enumerate(names):
        y = top + row_height * (row + 0.5)
        body.append(Markup('<rect x="0" y="{:.1f}" width="10" height="10" rx="3" style="fill:{}"/>').format(y - 5, colours[row]))
        body.append(text(18, y + 4, shortened(name, 22), style="strong"))
    for column, measure in enumerate(measures):
        left = name_width + column * (panel_width + gap)
        body.append(text(left, 14, measure.title, style="chart-title"))
        draw = _dots if measure.intervals is not None else _bars
        body += draw(measure, colours, left, panel_width, top, row_height)
    return svg(width, height, label, body)


def _bars(measure: Measure, colours: Sequence[str], left: float, width: float, top: float, row_height: float) -> list[str]:
    highest = max((value for value in measure.values if value is not None), default=0.0) or 1.0
    room = width - 66  # the figure stands after its bar
    body: list[str] = [line(left, top, left, top + row_height * len(measure.values), "axis")]
    for row, value in enumerate(measure.values):
        y = top + row_height * (row + 0.5)
        if value is None:
            body.append(text(left + 8, y + 4, "–"))
            continue
        length = max(1.5, value / highest * room)
        body.append(
            Markup('<path d="M{0:.1f} {1:.1f}h{2:.1f}a3 3 0 0 1 3 3v8a3 3 0 0 1 -3 3h-{2:.1f}z" style="fill:{3}"><title>{4}</title></path>').format(
                left, y - 7, max(0.0, length - 3), colours[row], measure.show(value)
            )
        )
        body.append(text(left + length + 7, y + 4, measure.show(value)))
    return body


def _dots(measure: Measure, colours: Sequence[str], left: float, width: float, top: float, row_height: float) -> list[str]:
    intervals = measure.intervals or []
    present = [bound for interval in intervals if interval for bound in interval] + [value for value in measure.values if value is not None]
    low, high = (min(present), max(present)) if present else (0.0, 1.0)
    scale = ticks(max(0.0, low), min(1.0, high), 3)
    low, high, bottom = scale[0], scale[-1], top + row_height * len(measure.values)

    def x_at(value: float) -> float:
        return left + 4 + (value - low) / (high - low) * (width - 8)

    body: list[str] = []
    for tick in scale:
        body += [line(x_at(tick), top, x_at(tick), bottom, "grid"), text(x_at(tick), bottom + 16, f"{100 * tick:.3g}%", anchor="middle")]
    for row, (value, interval) in enumerate(zip(measure.values, intervals, strict=True)):
        y = top + row_height * (row + 0.5)
        if value is None:
            body.append(text(left + 8, y + 4, "–"))
            continue
        body.append(text(x_at(value), y - 8, measure.show(value), anchor="middle"))
        title = measure.show(value)
        if interval:
            title += f", 95% interval {measure.show(interval[0])} to {measure.show(interval[1])}"
            body.append(
                Markup('<path d="M{0:.1f} {2:.1f}H{1:.1f}M{0:.1f} {3:.1f}v8M{1:.1f} {3:.1f}v8" class="whisker" style="stroke:{4}"/>').format(
                    x_at(interval[0]), x_at(interval[1]), y + 3, y - 1, colours[row]
                )
            )
        body.append(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="5" class="dot" style="fill:{}"><title>{}</title></circle>').format(
                x_at(value), y + 3, colours[row], title
            )
        )
    return body


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Heat map: confusion


def heat_map(row_names: Sequence[str], column_names: Sequence[str], counts: Sequence[Sequence[int]], *, label: str) -> Markup:
    """Counts as cells shaded by their share of the row; zero is left empty so that mistakes stand out."""
    cell = 34.0 if len(column_names) <= 14 else 28.0
    left = 24 + 6.6 * max(map(len, row_names), default=0)
    slant = 6.6 * 0.75 * max(map(len, column_names), default=0)
    top = 34 + slant
    width, height = left + cell * len(column_names) + slant, top + 0.75 * cell * len(row_names) + 8
    body: list[str] = [text(left - 10, top - 10, "gold ↓  predicted →", anchor="end")]
    for column, name in enumerate(column_names):
        x = left + cell * (column + 0.4)
        body.append(Markup('<text transform="translate({:.1f} {:.1f}) rotate(-45)">{}</text>').format(x, top - 8, name))
    for row, (name, values) in enumerate(zip(row_names, counts, strict=True)):
        y, total = top + 0.75 * cell * row, sum(values)
        body.append(text(left - 10, y + 0.375 * cell + 4, name, anchor="end"))
        for column, value in enumerate(values):
            share = value / total if total else 0.0
            title = f"{name} → {column_names[column]}: {value} of {total}"
            body.append(
                Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="cell" style="--share:{:.0f}%"><title>{}</title></rect>').format(
                    left + cell * column + 1, y + 1, cell - 2, 0.75 * cell - 2, 100 * share**0.7, title
                )
            )
            if value:
                body.append(text(left + cell * (column + 0.5), y + 0.375 * cell + 4, value, style="on-cell" if share > 0.45 else "in-cell", anchor="middle"))
    return svg(width, height, label, body)


def share_bar(share: float, label: str) -> Markup:
    """A bar in a table cell."""
    return Markup(
        '<svg viewBox="0 0 120 10" width="120" height="10" role="img" aria-label="{}">'
        '<rect width="120" height="10" rx="3" class="track"/><rect width="{:.1f}" height="10" rx="3" class="fill"/></svg>'
    ).format(label, 120 * max(0.0, min(1.0, share)))
