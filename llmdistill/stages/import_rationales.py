"""Rationales without a teacher: from our own exports, or from the files published with Distilling step-by-step."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmdistill.core.artifacts import Rationales
from llmdistill.core.fingerprint import content_sha256
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage
from llmdistill.tasks.answers.answer import Answer
from llmdistill.tasks.task import Row, Task
from llmdistill.teach.judged import Account, Judged, write_judged
from llmdistill.teach.parse import Parsed, Refusal, parse_completion
from llmdistill.teach.published import check_published, read_published
from llmdistill.teach.rationale_files import REQUIRED_COLUMNS, read_rationale_file
from llmdistill.teach.verify import Verification, verify

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
UNCOUNTED = Account(num_completions=0, num_asked=0, tokens_in=math.nan, tokens_out=math.nan, seconds=math.nan, cost_dollars=math.nan)


@dataclass(frozen=True, kw_only=True)
class ImportRationales(Stage[Rationales]):
    """Rows with columns input, label, rationale (and id, split, gold, confidence where they are known) from a .jsonl or .parquet file or a saved dataset.

    answer: how labels are read and compared.
    split: of rows that do not say theirs.
    model: who wrote them, for the report.
    """

    artifact = Rationales

    path: Path
    answer: Answer
    split: str = "train"
    model: str = "imported"
    verification: Verification = field(default_factory=Verification)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"ImportRationales.split is {self.split!r}: give one of {', '.join(SPLITS)}")

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        judged: list[Judged] = []
        places: dict[str, str] = {}
        for number, (where, values) in enumerate(read_rationale_file(self.path)):
            row = self._row(number, where, values)
            if row.id in places:
                raise ValueError(f"{where}: the id {row.id!r} was already given at {places[row.id]}; ids must be unique")
            places[row.id] = where
            judged.append(row)
        if not judged:
            raise ValueError(f"{self.path} holds no rationales")
        revision = f"sha256:{content_sha256(self.path)}"
        summary = write_judged(run.folder, judged, answer=self.answer, model=self.model, revision=revision, account=_account(len(judged)))
        return _figures(summary)

    def _row(self, number: int, where: str, values: Mapping[str, object]) -> Judged:
        text = {column: _text(values, column, where) for column in REQUIRED_COLUMNS}
        row_id = _text(values, "id", where) if values.get("id") is not None else f"row-{number}"
        split = _text(values, "split", where) if values.get("split") is not None else self.split
        if split not in SPLITS:
            raise ValueError(f"{where}: the split is {split!r}, which is none of {', '.join(SPLITS)}")
        gold = None
        if values.get("gold") is not None:
            gold = self.answer.parse(_text(values, "gold", where))
            if gold is None:
                raise ValueError(f"{where}: the known label {values['gold']!r} is not {self.answer.describe()}; correct it or leave it out")
        label = self.answer.parse(text["label"])
        rationale = text["rationale"].strip()
        sample = Refusal.UNPARSABLE if label is None else Parsed(rationale=rationale, label=label)
        verdict = verify([sample], self.answer, self.verification, gold=gold if split != "test" else None)
        confidence = values.get("confidence")
        if confidence is not None:
            if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 <= confidence <= 1:
                raise ValueError(f"{where}: the confidence is {confidence!r}; it must be a number from 0 to 1")
            verdict = replace(verdict, confidence=float(confidence))
        completion = f"{text['rationale']} {text['label']}"
        return Judged(id=row_id, split=split, input=text["input"], gold=gold, verdict=verdict, completion=completion)


@dataclass(frozen=True, kw_only=True)
class PublishedRationales(Stage[Rationales]):
    """The files `{split}_CoT_{i}.json` in a folder, aligned by position with the rows of a task, file by file.

    task: its source gives the rows in the order of the published files (`svamp_train.json`, then `svamp_test.json` as the test file); rows that the task's
    hash takes out of the training file for validation keep their place in it.
    model: whose completions they are.
    run_on: what begins an invented next question; completions are cut there.
    max_misplaced_share: how many completions may fit another row far better than their own before the order counts as wrong.

    On SVAMP the authors report that 73.5% of PaLM's train labels and 74.0% of its test labels are right; this stage counts 74.25% and 77.5%. They read an answer
    from its first bracket to its last, which makes `(12 - 2) - 7` into `(12 - 2)`; read so, 73.25% and 74.0% are right here.
    """

    artifact = Rationales

    task: Task
    folder: Path
    model: str = "PaLM 540B"
    answer_marker: str = "The answer is"
    run_on: tuple[str, ...] = ("Q:",)
    max_misplaced_share: float = 0.0
    verification: Verification = field(default_factory=Verification)

    def __post_init__(self) -> None:
        if not 0 <= self.max_misplaced_share <= 1:
            raise ValueError(f"PublishedRationales.max_misplaced_share is {self.max_misplaced_share}: it is a share from 0 to 1")

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        if not self.folder.is_dir():
            raise ValueError(f"there is no folder {str(self.folder)!r} with published completions (train_CoT_0.json, ...)")
        judged: list[Judged] = []
        num_completions, num_in_place, num_misplaced = 0, 0, 0
        for part, rows in self._rows_by_file().items():
            files = read_published(self.folder, part)
            if not files:
                if part == "train":
                    raise ValueError(f"there is no train_CoT_0.json in {self.folder}: name the folder with the published completions")
                logger.warning("%s has no %s_CoT_0.json: its %d rows are left out", self.folder, part, len(rows))
                continue
            texts = [self.task.text(row) for row in rows]
            alignment = check_published(files, texts, run_on=self.run_on, max_misplaced_share=self.max_misplaced_share)
            if alignment.num_in_place < alignment.num_completions / 2:
                logger.warning("the %s completions share too few words with their rows for their order to be checked", part)
            num_completions += alignment.num_completions
            num_in_place += alignment.num_in_place
            num_misplaced += len(alignment.misplaced)
            completions = [completion for file in files for completion in file.completions]
            judged += [self._judge(row, completion) for row, completion in zip(rows, completions, strict=True)]
        revision = f"sha256:{content_sha256(self.folder)}"
        summary = write_judged(run.folder, judged, answer=self.task.answer, model=self.model, revision=revision, account=_account(num_completions))
        return {**_figures(summary), "order_in_place_share": num_in_place / num_completions, "order_misplaced_share": num_misplaced / num_completions}

    def _rows_by_file(self) -> dict[str, list[Row]]:
        """The rows of each published file, in its order: what the source marks as test or validation has a file of its own, the rest is train."""
        parts: dict[str, list[Row]] = {"train": []}
        names = {"": "train", "train": "train", "validation": "valid", "test": "test"}
        for record, row in zip(self.task.source.records(), self.task.rows(), strict=True):
            parts.setdefault(names[record.split], []).append(row)
        return parts

    def _judge(self, row: Row, completion: str) -> Judged:
        # Nothing says how a completion ended; an answer without its closing bracket was cut by the limit on tokens.
        sample = parse_completion(completion, self.task.answer, answer_marker=self.answer_marker, run_on=self.run_on, finish_reason="length")
        verdict = verify([sample], self.task.answer, self.verification, gold=row.gold if row.split != "test" else None)
        return Judged(id=row.id, split=row.split, input=self.task.text(row), gold=row.gold, verdict=verdict, completion=completion)


def _text(values: Mapping[str, object], column: str, where: str) -> str:
    value = values.get(column)
    if not isinstance(value, str):
        what = "missing" if column not in values else f"{value!r:.60}, which is not text"
        raise ValueError(f"{where}: the column {column!r} is {what}; {', '.join(REQUIRED_COLUMNS)} are needed as text")
    return value


def _account(num_completions: int) -> Account:
    return replace(UNCOUNTED, num_completions=num_completions)


def _figures(summary: Mapping[str, object]) -> dict[str, JsonScalar]:
    return {name: value for name, value in summary.items() if isinstance(value, (int, float, str)) or value is None}
