"""Charts of compression: what was kept of each layer, and what quality cost in bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from llmdistill.report.charts import line, series_colour, shortened, svg, text, tick_label, ticks


@dataclass(frozen=True, kw_only=True)
class Point:
    """A student: how much of the weights it keeps (1.0 is all), and how good it is."""

    name: str
    share: float
    quality: float
    interval: tuple[float, float] | None = None


def trade_off(points: Sequence[Point], *, title: str, show: Callable[[float], str], width: float = 620, height: float = 280) -> Markup:
    """Quality against the kept share of the bytes; whiskers are 95% intervals."""
    if not points:
        return Markup("")
    left, right, top, bottom = 56.0, 150.0, 30.0, 38.0
    values = [value for point in points for value in (point.quality, *(point.interval or ()))]
    y_ticks, x_ticks = ticks(min(values), max(values), 4), ticks(0.0, max(1.0, *(point.share for point in points)), 5)

    def x_at(share: float) -> float:
        return left + share / x_ticks[-1] * (width - left - right)

    def y_at(value: float) -> float:
        return height - bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (height - top - bottom)

    body: list[str] = [text(0, 14, title, style="chart-title")]
    for value in y_ticks:
        body += [line(left, y_at(value), width - right, y_at(value), "grid"), text(left - 8, y_at(value) + 4, show(value), anchor="end")]
    for share in x_ticks:
        body.append(text(x_at(share), height - bottom + 16, f"{100 * share:.0f}%", anchor="middle"))
    body.append(text((left + width - right) / 2, height - 4, "share of the uncompressed student's bytes", anchor="middle"))
    for index, point in enumerate(points):
        x, y, colour = x_at(point.share), y_at(point.quality), series_colour(index)
        told = f"{point.name}: {show(point.quality)} at {100 * point.share:.1f}% of the bytes"
        if point.interval:
            low, high = (y_at(bound) for bound in point.interval)
            body.append(Markup('<path d="M{0:.1f} {1:.1f}V{2:.1f}" class="whisker" style="stroke:{3}"/>').format(x, low, high, colour))
        body.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="5" class="dot" style="fill:{}"><title>{}</title></circle>').format(x, y, colour, told))
        key_y = top + 18 * index
        body.append(Markup('<rect x="{:.1f}" y="{:.1f}" width="8" height="8" rx="2" style="fill:{}"/>').format(width - right + 14, key_y - 8, colour))
        body.append(text(width - right + 28, key_y, shortened(point.name, 20)))
    return svg(width, max(height, top + 18 * len(points)), title, body)


def layer_map(layers: Sequence[Mapping[str, Any]], *, label: str) -> Markup:
    """One cell a linear: the rank that it kept in percent of full rank, or its bits; a layer that was kept whole is marked."""
    placed = [layer for layer in layers if layer["role"] is not None]
    if not placed:
        return Markup("")
    rows = list(dict.fromkeys((str(layer["stack"]), int(layer["layer"])) for layer in placed))
    columns = list(dict.fromkeys(str(layer["role"]) for layer in placed))
    cell_width, cell_height, left, top = 64.0, 22.0, 96.0, 30.0
    body: list[str] = [text(left + cell_width * (index + 0.5), top - 8, role, anchor="middle") for index, role in enumerate(columns)]
    body += [text(left - 8, top + cell_height * (index + 0.5) + 4, f"{stack} {number}", anchor="end") for index, (stack, number) in enumerate(rows)]
    drawn: dict[tuple[int, int], Mapping[str, Any]] = {}
    for layer in placed:  # of the two factors of a low-rank linear the first is shown
        drawn.setdefault((rows.index((str(layer["stack"]), int(layer["layer"]))), columns.index(str(layer["role"]))), layer)
    for (row, column), layer in drawn.items():
        x, y = left + cell_width * column, top + cell_height * row
        share, shown, told = _cell(layer)
        body.append(
            Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="cell" style="--share:{:.0f}%"><title>{}</title></rect>').format(
                x + 1, y + 1, cell_width - 2, cell_height - 2, 100 * share, told
            )
        )
        body.append(text(x + cell_width / 2, y + cell_height / 2 + 4, shown, style="on-cell" if share > 0.45 else "in-cell", anchor="middle"))
    return svg(left + cell_width * len(columns) + 8, top + cell_height * len(rows) + 8, label, body)


def _cell(layer: Mapping[str, Any]) -> tuple[float, str, str]:
    """How dark a cell is, what stands in it, and what it says when asked."""
    figures, path = layer["figures"], layer["path"]
    if layer["kind"] == "kept":
        return 1.0, "kept", f"{path}: kept, {layer['note']}"
    told = f"{path}: {layer['kind']}" + "".join(f", {name.replace('_', ' ')} {tick_label(round(value, 5))}" for name, value in figures.items())
    if "rank_share" in figures:
        return float(figures["rank_share"]), f"{100 * figures['rank_share']:.0f}%", told
    if "bits" in figures:
        return float(figures["bits"]) / 32, f"{figures['bits']:g} bit", told
    return 0.5, str(layer["kind"]), told
