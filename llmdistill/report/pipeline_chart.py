"""The pipeline as a picture: stages in columns by how much must come before them, edges only where no longer way says the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from llmdistill.report import figures
from llmdistill.report.charts import line, shortened, svg, text

BOX_WIDTH, BOX_HEIGHT, COLUMN_GAP, ROW_GAP = 172.0, 58.0, 44.0, 18.0


def reduced(depends_on: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The same order with the fewest edges (transitive reduction); edges to unknown stages are dropped."""
    above: dict[str, set[str]] = {}

    def ancestors(key: str) -> set[str]:
        if key not in above:
            direct = [other for other in depends_on.get(key, ()) if other in depends_on]
            above[key] = set(direct).union(*(ancestors(other) for other in direct))
        return above[key]

    edges = {key: [other for other in dict.fromkeys(others) if other in depends_on] for key, others in depends_on.items()}
    return {key: [other for other in others if not any(other in ancestors(third) for third in others if third != other)] for key, others in edges.items()}


def columns(edges: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Stages by the length of the longest way to them; within a column near the stages that they follow."""
    depth: dict[str, int] = {}

    def depth_of(key: str) -> int:
        if key not in depth:
            depth[key] = 1 + max(map(depth_of, edges[key]), default=-1)
        return depth[key]

    placed: list[list[str]] = []
    for key in edges:
        while len(placed) <= depth_of(key):
            placed.append([])
        placed[depth_of(key)].append(key)
    row = {key: float(index) for column in placed for index, key in enumerate(column)}
    for column in placed[1:]:
        column.sort(key=lambda key: sum(row[other] for other in edges[key]) / max(1, len(edges[key])))
        row.update({key: float(index) for index, key in enumerate(column)})
    return placed


def pipeline_chart(stages: Sequence[Mapping[str, Any]]) -> Markup:
    """One box a stage: its name, its seconds, and whether this run built it or found it."""
    by_key = {str(stage["key"]): stage for stage in stages}
    edges = reduced({key: stage.get("depends_on", ()) for key, stage in by_key.items()})
    placed = columns(edges)
    tallest = max(map(len, placed), default=0)
    width = len(placed) * (BOX_WIDTH + COLUMN_GAP) - COLUMN_GAP + 2
    height = tallest * (BOX_HEIGHT + ROW_GAP) - ROW_GAP + 2
    corner: dict[str, tuple[float, float]] = {}
    for index, column in enumerate(placed):
        free = height - 2 - len(column) * (BOX_HEIGHT + ROW_GAP) + ROW_GAP
        for row, key in enumerate(column):
            corner[key] = (1 + index * (BOX_WIDTH + COLUMN_GAP), 1 + free / 2 + row * (BOX_HEIGHT + ROW_GAP))
    body: list[str] = []
    for key, others in edges.items():
        for other in others:
            x1, y1 = corner[other][0] + BOX_WIDTH, corner[other][1] + BOX_HEIGHT / 2
            x2, y2 = corner[key][0], corner[key][1] + BOX_HEIGHT / 2
            bend = COLUMN_GAP / 2
            body.append(
                Markup('<path d="M{:.1f} {:.1f}H{:.1f}C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}" class="edge"/>').format(
                    x1, y1, x2 - COLUMN_GAP, x2 - bend, y1, x2 - bend, y2, x2, y2
                )
            )
    longest = max((stage.get("seconds") or 0.0 for stage in stages), default=0.0) or 1.0
    for key, stage in by_key.items():
        x, y = corner[key]
        seconds = stage.get("seconds")
        state = "found" if stage.get("cached") else "built"
        body += [
            Markup("<g><title>{}: {}, {}</title>").format(key, figures.duration(seconds), state),
            Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.0f}" height="{:.0f}" rx="8" class="box {}"/>').format(x, y, BOX_WIDTH, BOX_HEIGHT, state),
            text(x + 12, y + 22, shortened(str(stage["name"]), 22), style="strong"),
            text(x + 12, y + 40, f"{figures.duration(seconds)} · {state}"),
            line(x + 12, y + 49, x + 12 + (BOX_WIDTH - 24) * (seconds or 0.0) / longest, y + 49, "time"),
            Markup("</g>"),
        ]
    return svg(width, height, f"The pipeline's {len(stages)} stages and how they depend on each other", body)
