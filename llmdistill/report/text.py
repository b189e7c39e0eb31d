"""The report in a terminal: what `llmdistill report FOLDER` and a finished pipeline print."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmdistill.report import figures, search_charts


def summary(report: Mapping[str, Any]) -> str:
    """Findings, the table of students with teacher and baselines, what searches chose, refused rows, and where the time went."""
    parts = [str(report["title"]), ""]
    parts += [f"- {finding}" for finding in report.get("findings", ())]
    header = ["", "accuracy", "95% interval", "agrees with teacher", "parameters", "weights", "ms, 1 row", "tokens/s, 32 rows"]
    rows = []
    teacher = report.get("teacher")
    if teacher:
        rows.append([f"teacher {teacher['model']}", figures.percent(teacher["accuracy"]), figures.interval(teacher.get("accuracy_ci95")), "", "", "", "", ""])
    for entry in [*report["students"], *report.get("baselines", ())]:
        rows.append(
            [
                str(entry["name"]),
                figures.percent(entry["accuracy"]),
                figures.interval(entry["accuracy_ci95"]),
                figures.percent(entry.get("agreement_with_teacher")),
                figures.compact(entry["parameters"]),
                figures.size(entry["weight_bytes"]),
                figures.significant(entry["latency_ms_batch_1"]),
                figures.compact(entry["tokens_per_second_batch_32"]),
            ]
        )
    parts += ["", table(header, rows)]
    if report.get("comparisons"):
        parts += ["", "McNemar's test on the same rows"]
        header = ["first", "second", "rows", "only first right", "only second right", "p"]
        rows = [
            [
                pair["first"],
                pair["second"],
                *(figures.count(pair[key]) for key in ("num_rows", "num_only_first_correct", "num_only_second_correct")),
                figures.probability(pair["p_exact"]),
            ]
            for pair in report["comparisons"]
        ]
        parts.append(table(header, rows, num_text_columns=2))
    for search in report.get("elastic", ()):
        parts += ["", *_chosen(search)]
    if teacher:
        by_reason = report.get("refused", {}).get("by_reason", {})
        reasons = ", ".join(f"{figures.count(number)} {reason}" for reason, number in by_reason.items())
        parts += [
            "",
            f"teacher: {figures.count(teacher['num_completions'])} completions, {figures.compact(teacher['tokens_in'])} tokens in, "
            f"{figures.compact(teacher['tokens_out'])} out, {figures.count(teacher['num_refused'])} rows refused" + (f" ({reasons})" if reasons else ""),
        ]
    parts += [
        "",
        table(
            ["stage", "time", "this run"],
            [[stage["name"], figures.duration(stage["seconds"]), "found" if stage["cached"] else "built"] for stage in report["stages"]],
        ),
    ]
    return "\n".join(parts)


def _chosen(search: Mapping[str, Any]) -> list[str]:
    """The sub-network that a search chose, predicted and measured."""
    (point,) = (point for point in search["points"] if point["subnet"] == search["chosen"])
    rows = []
    for how in ("predicted", "measured"):
        costs = search_charts.costs(point, how)
        rows.append([how, figures.percent(point[f"{how}_accuracy"]), *(search_charts.shown_cost(name, cost) for name, cost in costs.items())])
    header = ["", "validation accuracy", *map(search_charts.titled, point["predicted"])]
    return [f"{search['name']}: {search_charts.reason(search)} is", search["chosen"], table(header, rows)]


def print_summary(report: Mapping[str, Any]) -> None:
    print(summary(report))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], num_text_columns: int = 1) -> str:
    """Columns as wide as they must be: text to the left, figures to the right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def row_text(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if column < num_text_columns else cell.rjust(width) for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([row_text(header), "  ".join("-" * width for width in widths), *map(row_text, rows)])
