"""Rationales that a task's rows bring themselves."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmdistill.core.store import Store
from llmdistill.stages.given_rationales import GivenRationales
from llmdistill.tasks.answers import Number
from llmdistill.tasks.options import Gym
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task
from llmdistill.teach.verify import Verification


def task_of(folder: Path, *rows: dict[str, Any], gold_column: str = "answer") -> Task:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Task(source=Table(path=folder / "rows.jsonl"), answer=Number(), input_template="{question}", gold_column=gold_column)


def test_the_known_answer_is_the_label_and_the_column_the_rationale(tmp_path: Path) -> None:
    task = task_of(
        tmp_path,
        {"question": "1 + 1?", "answer": "2.0", "why": "One\n and one."},
        {"question": "2 + 2?", "answer": "4", "why": " "},
        {"question": "3 + 3?", "answer": "6"},
        {"question": "4 + 4?", "answer": "8", "why": "Four and four is eight."},
    )
    rationales = Store(tmp_path / "runs").build(GivenRationales(task=task, column="why", verification=Verification(max_rationale_characters=15)))
    assert [(row.input, row.label, row.gold, row.rationale) for row in rationales.rows()] == [("1 + 1?", "2", "2", "One and one.")]
    assert [(row["input"], row["reason"]) for row in rationales.refused()] == [
        ("2 + 2?", "empty rationale"), ("3 + 3?", "empty rationale"), ("4 + 4?", "rationale too long"),
    ]  # fmt: skip
    summary = rationales.summary()
    assert summary["model"].startswith("none: the known answers of ")
    assert (summary["num_completions"], summary["num_refused"], summary["cost_dollars"]) == (0, 3, None)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no column of known answers"):
        GivenRationales(task=task_of(tmp_path, {"question": "1 + 1?"}, gold_column=""))
    rows = ({"question": "1 + 1?", "answer": "2", "why": "So."}, {"question": "2 + 2?", "answer": None, "why": "So."})
    for column, message in (("rationale", "no row .* has a column 'rationale' .* the columns are question, why"), ("why", "'row-1' .* has no known answer")):
        with pytest.raises(ValueError, match=message):
            Store(tmp_path / "runs").build(GivenRationales(task=task_of(tmp_path, *rows), column=column))


def test_every_problem_of_gsm_symbolic_has_a_solution(tmp_path: Path) -> None:
    rationales = Store(tmp_path / "runs").build(GivenRationales(task=Gym(generator="gsm_symbolic", size=300).task()))
    assert rationales.refused() == []
    assert {row.split for row in rationales.rows()} == {"train", "validation", "test"}
    assert all(row.label == row.gold and "\n" not in row.rationale and "####" not in row.rationale for row in rationales.rows())
    assert rationales.summary()["accuracy"] == 1.0
