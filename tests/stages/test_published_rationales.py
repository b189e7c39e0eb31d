"""Published completions, joined with the rows of their task."""

import dataclasses
import json
from pathlib import Path

import pytest

from llmdistill.core.store import Store
from llmdistill.stages.published_rationales import PublishedRationales
from llmdistill.tasks.answers import Equation
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task

SVAMP = Path(__file__).parents[3] / "shared" / "data" / "svamp"


def published(folder: Path, num_train: int = 30, num_test: int = 10) -> PublishedRationales:
    """Sums, every fifth of them answered with a difference; the fourth test completion gives none, the fifth's brackets hold half of its answer."""
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
            completions[4] = "Ann 504, Bob 3528. The answer is (500 + 4) + 3528."
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
    assert (rationales.summary()["accuracy_train_published_rule"], rationales.summary()["accuracy_published_rule"]) == (0.8, 0.6)
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


@pytest.mark.skipif(not SVAMP.is_dir(), reason="SVAMP is not here")
def test_the_published_completions_for_svamp(tmp_path: Path) -> None:
    """73.5% and 74.0% are published, and counted here by the published rule; see PublishedRationales for why we read more of the answers."""
    source = Table(path=SVAMP / "svamp_train.json", test_path=SVAMP / "svamp_test.json")
    task = Task(source=source, answer=Equation(), gold_column="label")
    rationales = Store(tmp_path / "runs").build(PublishedRationales(task=task, folder=SVAMP / "llm"))
    summary = rationales.summary()
    assert (summary["accuracy_train"], summary["num_rows_accuracy_train"]) == (0.7425, 800)
    assert (summary["accuracy"], summary["num_rows_accuracy"]) == (0.775, 200)
    assert (summary["accuracy_train_published_rule"], summary["accuracy_published_rule"]) == (0.735, 0.74)
    assert (summary["num_rows"], summary["num_completions"], summary["num_refused"]) == (1000, 1000, 39)
    assert not any("Q:" in row.rationale for row in rationales.rows())
    assert rationales.manifest()["figures"]["order_misplaced_share"] == 0.0
