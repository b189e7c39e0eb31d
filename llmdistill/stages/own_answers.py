"""A student's own answers as rationales: what compression calibrates on and recovers to where nobody else has labelled the rows.

A compressed student should do what the whole one did, right or wrong; so its own answers are the labels that no row lacks. They say nothing about the truth:
accuracy needs known labels, which the task may have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmdistill.core.artifacts import Checkpoint, Rationales
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage, speed
from llmdistill.stages.answering import EXPLAIN, PREDICT, Answering
from llmdistill.stages.evaluate import device_name
from llmdistill.tasks.task import Row, Task
from llmdistill.teach.judged import Judged, figures_of, uncounted, write_judged
from llmdistill.teach.parse import Refusal
from llmdistill.teach.verify import Verdict


@dataclass(frozen=True, kw_only=True)
class OwnAnswers(Stage[Rationales]):
    """The label that a checkpoint writes for each row, and the reason where it was taught to give one; unreadable answers are refused and counted."""

    artifact = Rationales

    checkpoint: Stage[Checkpoint]
    task: Task
    max_new_tokens: int = 64
    max_rationale_tokens: int = 128
    max_batch_rows: int = speed(32)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_rationale_tokens", "max_batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"OwnAnswers.{name} is {getattr(self, name)}; give 1 or more")

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        folder = run.artifact(self.checkpoint).folder
        student = Answering.load(folder, device=device_name(), max_batch_rows=self.max_batch_rows)
        rows = self.task.rows()
        texts = [self.task.text(row) for row in rows]
        answers = student.answers(PREDICT, texts, max_new_tokens=self.max_new_tokens)
        reasons = student.answers(EXPLAIN, texts, max_new_tokens=self.max_rationale_tokens) if student.can(EXPLAIN) else [""] * len(rows)
        judged = [self._judge(row, answer, reason) for row, answer, reason in zip(rows, answers, reasons, strict=True)]
        summary = write_judged(
            run.folder,
            judged,
            answer=self.task.answer,
            model=f"{self.checkpoint.name}, its own answers",
            revision=self.checkpoint.key,
            account=uncounted(len(rows)),
        )
        return figures_of(summary)

    def plan(self, run: Run) -> Mapping[str, JsonScalar]:
        """How many rows there are."""
        return {"num_rows": len(self.task.rows())}

    def _judge(self, row: Row, answer: str, reason: str) -> Judged:
        label = self.task.answer.parse(answer)
        refusal = Refusal.UNPARSABLE if label is None else None
        verdict = Verdict(refusal=refusal, label=label, rationale=" ".join(reason.split()), confidence=1.0, sample=0)
        return Judged(id=row.id, split=row.split, input=self.task.text(row), gold=row.gold, verdict=verdict, completion=f"{reason} {answer}")
