"""A pipeline for the tests of the command line: slow enough to be killed, quick enough to be tested, and without torch."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmdistill.core.artifacts import Artifact
from llmdistill.core.pipeline import main
from llmdistill.core.run import Run, Stopped
from llmdistill.core.stage import Launcher, Stage, speed


@dataclass(frozen=True, kw_only=True)
class Squares:
    """n * n"""

    kind: ClassVar[str] = "squares"

    def value(self, number: int) -> int:
        return number * number


@dataclass(frozen=True, kw_only=True)
class Multiples:
    """n * factor"""

    kind: ClassVar[str] = "multiples"
    factor: int

    def value(self, number: int) -> int:
        return number * self.factor


Series = Squares | Multiples


@dataclass(frozen=True, kw_only=True)
class Count(Stage[Artifact]):
    """Writes one line a number and, beside it, which process wrote it; goes on after the last whole line."""

    artifact = Artifact
    series: Series
    num_lines: int
    pause_s: float = speed(0.0)
    failure: str = speed("")

    def build(self, run: Run) -> Mapping[str, int]:
        if self.failure == "error":
            raise RuntimeError("failed as asked")
        if self.failure == "stop":
            raise Stopped("the budget is spent")
        with (run.folder / "lines.txt").open("ab+") as file, (run.folder.parent / "writers.txt").open("a") as writers:
            file.seek(0)
            whole = file.read().rpartition(b"\n")[0]
            num_done = whole.count(b"\n") + 1 if whole else 0
            file.truncate(len(whole) + 1 if whole else 0)
            for number in range(num_done, self.num_lines):
                file.write(f"{self.series.value(number)}".encode())
                file.flush()
                time.sleep(self.pause_s)
                file.write(b"\n")
                writers.write(f"{os.getpid()}\n")
                writers.flush()
        return {"num_lines": self.num_lines}

    def plan(self, run: Run) -> Mapping[str, float]:
        return {"num_rows": self.num_lines, "cost_dollars": 0.001 * self.num_lines}


@dataclass(frozen=True, kw_only=True)
class Add(Stage[Artifact]):
    """Adds the lines up, as a stage that trains would: in as many processes as the launcher starts, each with its share."""

    artifact = Artifact
    launcher = Launcher.ACCELERATE
    count: Stage[Artifact]

    def build(self, run: Run) -> Mapping[str, int | str | None]:
        rank, num_processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        lines = (run.artifact(self.count).folder / "lines.txt").read_text().splitlines()
        (run.folder / f"part-{rank}.tmp").write_text(str(sum(int(line) for line in lines[rank::num_processes])))
        (run.folder / f"part-{rank}.tmp").rename(run.folder / f"part-{rank}.txt")
        if rank == 0:
            parts = [run.folder / f"part-{number}.txt" for number in range(num_processes)]
            while not all(part.exists() for part in parts):
                time.sleep(0.05)
            (run.folder / "sum.txt").write_text(str(sum(int(part.read_text()) for part in parts)))
        told = {"precision": os.environ.get("ACCELERATE_MIXED_PRECISION"), "fsdp_offload": os.environ.get("FSDP_OFFLOAD_PARAMS")}
        return {"num_processes": num_processes, **told}

    def plan(self, run: Run) -> Mapping[str, int]:
        return {"num_lines": len((run.artifact(self.count).folder / "lines.txt").read_text().splitlines())}


@dataclass(frozen=True, kw_only=True)
class Summary(Stage[Artifact]):
    """Puts the sum into words."""

    artifact = Artifact
    parts: tuple[Stage[Artifact], ...]
    template: Path

    def build(self, run: Run) -> Mapping[str, int]:
        sums = [(run.artifact(part).folder / "sum.txt").read_text() for part in self.parts]
        (run.folder / "summary.txt").write_text(self.template.read_text().format(*sums))
        return {}


def pipeline(
    series: Series = Squares(),
    num_lines: int = 20,
    pause_s: float = 0.0,
    failure: str = "",
    template: Path = Path(__file__).with_name("counting.txt"),
) -> Stage[Artifact]:
    """Count, add up, say so.

    Args:
        series: what to count
        num_lines: how far
        pause_s: between two lines
        failure: how to fail
        template: what to say
    """
    count = Count(series=series, num_lines=num_lines, pause_s=pause_s, failure=failure)
    more = Count(name="count_more", series=series, num_lines=num_lines + 1, pause_s=pause_s)
    return Summary(parts=(Add(count=count), Add(name="add_more", count=more)), template=template)


if __name__ == "__main__":
    main(pipeline)
