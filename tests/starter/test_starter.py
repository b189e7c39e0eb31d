"""What `llmdistill init` writes for a file of rows, and that it runs."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import reviews

from llmdistill.core.artifacts import Checkpoint, Rationales
from llmdistill.core.graph import Graph
from llmdistill.core.pipeline import load
from llmdistill.core.store import Store
from llmdistill.starter.guess import AnswerKind, Said, guess
from llmdistill.starter.write import write
from llmdistill.teach.openai_teacher import OpenAITeacher
from llmdistill.teach.prompt import Prompt


def _file(folder: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _reviews(folder: Path) -> Path:
    texts = ["The soup was {{ cold }} and {% so %} on", 'He said "fine"\nand left', "It's {# nice #} here"]
    return _file(folder, [{"id": f"r{i}", "text": f"{texts[i % 3]} {i}", "mood": ["good", "bad"][i % 2]} for i in range(40)])


def test_a_column_with_few_values_is_the_label(tmp_path: Path) -> None:
    found = guess(_reviews(tmp_path), Said())
    assert (found.label, found.answer, found.choices) == ("mood", AnswerKind.CHOICES, ("bad", "good"))
    assert (found.id, found.inputs, found.num_rows) == ("id", ("text",), 40)


def test_numbers_and_splits_are_seen(tmp_path: Path) -> None:
    rows = [{"question": f"How much is {i} + 1?", "answer": i + 1, "split": "test" if i % 3 else "train"} for i in range(30)]
    found = guess(_file(tmp_path, rows), Said())
    assert (found.label, found.answer, found.choices, found.split) == ("answer", AnswerKind.NUMBER, (), "split")


def test_free_text_is_seen(tmp_path: Path) -> None:
    found = guess(_file(tmp_path, [{"question": f"Who is {i}?", "answer": f"person {i}, of course"} for i in range(30)]), Said())
    assert found.answer is AnswerKind.TEXT


def test_what_is_said_comes_first(tmp_path: Path) -> None:
    found = guess(_reviews(tmp_path), Said(label="text", input=("mood",), answer=AnswerKind.TEXT))
    assert (found.label, found.inputs, found.answer) == ("text", ("mood",), AnswerKind.TEXT)


def test_rows_without_labels_need_to_be_told_of_the_answers(tmp_path: Path) -> None:
    data = _file(tmp_path, [{"text": f"row {i}"} for i in range(30)])
    with pytest.raises(ValueError, match="--choices LABEL LABEL"):
        guess(data, Said())
    found = guess(data, Said(choices=("yes", "no")))
    assert (found.label, found.choices, found.inputs) == ("", ("yes", "no"), ("text",))


@pytest.mark.parametrize(
    "said, message",
    [
        (Said(label="moods"), "no column 'moods'; it has id, text, mood"),
        (Said(input=("body",)), "no column 'body'"),
        (Said(label="mood", answer=AnswerKind.CHOICES, choices=("one",)), "1 labels to choose from"),
    ],
)
def test_what_is_said_wrong_is_told(tmp_path: Path, said: Said, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guess(_reviews(tmp_path), said)


@pytest.mark.parametrize("said", [Said(), Said(choices=("good", "bad", "so so"), label="mood"), Said(label="mood", answer=AnswerKind.TEXT)])
def test_what_is_written_makes_a_graph_and_renders_its_rows(tmp_path: Path, said: Said) -> None:
    pipeline_path, prompt_path, card_path = write("reviews", _reviews(tmp_path), said, tmp_path)
    prompt = Prompt(path=prompt_path)
    assert prompt.variables == ("text",)
    text = prompt.render({"text": "NEW"})
    assert "The soup was {{ cold }} and {% so %} on" in text
    assert "It's {# nice #} here" in text
    assert text.endswith("Text: NEW\nReason:")
    assert "place-holders" not in text
    assert "| `mood` | known label |" in card_path.read_text()
    graph = Graph.above(load(pipeline_path)(teacher=OpenAITeacher(model="any")))
    assert {"annotate", "label_only", "multitask", "report"} <= {stage.name for stage in graph.stages}


def test_what_is_written_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline_path, _, _ = write("reviews", reviews.write_rows(tmp_path / "rows.jsonl"), Said(), tmp_path)
    last = load(pipeline_path)(teacher=reviews.WordTeacher(), num_epochs=1, batch_size=16)
    stages = {stage.name: stage for stage in Graph.above(last).stages}
    store = Store(tmp_path / "store")
    assert (store.build(stages["evaluate_baseline"]).folder / "predictions.jsonl").read_text()
    rationales, student = store.build(stages["annotate"]), store.build(stages["multitask"])
    assert isinstance(rationales, Rationales)
    assert isinstance(student, Checkpoint)
    assert (rationales.summary()["num_completions"], rationales.summary()["accuracy"]) == (40, 1.0)
    assert [entry["technique"] for entry in student.lineage()] == ["initialise", "distil"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    data = _reviews(tmp_path)
    write("reviews", data, Said(), tmp_path)
    with pytest.raises(ValueError, match="is there already"):
        write("reviews", data, Said(), tmp_path)
    with pytest.raises(ValueError, match="small letters"):
        write("My reviews", data, Said(), tmp_path)


def test_from_the_command_line_to_a_plan(tmp_path: Path) -> None:
    _reviews(tmp_path)
    command = [sys.executable, "-m", "llmdistill"]
    made = subprocess.run([*command, "init", "reviews", "--data", "rows.jsonl"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "llmdistill run pipelines/reviews.py --dry-run" in made.stdout
    teacher = "openai:any?dollars_per_million_tokens_in=1&dollars_per_million_tokens_out=2"
    plan = subprocess.run([*command, "run", "reviews", "--teacher", teacher, "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "num_rows=40, num_completions=40, num_completions_missing=40, tokens_in_estimated=" in plan.stdout
    assert "cost_dollars_estimated=" in plan.stdout
    plan = subprocess.run([*command, "run", "reviews", "--teacher", "openai:any", "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "cost" not in plan.stdout
    again = subprocess.run([*command, "init", "reviews", "--data", "rows.jsonl"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert "Traceback" not in again.stderr
