"""`llmdistill status`: what there is of each pipeline, as a tree with the last stage on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmdistill.core.artifacts import read_json
from llmdistill.core.store import State, Store


def status(runs: Path, pipeline: str = "") -> str:
    """The trees of all pipelines in a runs folder, or of one."""
    graphs = {path.parent.name: path for path in sorted(runs.glob("*/graph.json"))}
    if pipeline and pipeline not in graphs:
        raise ValueError(f"{runs} has no run of {pipeline!r}; it has {', '.join(graphs) or 'none'}")
    names = [pipeline] if pipeline else list(graphs)
    return "\n\n".join(f"{name}\n{_tree(read_json(graphs[name]), Store(runs / 'store'))}" for name in names) or f"nothing has been run yet in {runs}"


def _tree(graph: list[dict[str, Any]], store: Store) -> str:
    by_key = {stage["key"]: stage for stage in graph}
    rows: list[tuple[str, str, str, str, str]] = []
    shown: set[str] = set()

    def walk(key: str, lead: str, branch: str) -> None:
        stage = by_key[key]
        if key in shown:
            rows.append((lead + branch + stage["name"], "", "as above", "", ""))
            return
        shown.add(key)
        rows.append((lead + branch + stage["name"], key, *_state(store, key)))
        deeper = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        above = list(dict.fromkeys(stage["upstream"]))
        for upstream in above:
            walk(upstream, deeper, "└─ " if upstream == above[-1] else "├─ ")

    walk(graph[-1]["key"], "", "")
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        f"{name:<{widths[0]}}  {key:<{widths[1]}}  {state:<{widths[2]}}  {time:>{widths[3]}}  {size:>{widths[4]}}".rstrip()
        for name, key, state, time, size in rows
    )


def _state(store: Store, key: str) -> tuple[str, str, str]:
    """State, time and size of a stage, as text."""
    state = store.state(key)
    if state is State.MISSING:
        return state.value, "", ""
    folder = store.root / (key if state is State.COMPLETE else f"{key}.partial")
    size = _size(folder) if folder.is_dir() else ""
    time = f"{read_json(folder / 'manifest.json')['seconds']:,.1f} s" if state is State.COMPLETE else ""
    return state.value, time, size


def _size(folder: Path) -> str:
    size = float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
