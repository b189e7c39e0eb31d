"""Rationales that come from files: our own exports and the published ones."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llmdistill.core.artifacts import RationaleRow
from llmdistill.core.store import Store
from llmdistill.stages.import_rationales import ImportRationales, PublishedRationales
from llmdistill.tasks.answers import Choice, Equation
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task
from llmdistill.teach.rationale_files import export_rationales
from llmdistill.teach.verify import Verification

SVAMP = Path(__file__).parents[3] / "shared" / "data" / "svamp"
ANSWER = Choice(choices=("yes", "no"))
needs_svamp = pytest.mark.skipif(not SVAMP.is_dir(), reason="SVAMP is not here")


def import_file(folder: Path, path: Path, **options: Any):
    return Store(folder / "runs").build(ImportRationales(path=path, answer=ANSWER, **options))


def lines(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "dataset"])
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
    row = {"input": "in", "label": "(Yes)", "rationale": " So. "}
    rationales = import_file(tmp_path, lines(tmp_path, row, row), split="validation", model="somebody")
    assert [dataclasses.astuple(row) for row in rationales.rows()] == [(f"row-{n}", "validation", "in", "yes", "So.", None, 1.0) for n in range(2)]
    assert rationales.summary()["model"] == "somebody"


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
    ],
)
def test_an_error_says_where(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = lines(tmp_path, {"id": "x", "input": "a", "label": "yes", "rationale": "So."}, row)
    with pytest.raises(ValueError, match=message):
        import_file(tmp_path, path)


def test_the_key_follows_the_content(tmp_path: Path) -> None:
    path = lines(tmp_path, {"input": "a", "label": "yes", "rationale": "So."})
    (tmp_path / "copy.jsonl").write_bytes(path.read_bytes())
    assert ImportRationales(path=path, answer=ANSWER).key == ImportRationales(path=tmp_path / "copy.jsonl", answer=ANSWER).key
    (tmp_path / "copy.jsonl").write_text(path.read_text().replace("So", "Or"))
    assert ImportRationales(path=path, answer=ANSWER).key != ImportRationales(path=tmp_path / "copy.jsonl", answer=ANSWER).key


def published(folder: Path, num_train: int = 30, num_test: int = 10) -> PublishedRationales:
    """Sums, every fifth of them answered with a difference; the fourth test completion gives none."""
    (folder / "llm").mkdir()
    for split, num, first in (("train", num_train, 100), ("test", num_test, 500)):
        rows = [{"input": f"Ann has {a} apples and Bob {a * 7}. How many?", "label": f"( {a}.0 + {a * 7}.0 )"} for a in range(first, first + num)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        completions = [
            f"Ann {a}, Bob {a * 7}. The answer is ({a} {'-' if a % 5 == 0 else '+'} {a * 7}).\n\nQ: {a + 1}? A: The answer is (1)."
            for a in range(first, first + num)
        ]
        if split == "test":
            completions[3] = "Ann 503, Bob 3521. 503 + "
        (folder / "llm" / f"{split}_CoT_0.json").write_text(json.dumps(completions))
    source = Table(path=folder / "train.jsonl", test_path=folder / "test.jsonl")
    return PublishedRationales(task=Task(source=source, answer=Equation(), gold_column="label"), folder=folder / "llm")


def test_published_files_are_joined_with_their_rows(tmp_path: Path) -> None:
    rationales = Store(tmp_path / "runs").build(published(tmp_path))
    rows = {row.id: row for row in rationales.rows()}
    assert len(rows) == 39
    assert (rows["row-3"].label, rows["row-3"].rationale, rows["test-1"].split) == ("103 + 721", "Ann 103, Bob 721.", "test")
    assert {row.split for row in rows.values()} == {"train", "validation", "test"}
    assert [(row["id"], row["reason"]) for row in rationales.refused()] == [("test-3", "cut short before the answer was complete")]
    assert (rationales.summary()["accuracy_train"], rationales.summary()["accuracy"]) == (0.8, 0.7)
    figures = rationales.manifest()["figures"]
    assert (figures["order_in_place_share"], figures["order_misplaced_share"]) == (1.0, 0.0)


def test_a_published_file_without_its_rows_is_an_error_and_one_split_may_be_missing(tmp_path: Path) -> None:
    stage = published(tmp_path)
    (tmp_path / "llm" / "test_CoT_0.json").unlink()
    assert len(Store(tmp_path / "one").build(stage).rows()) == 30
    completions = json.loads((tmp_path / "llm" / "train_CoT_0.json").read_text())
    (tmp_path / "llm" / "train_CoT_0.json").write_text(json.dumps(completions[:12] + completions[13:]))
    with pytest.raises(ValueError, match=r"30 rows but 29 completions.*completion 12 of train_CoT_0.json"):
        Store(tmp_path / "two").build(dataclasses.replace(stage))
    (tmp_path / "llm" / "train_CoT_0.json").unlink()
    with pytest.raises(ValueError, match=r"no train_CoT_0\.json"):
        Store(tmp_path / "three").build(dataclasses.replace(stage))


@needs_svamp
def test_the_published_completions_for_svamp(tmp_path: Path) -> None:
    """73.5% and 74.0% are published; see PublishedRationales for why we read more of the answers."""
    source = Table(path=SVAMP / "svamp_train.json", test_path=SVAMP / "svamp_test.json")
    task = Task(source=source, answer=Equation(), gold_column="label")
    rationales = Store(tmp_path / "runs").build(PublishedRationales(task=task, folder=SVAMP / "llm"))
    summary = rationales.summary()
    assert (summary["accuracy_train"], summary["num_rows_accuracy_train"]) == (0.7425, 800)
    assert (summary["accuracy"], summary["num_rows_accuracy"]) == (0.775, 200)
    assert (summary["num_rows"], summary["num_completions"], summary["num_refused"]) == (1000, 1000, 39)
    assert not any("Q:" in row.rationale for row in rationales.rows())
    assert rationales.manifest()["figures"]["order_misplaced_share"] == 0.0
