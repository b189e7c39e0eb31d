import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmdistill.core.fingerprint import fingerprint
from llmdistill.tasks.answers import Choice, Equation, FreeText, Number
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.splits import split_of
from llmdistill.tasks.task import Task

YES_NO = Choice(choices=("yes", "no"))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_task(path: Path, **changes: Any) -> Task:
    settings: dict[str, Any] = {"name": "test", "source": Table(path=path), "answer": YES_NO, "input_template": "{text}", "gold_column": "label"}
    return Task(**{**settings, **changes})


def test_rows_have_fields_gold_split_and_the_students_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"key": "k7", "text": "Is it?", "extra": 3, "label": "YES", "part": "dev", "nested": {"a": 1}}])
    task = make_task(path, id_column="key", split_column="part", input_template="{text} ({extra})")
    (row,) = task.rows()
    assert (row.id, row.gold, row.split) == ("k7", "yes", "validation")
    assert row.fields == {"text": "Is it?", "extra": "3"}
    assert task.text(row) == "Is it? (3)"
    assert task.is_correct(row, "Yes.")
    assert not task.is_correct(row, "no")
    assert not task.is_correct(row, "perhaps")


def test_unlabelled_rows_are_read_and_cannot_be_scored(tmp_path: Path) -> None:
    task = make_task(
        write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": None}, {"text": "b", "label": " "}, {"text": "c", "label": "no"}, {"text": "d"}])
    )
    rows = task.rows()
    assert [row.gold for row in rows] == [None, None, "no", None]
    assert [row.id for row in rows] == ["row-0", "row-1", "row-2", "row-3"]
    with pytest.raises(ValueError, match="no known answer"):
        task.is_correct(rows[0], "yes")


def test_splits_follow_from_ids_alone(tmp_path: Path) -> None:
    rows = [{"id": f"r{number}", "text": str(number)} for number in range(2_000)]
    task = make_task(write_rows(tmp_path / "rows.jsonl", rows), id_column="id", gold_column="", test_share=0.2, validation_share=0.1)
    first = {row.id: row.split for row in task.rows()}
    write_rows(tmp_path / "rows.jsonl", [*reversed(rows), {"id": "more", "text": "more"}])
    second = {row.id: row.split for row in task.rows()}
    second.pop("more")
    assert first == second
    counts = {split: list(first.values()).count(split) for split in ("train", "validation", "test")}
    assert abs(counts["test"] - 400) < 60
    assert abs(counts["validation"] - 200) < 50


def test_a_larger_test_share_keeps_every_test_row() -> None:
    ids = [f"id {number}" for number in range(500)]
    small = {row_id for row_id in ids if split_of(row_id, test_share=0.1, validation_share=0.1) == "test"}
    large = {row_id for row_id in ids if split_of(row_id, test_share=0.3, validation_share=0.1) == "test"}
    assert small
    assert small < large


def test_the_split_of_an_id_never_changes() -> None:
    """Known values: a change of the hash would move rows that were trained on into the test split."""
    splits = [split_of(row_id, test_share=0.145, validation_share=0.087) for row_id in ("t0001", "t0002", "t0453")]
    assert splits == ["train", "test", "validation"]


def test_a_test_file_gives_the_test_split_and_leaves_the_others_to_the_hash(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [{"text": f"train {number}"} for number in range(200)])
    test = write_rows(tmp_path / "test.jsonl", [{"text": f"test {number}"} for number in range(3)])
    rows = make_task(train, source=Table(path=train, test_path=test), gold_column="").rows()
    assert [row.id for row in rows if row.split == "test"] == ["test-0", "test-1", "test-2"]
    assert {row.split for row in rows if row.id.startswith("row-")} == {"train", "validation"}


def test_an_id_that_is_given_twice_names_both_places(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}, {"id": 1, "text": "c"}])
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: the id '1' was already given in .*rows\.jsonl, line 1"):
        make_task(path, id_column="id", gold_column="").rows()


@pytest.mark.parametrize(
    "row, changes, message",
    [
        ({"text": "b", "label": "maybe"}, {}, r"line 2, column 'label': 'maybe' is not one of yes, no; correct the cell"),
        ({"text": " ", "label": "no"}, {}, r"line 2, column 'text': the value is missing or empty; fill it in"),
        ({"label": "no"}, {}, r"line 2, column 'text': the value is missing or empty"),
        ({"text": {"a": 1}, "label": "no"}, {}, r"line 2, column 'text': the value is a dict, where text"),
        ({"text": "b", "label": {"a": 1}}, {}, r"line 2, column 'label': the value is a dict"),
        ({"text": "b", "label": "no", "part": "exam"}, {"split_column": "part"}, r"line 2, column 'part': the split is 'exam'; write one of train"),
        ({"text": "b", "label": "no"}, {"split_column": "part"}, r"line 2, column 'part': the value is missing or empty; write one of"),
        ({"text": "b", "label": "no"}, {"gold_after": "####"}, r"line 2, column 'label': 'no' has no '####' before the answer"),
        ({"text": "b", "label": "no"}, {"id_column": "key"}, r"line 2, column 'key': the value is missing or empty; give every row an id"),
    ],
)
def test_a_bad_row_names_file_line_column_and_remedy(tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    good = {"text": "a", "label": "#### yes" if "gold_after" in changes else "yes", "part": "train", "key": "k"}
    path = write_rows(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {message}"):
        make_task(path, **changes).rows()


@pytest.mark.parametrize("changes", [{"input_template": "{message}"}, {"gold_column": "intent"}, {"id_column": "key"}, {"split_column": "part"}])
def test_a_column_that_no_row_has_is_a_mistake_in_the_settings(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "yes"}])
    with pytest.raises(ValueError, match=rf"no column '\w+', which Task\.{next(iter(changes))} names; its columns are 'text', 'label'"):
        make_task(path, **changes).rows()


@pytest.mark.parametrize(
    "changes",
    [
        {"input_template": "no column"},
        {"input_template": "{}"},
        {"input_template": "{text.__class__}"},
        {"input_template": "{text[0]}"},
        {"input_template": "{text} {label}"},
        {"test_share": 0.9, "validation_share": 0.2},
        {"test_share": -0.1},
        {"gold_column": "", "gold_after": "####"},
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Task\."):
        make_task(tmp_path / "rows.jsonl", **changes)


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no rows"):
        make_task(write_rows(tmp_path / "rows.jsonl", [])).rows()


def test_the_forms_of_svamp_and_gsm8k(tmp_path: Path) -> None:
    svamp = write_rows(tmp_path / "svamp.json", [{"input": "Tom had 9 nuts and ate 4.\nHow many are left?", "label": "( 9.0 - 4.0 )"}])
    (row,) = make_task(svamp, answer=Equation(), input_template="{input}").rows()
    assert row.gold == "9 - 4"
    gsm8k = write_rows(tmp_path / "gsm8k.jsonl", [{"question": "How much?", "answer": "It is 2 * 600 = 1200.\n#### 1,200"}])
    (row,) = make_task(gsm8k, answer=Number(), input_template="{question}", gold_column="answer", gold_after="####").rows()
    assert row.gold == "1200"
    original = tmp_path / "SVAMP.json"
    original.write_text(
        json.dumps([{"ID": "chal-1", "Body": "A dvd costs 76.", "Question": "How much?", "Equation": "( 76.0 - 25.0 )", "Answer": 51.0}], indent=1)
    )
    task = make_task(original, answer=Number(), input_template="{Body} {Question}", gold_column="Answer", id_column="ID")
    (row,) = task.rows()
    assert (row.id, row.gold, task.text(row)) == ("chal-1", "51", "A dvd costs 76. How much?")


def test_the_identity_is_the_content_and_the_meaning_of_the_rows(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "yes"}]
    one, same = write_rows(tmp_path / "one.jsonl", rows), write_rows(tmp_path / "same.jsonl", rows)
    other = write_rows(tmp_path / "other.jsonl", [{"text": "b", "label": "yes"}])
    base = fingerprint(make_task(one))
    assert fingerprint(make_task(same, name="another name")) == base
    changed = [
        make_task(other),
        make_task(one, answer=Choice(choices=("no", "yes"))),
        make_task(one, answer=FreeText()),
        make_task(one, test_share=0.2),
        make_task(one, input_template="Q: {text}"),
        make_task(one, source=Table(path=one, test_path=other)),
    ]
    assert all(fingerprint(task) != base for task in changed)
