"""A bag-of-words classifier, trained on the labels that the students learn from and evaluated on the same rows.

It says how hard the task is for a model that hardly sees the order of words. Its accuracy stands beside the students' in the report, so that nobody takes an
easy task for a good student.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from llmdistill.core.artifacts import Evaluation, Rationales
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage
from llmdistill.stages import scoring
from llmdistill.stages.distil import Labels
from llmdistill.stages.evaluate import machine, write
from llmdistill.tasks.answers.choice import Choice
from llmdistill.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class EvaluateBaseline(Stage[Evaluation]):
    """What a bag of words, fitted to the teacher's labels of the train rows, scores on one split of a task."""

    artifact = Evaluation

    task: Task
    rationales: Stage[Rationales]
    labels: Labels = Labels.TEACHER
    """Whose labels it learns; give the students' own."""
    min_confidence: float = 0.0
    """Rows on which fewer of the teacher's samples agreed are left out, as for the students."""
    split: str = "test"
    inverse_regularisation: float = 10.0
    latency_repeats: int = 40

    def __post_init__(self) -> None:
        if not isinstance(self.task.answer, Choice):
            raise ValueError(
                f"a bag of words chooses among labels, and the answers of task {self.task.name!r} are {self.task.answer.describe()}; leave the baseline out"
            )
        if self.split not in ("train", "validation", "test"):
            raise ValueError(f"EvaluateBaseline.split is {self.split!r}; give train, validation or test")
        if self.latency_repeats < 2:
            raise ValueError(f"EvaluateBaseline.latency_repeats is {self.latency_repeats}; give 2 or more")

    @property
    def student_name(self) -> str:
        """What the report calls it."""
        return "bag of words"

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        from llmdistill.tasks.baseline import BagOfWords

        rows = scoring.rows_of_split(self.task, self.split)
        rationales = run.artifact(self.rationales)
        rows_of_train = [row for row in rationales.rows() if row.split == "train" and row.confidence >= self.min_confidence]
        lessons = [(row.input, label) for row in rows_of_train if (label := row.label if self.labels is Labels.TEACHER else row.gold) is not None]
        if not lessons:
            raise ValueError("no train row has a label to fit the bag of words to; annotate split train, lower min_confidence, or learn the teacher's labels")
        model = BagOfWords.fit(*map(list, zip(*lessons, strict=True)), inverse_regularisation=self.inverse_regularisation)
        texts = [self.task.text(row) for row in rows]
        lines = scoring.predictions(self.task, rows, model.predict(texts), scoring.teacher_answers(rationales))
        summary: dict[str, Any] = {
            "task": {"name": self.task.name, "split": self.split},
            "num_training_rows": len(lessons),
            "num_cut_short": 0,
            **scoring.score(self.task, rows, lines),
            "parameters": model.weight.numel() + model.bias.numel(),
            "weight_bytes": None,
            **_latency(lambda index: model.predict([texts[index % len(texts)]]), self.latency_repeats),
            "tokens_per_second_batch_1": None,
            "tokens_per_second_batch_32": None,
            "peak_memory_bytes": None,
            "samples": [],
            "machine": machine("cpu"),
        }
        return write(run.folder, lines, summary)


def _latency(answer: Callable[[int], object], repeats: int) -> dict[str, float]:
    """Wall-clock time of one answer at a time, after one that is not counted."""
    seconds = []
    for index in range(-1, repeats):
        begin = time.perf_counter()
        answer(max(index, 0))
        if index >= 0:
            seconds.append(time.perf_counter() - begin)
    percentiles = quantiles(seconds, n=20, method="inclusive")
    return {"latency_ms_batch_1": round(percentiles[9] * 1000, 4), "latency_p95_ms_batch_1": round(percentiles[18] * 1000, 4)}
