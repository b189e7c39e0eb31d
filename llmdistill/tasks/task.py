"""A task: rows with fields, a split and perhaps a known answer; the text that a student reads; the kind of answer.

The source says where rows come from, the answer how a label is read and compared; the task names the columns and joins the two. Reading is strict: a row that
is not what the task says stops the run with the file, the line, the column and the remedy, since a row that is left out in silence is a wrong measurement.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from llmdistill.core.fingerprint import speed
from llmdistill.tasks.answers.answer import Answer
from llmdistill.tasks.sources.record import Record, Source, text_of
from llmdistill.tasks.splits import SPLITS, split_of

_SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: what the prompt is rendered with, and the known answer in canonical form where there is one."""

    id: str
    fields: Mapping[str, str]
    gold: str | None
    split: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows, how a student reads them, and how answers are read.

    input_template: the student's input, with the names of columns in braces: "{premise} {hypothesis}".
    gold_column: the column of the known answer; "" where the rows are unlabelled. A null or empty cell is a row without a known answer.
    gold_after: the known answer is what follows the last of these marks in the gold column ("####" in GSM8K's files); "" takes the whole cell.
    id_column: the column of the row's id; "" numbers the rows of each file, so that an id is stable as long as rows are added at the end.
    split_column: the column that says train, validation or test; "" goes by the stable hash of the id.
    test_share, validation_share: how many rows the hash puts there. A share does not count where the source itself marks the rows of that split (a test file).
    """

    name: str = speed("task")
    source: Source
    answer: Answer
    input_template: str = "{input}"
    gold_column: str = ""
    gold_after: str = ""
    id_column: str = ""
    split_column: str = ""
    test_share: float = 0.15
    validation_share: float = 0.1

    def __post_init__(self) -> None:
        if not (0 <= self.test_share <= 1 and 0 <= self.validation_share <= 1 and self.test_share + self.validation_share <= 1):
            raise ValueError(
                f"Task.test_share is {self.test_share} and validation_share {self.validation_share}: give shares from 0 to 1 that add up to at most 1"
            )
        if not self.input_columns:
            raise ValueError(f"Task.input_template is {self.input_template!r}, which names no column: write one in braces, such as {{input}}")
        for column in self.input_columns:
            if not column or set(column) & set(".[]"):
                raise ValueError(f"Task.input_template is {self.input_template!r}: {{{column}}} is not a plain name; rename the column in the file")
        if self.gold_after and not self.gold_column:
            raise ValueError(f"Task.gold_after is {self.gold_after!r} but gold_column is empty: name the column that it is cut from")
        if self.gold_column and self.gold_column in self.input_columns:
            raise ValueError(f"Task.input_template shows the student the known answer ({{{self.gold_column}}}): leave it out")

    @cached_property
    def input_columns(self) -> tuple[str, ...]:
        """The columns that the student's input is made of."""
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.input_template) if name is not None)

    def rows(self) -> list[Row]:
        """Every row of every split, in the source's order; raises where a row is not what the task says, or an id is given twice."""
        records = list(self.source.records())
        if not records:
            raise ValueError(f"the task {self.name!r} has no rows: {self.source.describe()} is empty")
        self._require_columns(records)
        given = {record.split for record in records}
        shares = {
            "test_share": 0.0 if "test" in given else self.test_share,
            "validation_share": 0.0 if "validation" in given else self.validation_share,
        }
        places: dict[str, str] = {}
        rows = []
        for record in records:
            row = self._row(record, shares)
            if row.id in places:
                raise ValueError(f"{record.where}: the id {row.id!r} was already given in {places[row.id]}; remove one of the rows or rename its id")
            places[row.id] = record.where
            rows.append(row)
        return rows

    def text(self, row: Row) -> str:
        """What the student reads, without the prefix of its training task."""
        return self.input_template.format_map(row.fields)

    def is_correct(self, row: Row, output: str) -> bool:
        """Whether an output is the row's known answer; an output that cannot be read is wrong."""
        if row.gold is None:
            raise ValueError(f"the row {row.id!r} has no known answer to score against: score rows whose gold is given")
        parsed = self.answer.parse(output)
        return parsed is not None and self.answer.same(parsed, row.gold)

    def _require_columns(self, records: list[Record]) -> None:
        """A column that no row has is a mistake in the settings, not in a row."""
        columns = dict.fromkeys(name for record in records for name in record.values)
        options = {"gold_column": self.gold_column, "id_column": self.id_column, "split_column": self.split_column}
        wanted = [("input_template", name) for name in self.input_columns] + [(option, name) for option, name in options.items() if name]
        for option, name in wanted:
            if name not in columns:
                raise ValueError(
                    f"{self.source.describe()} has no column {name!r}, which Task.{option} names; "
                    f"its columns are {', '.join(map(repr, columns))}: name one of them"
                )

    def _row(self, record: Record, shares: Mapping[str, float]) -> Row:
        row_id = self._cell(record, self.id_column, "give every row an id") if self.id_column else f"{record.part}-{record.number}"
        for column in self.input_columns:
            self._cell(record, column, "fill it in or remove the row")
        kept_apart = {self.gold_column, self.id_column, self.split_column}
        fields = {name: text for name, value in record.values.items() if name not in kept_apart and (text := text_of(value)) is not None}
        split = record.split or self._stated_split(record) or split_of(row_id, **shares)
        return Row(id=row_id, fields=fields, gold=self._gold(record), split=split)

    def _cell(self, record: Record, column: str, remedy: str) -> str:
        value = record.values.get(column)
        text = text_of(value)
        if text is None or not text.strip():
            what = "missing or empty" if value is None or text is not None else f"a {type(value).__name__}, where text, a number or a list of texts is expected"
            raise ValueError(f"{record.where}, column {column!r}: the value is {what}; {remedy}")
        return text

    def _stated_split(self, record: Record) -> str:
        if not self.split_column:
            return ""
        text = self._cell(record, self.split_column, f"write one of {', '.join(SPLITS)}").strip().lower()
        if text not in _SPLIT_NAMES:
            raise ValueError(f"{record.where}, column {self.split_column!r}: the split is {text!r}; write one of {', '.join(SPLITS)}")
        return _SPLIT_NAMES[text]

    def _gold(self, record: Record) -> str | None:
        value = record.values.get(self.gold_column) if self.gold_column else None
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        text = self._cell(record, self.gold_column, "fill it in")
        if self.gold_after:
            _, mark, text = text.rpartition(self.gold_after)
            if not mark:
                raise ValueError(
                    f"{record.where}, column {self.gold_column!r}: {text!r:.80} has no {self.gold_after!r} before the answer; correct the row or gold_after"
                )
        gold = self.answer.parse(text)
        if gold is None:
            raise ValueError(
                f"{record.where}, column {self.gold_column!r}: {text!r:.80} is not {self.answer.describe()}; "
                "correct the cell, or empty it if the answer is not known"
            )
        return gold
