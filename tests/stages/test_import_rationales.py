"""Rationales that come from files: our own exports, and rows with three columns."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from llmdistill.cli import main
from llmdistill.core.artifacts import RationaleRow, Rationales
from llmdistill.core.store import Store
from llmdistill.models.student import ScratchT5
from llmdistill.stages.distil import Distil
from llmdistill.stages.import_rationales import ImportRationales
from llmdistill.tasks.answers import Choice
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task
from llmdistill.teach.rationale_files import export_rationales
from llmdistill.teach.verify import Verification
from llmdistill.train_settings import Steps, TrainSettings

ANSWER = Choice(choices=("yes", "no"))
FORMS = ("rows.jsonl", "rows.parquet", "dataset")


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task_of(folder: Path, *rows: dict[str, Any]) -> Task:
    """A task of these rows; where none is given, of one that no file here has."""
    path = write_lines(folder / "task.jsonl", *(rows or ({"id": "elsewhere", "text": "elsewhere", "answer": None, "split": "train"},)))
    return Task(
        source=Table(path=path), answer=ANSWER, input_template="{text}", gold_column="answer", id_column="id", split_column="split", validation_share=0.3
    )


def import_file(folder: Path, path: Path, task: Task | None = None, **options: Any) -> Rationales:
    return Store(folder / "runs").build(ImportRationales(path=path, task=task or task_of(folder), **options))


def lines(folder: Path, *rows: dict[str, Any]) -> Path:
    return write_lines(folder / "rows.jsonl", *rows)


@pytest.mark.parametrize("name", FORMS)
def test_our_exports_come_back_unchanged(tmp_path: Path, name: str) -> None:
    rows = [
        RationaleRow(id=f"r{number}", split=split, input=f"in {number}", label="no", rationale="It is.", gold=gold, confidence=confidence)
        for number, (split, gold, confidence) in enumerate([("train", None, 1.0), ("validation", "yes", 0.6), ("test", "no", 0.4), ("test", "yes", 1.0)])
    ]
    rationales = import_file(tmp_path, export_rationales(rows, tmp_path / name))
    assert rationales.rows() == rows
    summary = rationales.summary()
    assert (summary["accuracy"], summary["accuracy_train"], summary["num_asked"], summary["tokens_in"], summary["cost_dollars"]) == (0.5, 0.0, 0, None, None)


def test_three_columns_are_enough(tmp_path: Path) -> None:
    """The task says which row it is: a test row stays one, and is never taught."""
    task = task_of(
        tmp_path,
        {"id": "a", "text": "one", "answer": "yes", "split": "train"},
        {"id": "b", "text": "two", "answer": "no", "split": "test"},
        {"id": "c", "text": "three", "answer": None, "split": "validation"},
        {"id": "d", "text": "two", "answer": "no", "split": "train"},
    )
    texts = ["three", "two", "one", "one", "four"]
    path = lines(tmp_path, *({"input": text, "label": "(Yes)", "rationale": " So. "} for text in texts))
    rationales = import_file(tmp_path, path, task, model="somebody")
    rows = [(row.id, row.split, row.input, row.gold) for row in rationales.rows()]
    assert rows[:3] == [("c", "validation", "three", None), ("b", "test", "two", "no"), ("a", "train", "one", "yes")]
    assert rows[3] == ("imported-3", "train", "one", "yes"), "the same text again: an id of its own, and the same split"
    assert rows[4][0] == "imported-4"
    assert rows[4][1] in ("train", "validation")
    assert {(row.label, row.rationale, row.confidence) for row in rationales.rows()} == {("yes", "So.", 1.0)}
    assert (rationales.summary()["model"], rationales.summary()["accuracy"], rationales.summary()["accuracy_train"]) == ("somebody", 0.0, 1.0)


def test_texts_that_the_task_does_not_have_are_split_by_themselves_alone(tmp_path: Path) -> None:
    rows = [{"input": f"in {number}", "label": "yes", "rationale": "So."} for number in range(200)]
    first = {row.input: row.split for row in import_file(tmp_path, lines(tmp_path, *rows)).rows()}
    second = {row.input: row.split for row in import_file(tmp_path, lines(tmp_path, *reversed(rows))).rows()}
    assert first == second
    assert set(first.values()) == {"train", "validation"}
    assert 30 <= sum(split == "validation" for split in first.values()) <= 90


def test_rows_that_cannot_be_taught_are_refused(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {"input": "a", "label": "maybe", "rationale": "So."},
        {"input": "b", "label": "yes", "rationale": " "},
        {"input": "c", "label": "yes", "rationale": "So.", "gold": "no"},
        {"input": "d", "label": "yes", "rationale": "So.", "gold": "no", "split": "test"},
        {"input": "e", "label": "yes", "rationale": "So, so, so."},
        {"input": "f", "label": "yes", "rationale": "So."},
    )
    rationales = import_file(tmp_path, path, verification=Verification(check_gold=True, max_rationale_characters=5))
    assert {row["input"]: row["reason"] for row in rationales.refused()} == {
        "a": "answer not understood", "b": "empty rationale", "c": "wrong against the known label", "e": "rationale too long",
    }  # fmt: skip
    assert [row.input for row in rationales.rows()] == ["d", "f"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"label": "yes", "rationale": "So."}, "line 2: the column 'input' is missing"),
        ({"input": "a", "label": 1, "rationale": "So."}, "line 2: the column 'label' is 1, which is not text"),
        ({"input": "a", "label": "yes", "rationale": "So.", "id": "x"}, "line 2: the id 'x' was already given at .* line 1"),
        ({"input": "a", "label": "yes", "rationale": "So.", "split": "dev"}, "line 2: the split is 'dev'"),
        ({"input": "a", "label": "yes", "rationale": "So.", "gold": "maybe"}, "line 2: the known label 'maybe' is not one of"),
        ({"input": "a", "label": "yes", "rationale": "So.", "confidence": 2}, "line 2: the confidence is 2"),
        ({"input": "tested", "label": "yes", "rationale": "So.", "split": "train"}, "line 2: the split is 'train', but .* among its test rows \\('t'\\)"),
        ({"input": "tested", "label": "yes", "rationale": "So.", "split": "validation", "id": "t"}, "line 2: the split is 'validation', but"),
        ({"input": "a", "label": "yes", "rationale": "So.", "id": "t"}, "line 2: the id 't' is that of a row of the task 'task' which reads 'tested'"),
    ],
)
def test_an_error_says_where(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    task = task_of(tmp_path, {"id": "t", "text": "tested", "answer": "yes", "split": "test"})
    path = lines(tmp_path, {"id": "x", "input": "b", "label": "yes", "rationale": "So."}, row)
    with pytest.raises(ValueError, match=message):
        import_file(tmp_path, path, task)


def test_the_key_follows_the_content(tmp_path: Path) -> None:
    path, task = lines(tmp_path, {"input": "a", "label": "yes", "rationale": "So."}), task_of(tmp_path)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    assert ImportRationales(path=path, task=task).key == ImportRationales(path=copy, task=task).key
    copy.write_text(path.read_text().replace("So", "Or"))
    assert ImportRationales(path=path, task=task).key != ImportRationales(path=copy, task=task).key


def test_import_on_the_command_line_builds_the_same_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_lines(tmp_path / "task.jsonl", {"id": "t", "text": "one", "answer": "yes", "split": "test"})
    path = lines(tmp_path, {"input": "one", "label": "no", "rationale": "So."}, {"input": "two", "label": "no", "rationale": "So."})
    option = f"choices:{task}?choices=yes,no&input={{text}}&gold=answer&id=id&split=split"
    main(["import", str(path), "--task", option, "--model", "somebody"])
    summary, _, folder = capsys.readouterr().out.rpartition("\n\n")
    assert (json.loads(summary)["model"], json.loads(summary)["accuracy"]) == ("somebody", 0.0)
    built = Rationales(Path(folder.strip()))
    assert next((row.id, row.split) for row in built.rows()) == ("t", "test")
    answer = Choice(choices=("yes", "no"), lettered=False)
    same = Task(source=Table(path=task), answer=answer, input_template="{text}", gold_column="answer", id_column="id", split_column="split")
    assert ImportRationales(path=path, task=same, model="somebody").key == built.folder.name


def test_a_student_learns_the_same_from_every_form(tmp_path: Path) -> None:
    """No teacher: from each kind of file to a checkpoint, with the same weights."""
    rows = [{"id": f"m{n}", "text": f"number {n}", "answer": "no" if n % 2 else "yes", "split": "validation" if n % 5 == 0 else "train"} for n in range(20)]
    task = task_of(tmp_path, *rows)
    columns = [{"input": row["text"], "label": row["answer"], "rationale": f"{row['text']} is {'odd' if row['answer'] == 'no' else 'even'}."} for row in rows]
    write_lines(tmp_path / "rows.jsonl", *columns)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(columns), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(columns).save_to_disk(str(tmp_path / "dataset"))
    weights = []
    for name in FORMS:
        stage = Distil(
            task=task,
            rationales=ImportRationales(path=tmp_path / name, task=task),
            student=ScratchT5(vocabulary_size=300),
            settings=TrainSettings(batch_size=8, duration=Steps(2)),
        )
        checkpoint = Store(tmp_path / "runs").build(stage)
        figures = checkpoint.manifest()["figures"]
        assert (figures["num_train_examples"], figures["num_validation_examples"]) == (16, 4)
        weights.append((checkpoint.folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]
