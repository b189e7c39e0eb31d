"""What a file of rows is about, as far as its columns tell: which is the label, which are the input, what kind of answers there are.

Guesses are written out in the files that `init` makes, where they can be read and changed; where the columns do not tell, an error says which option does.
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmdistill.tasks.answers.number import Number
from llmdistill.tasks.sources.record import text_of
from llmdistill.tasks.sources.table import Table

LABEL_NAMES = ("label", "gold", "intent", "class", "category", "sentiment", "topic", "answer", "target", "output")
ID_NAMES = ("id", "uid", "uuid", "row_id")
SPLIT_VALUES = {"train", "validation", "valid", "val", "dev", "test"}
MAX_CHOICES = 50
_BEGINS_WITH_DIGIT = re.compile(r"\W*\d")
MAX_CHOICE_CHARACTERS = 60


class AnswerKind(enum.Enum):
    """What the answers are."""

    FROM_LABELS = "as the label column tells"
    CHOICES = "choices"
    NUMBER = "number"
    EQUATION = "equation"
    TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class Guess:
    """The columns of a file, by what they are for; "" where there is none."""

    data: Path
    num_rows: int
    inputs: tuple[str, ...]
    label: str
    id: str
    split: str
    answer: AnswerKind
    choices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Said:
    """What is not said here is guessed."""

    input: tuple[str, ...] = ()
    """Columns that the student reads; all but label, id and split where none is named."""
    label: str = ""
    """Column of the known labels."""
    choices: tuple[str, ...] = ()
    """The labels to choose from."""
    answer: AnswerKind = AnswerKind.FROM_LABELS
    """What an answer is."""


def guess(data: Path, said: Said) -> Guess:
    """Look at the file's columns."""
    rows = [record.values for record in Table(path=data).records()]
    if not rows:
        raise ValueError(f"{data} has no rows")
    columns = {name: [text_of(row.get(name)) for row in rows] for row in rows for name in row}
    for name in (*said.input, *filter(None, [said.label])):
        if name not in columns:
            raise ValueError(f"{data} has no column {name!r}; it has {', '.join(columns)}")
    id_column = next((name for name in ID_NAMES if name in columns and _is_id(columns[name])), "")
    split = "split" if "split" in columns and {str(value).lower() for value in columns["split"]} <= SPLIT_VALUES else ""
    free = [name for name in columns if name not in {id_column, split, *said.input}]
    label = said.label or _label(free, columns)
    labels = [value for value in columns[label] if value] if label else []
    answer = _answer_kind(data, labels, said.choices) if said.answer is AnswerKind.FROM_LABELS else said.answer
    choices = said.choices or (tuple(sorted(set(labels))) if answer is AnswerKind.CHOICES else ())
    if answer is AnswerKind.CHOICES and len(choices) < 2:
        raise ValueError(f"there are {len(choices)} labels to choose from; name them: --choices LABEL LABEL ...")
    inputs = said.input or tuple(name for name in free if name != label and all(columns[name]))
    if not inputs:
        raise ValueError(f"no column of {data} is filled in every row, so none can be the input; name those to read: --input COLUMN ...")
    return Guess(data=data, num_rows=len(rows), inputs=inputs, label=label, id=id_column, split=split, answer=answer, choices=choices)


def _label(free: Sequence[str], columns: Mapping[str, Sequence[str | None]]) -> str:
    """A column with a label's name, or the only one with few values."""
    named = [name for name in LABEL_NAMES if name in free]
    few = [name for name in free if _has_few_values(columns[name])]
    if named:
        return named[0]
    return few[0] if len(few) == 1 and len(free) > 1 else ""


def _answer_kind(data: Path, labels: Sequence[str], choices: Sequence[str]) -> AnswerKind:
    if choices:
        return AnswerKind.CHOICES
    if not labels:
        raise ValueError(
            f"{data} has no column that looks like a label. Name it (--label COLUMN), "
            "or say what the answers are: --choices LABEL LABEL ..., or --answer NUMBER"
        )
    if _has_few_values(labels):
        return AnswerKind.CHOICES
    are_numbers = all(_BEGINS_WITH_DIGIT.match(label) and Number().parse(label) is not None for label in labels)
    return AnswerKind.NUMBER if are_numbers else AnswerKind.TEXT


def _has_few_values(values: Sequence[str | None]) -> bool:
    """As labels have: at least two, short, and each of them several times on average."""
    counts = Counter(value for value in values if value)
    return 2 <= len(counts) <= MAX_CHOICES and counts.total() >= 3 * len(counts) and max(map(len, counts)) <= MAX_CHOICE_CHARACTERS


def _is_id(values: Sequence[str | None]) -> bool:
    return all(values) and len(set(values)) == len(values)
