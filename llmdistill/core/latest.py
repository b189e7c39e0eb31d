"""What a run leaves for people to find, beside the store with its keys.

runs/<pipeline>/latest/<stage>    a link to the stage's folder in runs/store
runs/<pipeline>/options.yaml      every option of the last run, to read and to run again with --config; a copy lies beside the report
runs/<pipeline>/graph.json        its stages, for `llmdistill status`
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmdistill.core.artifacts import Artifact, Checkpoint, Report
from llmdistill.core.graph import Graph
from llmdistill.core.stage import Stage, upstream
from llmdistill.core.store import Store


@dataclass(frozen=True)
class Latest:
    """The folder of one pipeline, as its last run left it."""

    folder: Path
    graph: Graph
    store: Store

    def begin(self, options_yaml: str) -> None:
        """Say what is run, and link what is there already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stages = [{"name": stage.name, "key": stage.key, "upstream": [above.key for above in upstream(stage)]} for stage in self.graph.stages]
        with self._alone():
            self._replace("options.yaml", options_yaml)
            self._replace("graph.json", json.dumps(stages, indent=2))
        self.link()

    def link(self) -> None:
        """Make latest/ link the finished stages of this graph, and nothing else."""
        latest = self.folder / "latest"
        finished = {stage.name: os.path.relpath(self.store.folder(stage), latest) for stage in self.graph.stages if self.store.is_complete(stage)}
        with self._alone():
            latest.mkdir(exist_ok=True)
            for link in latest.iterdir():
                if link.name not in finished:
                    link.unlink()
            for name, destination in finished.items():
                temporary = latest / f".{name}"
                temporary.symlink_to(destination)
                temporary.rename(latest / name)

    def where(self, target: Stage[Artifact]) -> str:
        """Where to look, and what to do next."""
        latest = self.folder / "latest"
        lines = [f"{target.name}: {latest / target.name}"]
        for stage in self.graph.stages:
            if self.store.is_complete(stage) and issubclass(stage.artifact, Checkpoint):
                lines.append(f"to serve {stage.name}: {_program()} serve {latest / stage.name}")
            if self.store.is_complete(stage) and issubclass(stage.artifact, Report):
                lines.append(f"the report: {(latest / stage.name / 'report.html').resolve()}")
        return "\n".join(lines)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One run at a time writes here; otherwise each would clear away the other's links while they are made."""
        with (self.folder / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _replace(self, name: str, text: str) -> None:
        temporary = self.folder / f".{name}"
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(self.folder / name)


def _program() -> str:
    """How to call llmdistill from here."""
    if shutil.which("llmdistill"):
        return "llmdistill"
    python = Path(sys.executable)
    return f"{python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python} -m llmdistill"
