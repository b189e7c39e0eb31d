"""Rationales from a file in place of a teacher: our own exports, or any rows with the columns input, label and rationale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from llmdistill.core.artifacts import Rationales
from llmdistill.core.fingerprint import content_sha256
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage
from llmdistill.tasks.splits import SPLITS, split_of
from llmdistill.tasks.task import Row, Task
from llmdistill.teach.judged import Judged, figures_of, uncounted, write_judged
from llmdistill.teach.parse import Parsed, Refusal
from llmdistill.teach.rationale_files import REQUIRED_COLUMNS, read_rationale_file
from llmdistill.teach.verify import Verification, verify


@dataclass(frozen=True, kw_only=True)
class RationaleFile:
    """Rationales from a file instead of a teacher: a .jsonl or .parquet file or a saved dataset with columns input, label and rationale."""

    kind: ClassVar[str] = "file"

    path: Path
    model: str = "imported"
    """Who wrote them, for the report."""

    def stage(self, task: Task, verification: Verification) -> Stage[Rationales]:
        """Reads them for this task."""
        return ImportRationales(path=self.path, task=task, model=self.model, verification=verification)


@dataclass(frozen=True, kw_only=True)
class ImportRationales(Stage[Rationales]):
    """Rows with columns input, label, rationale (and id, split, gold, confidence where they are known) from a .jsonl or .parquet file or a saved dataset.

    A row that does not say its id, split or known label is looked up among the task's rows by its text, and has them from there: so three columns are enough,
    and what the students are tested on is not taught. A text that the task does not have goes to train or validation by its hash.

    task: says how labels are read, and which rows are test rows.
    model: who wrote the rationales, for the report.
    """

    artifact = Rationales

    path: Path
    task: Task
    model: str = "imported"
    verification: Verification = field(default_factory=Verification)

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        known = _KnownRows.of(self.task)
        judged: list[Judged] = []
        places: dict[str, str] = {}
        for number, (where, values) in enumerate(read_rationale_file(self.path)):
            row = self._row(number, where, values, known, places)
            if row.id in places:
                raise ValueError(f"{where}: the id {row.id!r} was already given at {places[row.id]}; ids must be unique")
            places[row.id] = where
            judged.append(row)
        if not judged:
            raise ValueError(f"{self.path} holds no rationales")
        revision = f"sha256:{content_sha256(self.path)}"
        summary = write_judged(run.folder, judged, answer=self.task.answer, model=self.model, revision=revision, account=uncounted(len(judged)))
        return figures_of(summary)

    def _row(self, number: int, where: str, values: Mapping[str, object], known: _KnownRows, places: Mapping[str, str]) -> Judged:
        answer = self.task.answer
        text = {column: _text(values, column, where) for column in REQUIRED_COLUMNS}
        given_id = _text(values, "id", where) if values.get("id") is not None else None
        of_task = known.find(given_id, text["input"], where)
        row_id = given_id or (of_task.id if of_task and of_task.id not in places else f"imported-{number}")
        split = self._split(values, where, text["input"], of_task)
        gold = of_task.gold if of_task else None
        if values.get("gold") is not None:
            gold = answer.parse(_text(values, "gold", where))
            if gold is None:
                raise ValueError(f"{where}: the known label {values['gold']!r} is not {answer.describe()}; correct it or leave it out")
        label = answer.parse(text["label"])
        sample = Refusal.UNPARSABLE if label is None else Parsed(rationale=text["rationale"].strip(), label=label)
        verdict = verify([sample], answer, self.verification, gold=gold if split != "test" else None)
        confidence = values.get("confidence")
        if confidence is not None:
            if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 <= confidence <= 1:
                raise ValueError(f"{where}: the confidence is {confidence!r}; it must be a number from 0 to 1")
            verdict = replace(verdict, confidence=float(confidence))
        completion = f"{text['rationale']} {text['label']}"
        return Judged(id=row_id, split=split, input=text["input"], gold=gold, verdict=verdict, completion=completion)

    def _split(self, values: Mapping[str, object], where: str, text: str, of_task: Row | None) -> str:
        """What the row says, else the task's, else by the hash of its text. A test row is never called anything else."""
        if values.get("split") is None:
            return of_task.split if of_task else split_of(text, test_share=0.0, validation_share=self.task.validation_share)
        split = _text(values, "split", where)
        if split not in SPLITS:
            raise ValueError(f"{where}: the split is {split!r}, which is none of {', '.join(SPLITS)}")
        if of_task and of_task.split == "test" and split != "test":
            raise ValueError(
                f"{where}: the split is {split!r}, but the task {self.task.name!r} has this row among its test rows ({of_task.id!r}), and students would be "
                "tested on what they were taught; leave the column split out, or give the task the splits that it had when the rationales were made"
            )
        return split


@dataclass(frozen=True)
class _KnownRows:
    """A task's rows, found by id or by text; of several with the same text a test row comes first."""

    task: Task
    by_id: Mapping[str, Row]
    by_text: Mapping[str, Row]

    @classmethod
    def of(cls, task: Task) -> _KnownRows:
        rows = sorted(task.rows(), key=lambda row: row.split == "test")  # the last of a text stays
        return cls(task=task, by_id={row.id: row for row in rows}, by_text={task.text(row): row for row in rows})

    def find(self, row_id: str | None, text: str, where: str) -> Row | None:
        """The row of this id, else one of this text; a text that is not its row's is an error."""
        if row_id is None or row_id not in self.by_id:
            return self.by_text.get(text)
        row = self.by_id[row_id]
        if self.task.text(row) != text:
            raise ValueError(
                f"{where}: the id {row_id!r} is that of a row of the task {self.task.name!r} which reads {self.task.text(row)!r:.80} and not {text!r:.80}; "
                "give the row an id of its own, or give the task the input_template that it had when the rationales were made"
            )
        return row


def _text(values: Mapping[str, object], column: str, where: str) -> str:
    value = values.get(column)
    if not isinstance(value, str):
        what = "missing" if column not in values else f"{value!r:.60}, which is not text"
        raise ValueError(f"{where}: the column {column!r} is {what}; {', '.join(REQUIRED_COLUMNS)} are needed as text")
    return value
