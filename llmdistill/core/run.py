"""What a stage sees while it builds: a folder to write into, its upstream artefacts, metrics and a progress bar."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from llmdistill.core.artifacts import Artifact
from llmdistill.core.processes import rank
from llmdistill.core.stage import A, JsonScalar, Stage, upstream

if TYPE_CHECKING:
    from llmdistill.core.store import Store


RUN_BEGAN = "LLMDISTILL_RUN_BEGAN_UNIX_S"
"""Name of the environment variable in which `llmdistill run` tells its children when it began."""


class Stopped(Exception):
    """Raised by a build that ends early on purpose (a budget is spent): no traceback, everything is kept, the same command goes on."""


class NotBuilt(Exception):
    """An upstream artefact is not there yet: what `plan` meets in a dry run, and what it need not catch."""


class Progress(Protocol):
    """A bar that can be moved."""

    def advance(self, num: int = 1) -> None: ...


class Run:
    """One build of one stage."""

    def __init__(self, stage: Stage[Artifact], store: Store) -> None:
        self.stage = stage
        self.folder: Path = store.partial(stage)
        """Where to write. Whatever is there from an earlier, killed build is the stage's own to resume from."""
        self._store = store

    def artifact(self, stage: Stage[A]) -> A:
        """The finished artefact of an upstream stage."""
        if stage.key not in {above.key for above in upstream(self.stage)}:
            raise ValueError(f"{self.stage.name} reads {stage.key}, which none of its fields holds; its key would not change with it")
        if not self._store.is_complete(stage):
            raise NotBuilt(f"known when {stage.name} is built")
        return self._store.artifact(stage)

    def has(self, stage: Stage[Any]) -> bool:
        """Whether an upstream stage is built; for `plan`."""
        return self._store.is_complete(stage)

    def log_metrics(self, **values: JsonScalar) -> None:
        """Append one line to metrics.jsonl, with units in the names. A resumed build may log a step again: the last line counts."""
        if rank() != 0:
            return
        path = self.folder / "metrics.jsonl"
        line = json.dumps({"time_s": round(time.time(), 3), **values}) + "\n"
        with path.open("ab+") as file:
            _end_torn_line(file)
            file.write(line.encode())

    def above(self) -> list[dict[str, Any]]:
        """The manifest of every stage that this one rests on, each after those it depends on itself.

        Each has `cached` too: whether it was there before the run that builds this stage began.
        """
        began_unix_s = float(os.environ.get(RUN_BEGAN, "0"))
        manifests: dict[str, dict[str, Any]] = {}

        def walk(stage: Stage[Artifact]) -> None:
            for parent in upstream(stage):
                if parent.key not in manifests:
                    walk(parent)
                    manifest = self._store.artifact(parent).manifest()
                    manifests[parent.key] = manifest | {"cached": manifest["finished_unix_s"] < began_unix_s}

        walk(self.stage)
        return list(manifests.values())

    @contextmanager
    def progress(self, total: int, unit: str) -> Iterator[Progress]:
        """One bar on the terminal; silent where there is none."""
        if rank() != 0 or not sys.stderr.isatty():
            yield _Silent()
            return
        from tqdm import tqdm

        with tqdm(total=total, unit=f" {unit}", desc=self.stage.name, file=sys.stderr) as bar:
            yield _Bar(bar)


class _Silent:
    def advance(self, num: int = 1) -> None:
        pass


class _Bar:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def advance(self, num: int = 1) -> None:
        self._bar.update(num)


def _end_torn_line(file: Any) -> None:
    """Cut off what a killed process left of its last line."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(cast(bytes, file.read()).rfind(b"\n") + 1)
