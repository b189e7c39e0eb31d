"""Rationales go out and come in again unchanged, in each of the forms."""

from dataclasses import asdict
from pathlib import Path

import pytest

from llmdistill.core.artifacts import RationaleRow
from llmdistill.teach.rationale_files import export_rationales, read_rationale_file

WHY = 'Weil; so "ist" es, 🙂'
ROWS = [
    RationaleRow(id=f"r{number}", split=split, input=f"in {number}\nline\u2028two", label="ja", rationale=WHY, gold=gold, confidence=0.1 * number)
    for number, (split, gold) in enumerate([("train", None), ("validation", "ja"), ("test", "nein")])
]


@pytest.mark.parametrize("name", ["rows.jsonl", "deep/rows.parquet", "dataset"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    path = export_rationales(ROWS, tmp_path / name)
    read = list(read_rationale_file(path))
    assert [values for _, values in read] == [asdict(row) for row in ROWS]
    assert all(str(path) in where for where, _ in read)


@pytest.mark.parametrize("name", ["rows.parquet", "dataset"])
def test_columns_without_any_value_keep_their_type(tmp_path: Path, name: str) -> None:
    path = export_rationales(ROWS[:1], tmp_path / name)
    assert [values["gold"] for _, values in read_rationale_file(path)] == [None]


def test_a_dataset_with_splits_names_them(tmp_path: Path) -> None:
    import datasets

    rows = {"input": ["a"], "label": ["b"], "rationale": ["c"]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows), "test": datasets.Dataset.from_dict(rows)}).save_to_disk(str(tmp_path / "d"))
    assert [values["split"] for _, values in read_rationale_file(tmp_path / "d")] == ["train", "test"]


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"input": "a"}\n\n[1]\n')
    (tmp_path / "worse.jsonl").write_text('{"input": \n')
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "bad.csv").write_text("no")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("bad.jsonl", "line 3: a list"),
        ("worse.jsonl", "line 1: not JSON"),
        ("bad.parquet", "not a Parquet file"),
        ("bad.csv", r"give a \.jsonl or \.parquet"),
        ("empty", "not a dataset"),
        ("nowhere", "no file or folder"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_rationale_file(tmp_path / name))
    for path, message in ((tmp_path / "empty", "already there"), (tmp_path / "rows.csv", r"end the name in \.jsonl")):
        with pytest.raises(ValueError, match=message):
            export_rationales(ROWS, path)
    with pytest.raises(ValueError, match="no rationales"):
        export_rationales([], tmp_path / "none.jsonl")
