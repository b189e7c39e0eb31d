"""Artefacts: typed views of the finished folders in the store.

An artefact is only a folder and the few readers that other rooms need; it never writes. Stages write plain files (JSON, JSON lines,
safetensors), so that everything here can be read with any other tool too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPRESSION = "compression.json"
"""Beside a checkpoint that was compressed: what was done to each layer, for the report."""
CALIBRATION = "calibration.json"
"""Beside a checkpoint whose exits were calibrated: loss, accuracy and depth at every threshold, for the report."""
SEARCH = "search.json"
"""In the folder of a search among sub-networks: everything that it found."""


@dataclass(frozen=True)
class Artifact:
    """A finished folder."""

    folder: Path

    def manifest(self) -> dict[str, Any]:
        """Settings, upstream keys, versions, seconds, peak memory and figures of the stage that wrote the folder."""
        return read_json(self.folder / "manifest.json")


@dataclass(frozen=True)
class Checkpoint(Artifact):
    """A Hugging Face model folder, with its tokenizer, model card and lineage."""

    def lineage(self) -> list[dict[str, Any]]:
        """Every technique applied so far, the first one first."""
        return read_json(self.folder / "lineage.json")

    def model_card(self) -> str:
        """The text of README.md."""
        return (self.folder / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class RationaleRow:
    """One row that the teacher labelled and explained; a line of rationales.jsonl has exactly these columns."""

    id: str
    split: str
    input: str
    label: str
    rationale: str
    gold: str | None
    confidence: float

    def __post_init__(self) -> None:
        if self.split not in ("train", "validation", "test"):
            raise ValueError(f"row {self.id!r} has split {self.split!r}; use train, validation or test")
        if not 0.0 <= self.confidence <= 1.0:
            raise ValueError(f"row {self.id!r} has confidence {self.confidence}; it must lie in [0, 1]")


@dataclass(frozen=True)
class Rationales(Artifact):
    """The rows that a teacher labelled and explained, those that were refused, and the teacher's account."""

    def rows(self) -> list[RationaleRow]:
        """The rows that were kept (rationales.jsonl)."""
        columns = {field.name for field in dataclasses.fields(RationaleRow)}
        rows = []
        for number, values in enumerate(read_json_lines(self.folder / "rationales.jsonl"), start=1):
            if set(values) != columns:
                raise ValueError(f"{self.folder / 'rationales.jsonl'} line {number} has columns {sorted(values)}; it needs {sorted(columns)}")
            rows.append(RationaleRow(**values))
        return rows

    def refused(self) -> list[dict[str, Any]]:
        """The rows that were not kept, with the reason (refused.jsonl)."""
        return list(read_json_lines(self.folder / "refused.jsonl"))

    def summary(self) -> dict[str, Any]:
        """Counts, accuracy, tokens, seconds and cost of the teacher (summary.json)."""
        return read_json(self.folder / "summary.json")


@dataclass(frozen=True)
class Evaluation(Artifact):
    """What a student scored, and each of its predictions."""

    def summary(self) -> dict[str, Any]:
        """Every figure, with units in the names (summary.json)."""
        return read_json(self.folder / "summary.json")

    def predictions(self) -> list[dict[str, Any]]:
        """One object a row (predictions.jsonl)."""
        return list(read_json_lines(self.folder / "predictions.jsonl"))


@dataclass(frozen=True)
class FoundSubnets(Artifact):
    """What a search among the sub-networks of an elastic checkpoint has found."""

    def found(self) -> dict[str, Any]:
        """The points worth having, predicted and measured, the chosen one, and how good the predictors are (search.json)."""
        return read_json(self.folder / SEARCH)


@dataclass(frozen=True)
class Report(Artifact):
    """The report of a pipeline: report.json for programs, report.html for people."""

    @property
    def page(self) -> Path:
        """The one-file page."""
        return self.folder / "report.html"

    def data(self) -> dict[str, Any]:
        """Every figure (report.json)."""
        return read_json(self.folder / "report.json")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one JSON object a line."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
