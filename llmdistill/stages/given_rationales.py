"""Rationales that a task's own rows bring: worked solutions of a generator (reasoning-gym's gsm_symbolic) or explanations that people wrote.

Nobody is asked and nothing is guessed: the label is the known answer, so the teacher's accuracy is 1 by construction, and its name in the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmdistill.core.artifacts import Rationales
from llmdistill.core.fingerprint import fingerprint, sha256_of
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage
from llmdistill.tasks.task import Row, Task
from llmdistill.teach.judged import Judged, figures_of, uncounted, write_judged
from llmdistill.teach.parse import Parsed
from llmdistill.teach.verify import Verification, verify


@dataclass(frozen=True, kw_only=True)
class GivenRationales(Stage[Rationales]):
    """The known answer of every row, and the text in one of its columns as the rationale.

    column: where the rationale stands; spaces and line ends in it become single spaces, as in a teacher's completions.
    verification: limits on the rationale's length; a row without a rationale is refused.
    """

    artifact = Rationales

    task: Task
    column: str = "rationale"
    verification: Verification = field(default_factory=Verification)

    def __post_init__(self) -> None:
        if not self.task.gold_column:
            raise ValueError(
                f"the task {self.task.name!r} has no column of known answers, so nothing is given to learn: set Task.gold_column, or ask a teacher"
            )

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        rows = self.task.rows()
        if not any(self.column in row.fields for row in rows):
            columns = ", ".join(sorted({name for row in rows for name in row.fields}))
            raise ValueError(f"no row of {self.task.source.describe()} has a column {self.column!r} with a rationale; the columns are {columns}: ask a teacher")
        judged = [self._judge(row) for row in rows]
        model = f"none: the known answers of {self.task.source.describe()}"
        revision = f"sha256:{sha256_of(fingerprint(self.task))}"
        summary = write_judged(run.folder, judged, answer=self.task.answer, model=model, revision=revision, account=uncounted(0))
        return figures_of(summary)

    def plan(self, run: Run) -> Mapping[str, JsonScalar]:
        """How many rows there are; nothing is asked."""
        return {"num_rows": len(self.task.rows())}

    def _judge(self, row: Row) -> Judged:
        if row.gold is None:
            raise ValueError(f"the row {row.id!r} of {self.task.source.describe()} has no known answer: fill in {self.task.gold_column!r}, or ask a teacher")
        text = row.fields.get(self.column, "")
        verdict = verify([Parsed(rationale=" ".join(text.split()), label=row.gold)], self.task.answer, self.verification)
        return Judged(id=row.id, split=row.split, input=self.task.text(row), gold=row.gold, verdict=verdict, completion=text)
