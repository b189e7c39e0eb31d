"""From answers to figures: the part of evaluation that students, baselines and later techniques share. No model is needed to read a score."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdistill.core.artifacts import Rationales
from llmdistill.statistics import confusion, wilson_interval
from llmdistill.tasks.answers import Choice
from llmdistill.tasks.task import Row, Task

NUM_MISTAKES_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class TeacherAnswer:
    """What the teacher made of a row; label is None where it was refused or not asked."""

    label: str | None
    rationale: str


def teacher_answers(rationales: Rationales) -> dict[str, TeacherAnswer]:
    """By row id: every row that the teacher labelled, kept or refused for its rationale."""
    answers = {str(row["id"]): TeacherAnswer(label=row.get("label"), rationale="") for row in rationales.refused()}
    answers.update({row.id: TeacherAnswer(label=row.label, rationale=row.rationale) for row in rationales.rows()})
    return answers


def rows_of_split(task: Task, split: str) -> list[Row]:
    """The task's rows of one split; an empty one is an error, since its accuracy would be nothing."""
    rows = [row for row in task.rows() if row.split == split]
    if not rows:
        raise ValueError(f"task {task.name!r} has no rows in split {split!r}; give a larger share of rows to it, or mark rows with it")
    return rows


def predictions(task: Task, rows: Sequence[Row], answers: Sequence[str], teacher: Mapping[str, TeacherAnswer]) -> list[dict[str, Any]]:
    """One line of predictions.jsonl for each row: the student's text, what the task reads in it, and whether that is right."""
    lines = []
    for row, text in zip(rows, answers, strict=True):
        answer = task.answer.parse(text)
        by_teacher = teacher.get(row.id)
        label = by_teacher.label if by_teacher else None
        lines.append(
            {
                "id": row.id,
                "gold": row.gold,
                "prediction": answer,
                "teacher_label": label,
                "correct": None if row.gold is None else answer is not None and task.answer.same(answer, row.gold),
                "agrees_with_teacher": None if label is None else answer is not None and task.answer.same(answer, label),
                "teacher_correct": None if row.gold is None or by_teacher is None else label is not None and task.answer.same(label, row.gold),
                "answer": text,
            }
        )
    return lines


def score(task: Task, rows: Sequence[Row], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy and agreement with their intervals, and for choices the confusion matrix; figures that cannot be known are None."""
    with_gold = [line for line in lines if line["correct"] is not None]
    with_teacher = [line for line in lines if line["agrees_with_teacher"] is not None]
    num_correct = sum(line["correct"] for line in with_gold)
    num_agreeing = sum(line["agrees_with_teacher"] for line in with_teacher)
    text_of = {row.id: task.text(row) for row in rows}
    mistakes = [line for line in with_gold if not line["correct"]]
    return {
        "num_rows": len(lines),
        "num_rows_with_gold": len(with_gold),
        "num_correct": num_correct,
        "accuracy": num_correct / len(with_gold) if with_gold else None,
        "accuracy_ci95": list(wilson_interval(num_correct, len(with_gold))) if with_gold else None,
        "num_rows_with_teacher_label": len(with_teacher),
        "agreement_with_teacher": num_agreeing / len(with_teacher) if with_teacher else None,
        "agreement_with_teacher_ci95": list(wilson_interval(num_agreeing, len(with_teacher))) if with_teacher else None,
        "num_unreadable": sum(line["prediction"] is None for line in lines),
        **_by_class(task, with_gold),
        "mistakes": [{"input": text_of[line["id"]], **line} for line in mistakes[:NUM_MISTAKES_SHOWN]],
    }


def _by_class(task: Task, with_gold: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not isinstance(task.answer, Choice) or not with_gold:
        return {"confusion": None, "per_class": None, "macro_f1": None}
    matrix = confusion(task.answer.choices, [line["gold"] for line in with_gold], [line["prediction"] for line in with_gold])
    counts = [list(row) for row in matrix.counts]
    return {"confusion": {"classes": list(matrix.classes), "counts": counts}, "per_class": matrix.per_class(), "macro_f1": matrix.macro_f1()}


def sampled(rows: Sequence[Row], num_rows: int) -> list[Row]:
    """The same few rows for every student, drawn by the hash of their ids and not by how they came out."""
    return sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).digest())[:num_rows]


def weight_bytes(folder: Path) -> int:
    """What the weights take on disk: every safetensors file of the checkpoint."""
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file; save the checkpoint with llmdistill.models.checkpoint.save")
    return sum(file.stat().st_size for file in files)
