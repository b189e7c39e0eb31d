"""What every source gives: records, each with its place for error messages."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Record:
    """A row as the source has it, before the task has said what its columns mean.

    where: the place that an error names: "rows.jsonl, line 3". part and number: a row without an id of its own is called "part-number".
    split: "" where the source does not say.
    """

    where: str
    values: Mapping[str, object]
    part: str
    number: int
    split: str = ""


class Source(Protocol):
    """Where rows come from. Implementations are frozen dataclasses, so that they are part of a stage's key."""

    def records(self) -> Iterator[Record]: ...

    def describe(self) -> str:
        """The source in error messages."""
        ...


def text_of(value: object) -> str | None:
    """A cell as text, or None for what is not text, a number or a list of texts.

    A list of options becomes "(a) bank (b) library", as multiple-choice prompts show them.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, (list, tuple)) and value and len(value) <= 26 and all(isinstance(item, str) for item in value):
        return " ".join(f"({letter}) {item}" for letter, item in zip(string.ascii_lowercase, value, strict=False))
    return None
