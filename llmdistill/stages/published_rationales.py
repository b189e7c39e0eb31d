"""Rationales from the files published with Distilling step-by-step (Hsieh et al. 2023), which stand in the order of a task's rows and name none of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmdistill.core.artifacts import Rationales
from llmdistill.core.fingerprint import content_sha256
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage
from llmdistill.tasks.answers.equation import Equation
from llmdistill.tasks.task import Row, Task
from llmdistill.teach.judged import Judged, figures_of, uncounted, write_judged
from llmdistill.teach.parse import parse_completion
from llmdistill.teach.published import check_published, equation_by_published_rule, read_published
from llmdistill.teach.verify import Verification, verify

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PublishedRationales(Stage[Rationales]):
    """The files `{split}_CoT_{i}.json` in a folder, aligned by position with the rows of a task, file by file.

    task: its source gives the rows in the order of the published files (`svamp_train.json`, then `svamp_test.json` as the test file); rows that the task's
    hash takes out of the training file for validation keep their place in it.
    model: whose completions they are.
    run_on: what begins an invented next question; completions are cut there.
    max_misplaced_share: how many completions may fit another row far better than their own before the order counts as wrong.

    On SVAMP the authors report that 73.5% of PaLM's train labels and 74.0% of its test labels are right; this stage counts 74.25% and 77.5%, since it reads a
    whole expression where they read what stands in brackets (`equation_by_published_rule`): of "The answer is (12 - 2) - 7." they see (12 - 2). For a task
    whose answers are equations the accuracy by their rule is in the summary too, as accuracy_published_rule and accuracy_train_published_rule; it is theirs.
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
        summary = write_judged(run.folder, judged, answer=self.task.answer, model=self.model, revision=revision, account=uncounted(num_completions))
        summary |= self._by_published_rule(judged)
        (run.folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        return {**figures_of(summary), "order_in_place_share": num_in_place / num_completions, "order_misplaced_share": num_misplaced / num_completions}

    def plan(self, run: Run) -> Mapping[str, JsonScalar]:
        """How many rows there are; nothing is asked."""
        return {"num_rows": len(self.task.rows())}

    def _by_published_rule(self, judged: Sequence[Judged]) -> dict[str, float | None]:
        """The teacher's accuracy as the authors count it, on the test rows and on all others."""
        if not isinstance(self.task.answer, Equation):
            return {}
        shares: dict[str, float | None] = {}
        for name, is_test in (("accuracy_published_rule", True), ("accuracy_train_published_rule", False)):
            labels = [(equation_by_published_rule(row.completion), row.gold) for row in judged if (row.split == "test") == is_test and row.gold is not None]
            shares[name] = sum(self.task.answer.same(label, gold) for label, gold in labels) / len(labels) if labels else None
        return shares

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
