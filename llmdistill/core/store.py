"""The store: one folder a key, complete or not there.

    runs/store/<key>/           finished; never written to again
    runs/store/<key>.partial/   being built, or left by a build that was killed: what the next one resumes from
    runs/store/<key>.lock       held by the process that builds (see lock.py)

A build ends by writing manifest.json into the partial folder; then the folder is renamed. A kill between the two loses nothing: a partial
folder with a manifest only needs its rename.
"""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from llmdistill.core.artifacts import Artifact
from llmdistill.core.lock import BuilderLock, token_of
from llmdistill.core.manifest import write_manifest
from llmdistill.core.processes import launch_id, rank
from llmdistill.core.run import Run
from llmdistill.core.stage import A, Stage, upstream


class State(enum.Enum):
    """Of a key, as people read it."""

    COMPLETE = "complete"
    BUILDING = "building"
    PARTIAL = "partial"
    MISSING = "missing"


@dataclass(frozen=True)
class Store:
    """Artefacts by key under one folder."""

    root: Path

    def folder(self, stage: Stage[Artifact]) -> Path:
        """Where the finished artefact lies, or will lie."""
        return self.root / stage.key

    def partial(self, stage: Stage[Artifact]) -> Path:
        """Where the stage builds."""
        return self.root / f"{stage.key}.partial"

    def lock_path(self, stage: Stage[Artifact]) -> Path:
        """What the process that builds the stage holds."""
        return self.root / f"{stage.key}.lock"

    def is_complete(self, stage: Stage[Artifact]) -> bool:
        """Whether there is nothing left to build."""
        return self.folder(stage).is_dir()

    def state(self, key: str) -> State:
        """What there is of a key."""
        if (self.root / key).is_dir():
            return State.COMPLETE
        if token_of(self.root / f"{key}.lock"):
            return State.BUILDING
        return State.PARTIAL if (self.root / f"{key}.partial").is_dir() else State.MISSING

    def artifact(self, stage: Stage[A]) -> A:
        """The finished artefact."""
        return cast(A, stage.artifact(self.folder(stage)))

    def build(self, stage: Stage[A]) -> A:
        """The artefact, built in this process, with what is missing upstream, where it is not there yet."""
        if not self.is_complete(stage):
            for above in upstream(stage):
                self.build(above)
            self.publish(stage, lambda token: self.work(stage))
        return self.artifact(stage)

    def work(self, stage: Stage[Artifact]) -> None:
        """Run the stage's build and write its manifest; the caller has the right to write to the partial folder."""
        run = Run(stage, self)
        is_resumed = any(run.folder.iterdir())
        start = time.monotonic()
        figures = stage.build(run)
        if rank() == 0:
            write_manifest(run.folder, stage, figures, seconds=time.monotonic() - start, is_resumed=is_resumed)

    def publish(self, stage: Stage[Artifact], build: Callable[[str], None], beside: Mapping[str, str] = {}) -> None:
        """Have the partial folder built, unless another run does it first, and make it the finished one.

        `build` is given the token with which processes that it starts may write; `beside` is text to put next to the artefact, by file name.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with BuilderLock(self.lock_path(stage), launch_id()) as lock:
            if not self.is_complete(stage):
                partial = self.partial(stage)
                partial.mkdir(exist_ok=True)
                if not (partial / "manifest.json").exists():
                    build(lock.admit_workers())
                    lock.dismiss_workers()
                for name, text in beside.items():
                    (partial / name).write_text(text, encoding="utf-8")
                _sync(partial)
                partial.rename(self.folder(stage))
            lock.remove()


def _sync(folder: Path) -> None:
    """Put every file on the disk before the rename says that they are there."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
