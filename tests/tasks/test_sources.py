import json
from pathlib import Path
from typing import Any

import pytest

from llmdistill.core.fingerprint import fingerprint
from llmdistill.tasks.sources.hugging_face import DatasetFolder, HubDataset
from llmdistill.tasks.sources.reasoning_gym import ReasoningGym
from llmdistill.tasks.sources.record import text_of
from llmdistill.tasks.sources.table import Table

ROWS: list[dict[str, Any]] = [{"text": 'one, "two"\nthree', "label": "yes"}, {"text": "Zoë", "label": "no"}]


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix in (".csv", ".tsv"):
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=2))
    else:
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    assert [dict(record.values) for record in Table(path=write(tmp_path / f"rows{ending}")).records()] == ROWS


def test_a_json_file_may_hold_one_object_a_line(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert [record.where for record in Table(path=tmp_path / "rows.json").records()] == [f"{tmp_path / 'rows.json'}, line {number}" for number in (1, 2)]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.jsonl", '{"a": 1}\n{"a": \n', r"rows\.jsonl, line 2: not valid JSON"),
        ("rows.jsonl", '{"a": 1}\n\n[1]\n', r"rows\.jsonl, line 3: a list, where an object"),
        ("rows.json", '[{"a": 1}, 2]', r"rows\.json, entry 2: a int, where an object"),
        ("rows.json", '[{"a": 1}', r"rows\.json: not valid JSON"),
        ("rows.csv", "a,b\n1,2\n1,2,3\n", r"rows\.csv, line 3: 3 cells where the header has 2 columns"),
        ("rows.csv", "a,a\n1,2\n", r"rows\.csv, line 1: a column name stands there twice"),
        ("rows.csv", 'a,b\n1,"2\n', r"rows\.csv, line 2: not valid CSV"),
        ("rows.parquet", "no parquet", r"rows\.parquet: not a Parquet file"),
    ],
)
def test_a_broken_file_names_the_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(Table(path=tmp_path / name).records())


def test_a_file_in_another_encoding_says_so(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("text\nZoë\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows\.csv is not UTF-8 text"):
        list(Table(path=tmp_path / "rows.csv").records())


def test_a_missing_or_unknown_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file of rows"):
        list(Table(path=tmp_path / "none.jsonl").records())
    with pytest.raises(ValueError, match="its ending must be one of"):
        Table(path=tmp_path / "rows.xlsx")


@pytest.mark.parametrize(
    "value, text",
    [
        ("a", "a"),
        (3, "3"),
        (51.0, "51.0"),
        (True, "true"),
        (["bank", "sea"], "(a) bank (b) sea"),
        ([], None),
        ([1], None),
        (None, None),
        ({}, None),
        (float("nan"), None),
    ],
)
def test_cells_as_text(value: object, text: str | None) -> None:
    assert text_of(value) == text


@pytest.fixture
def dataset() -> Any:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    return datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]}, features=features)


def test_a_saved_dataset_with_class_names_and_withheld_labels(tmp_path: Path, dataset: Any) -> None:
    dataset.save_to_disk(str(tmp_path / "one"))
    records = list(DatasetFolder(folder=tmp_path / "one").records())
    assert [record.values["label"] for record in records] == ["bad", "good", None]
    assert {record.split for record in records} == {""}


def test_a_saved_dataset_with_splits(tmp_path: Path, dataset: Any) -> None:
    import datasets

    datasets.DatasetDict({"train": dataset, "validation": dataset, "test": dataset}).save_to_disk(str(tmp_path / "all"))
    records = list(DatasetFolder(folder=tmp_path / "all").records())
    assert [(record.part, record.split) for record in records][::3] == [("train", ""), ("validation", "validation"), ("test", "test")]
    assert len({(record.part, record.number) for record in records}) == 9
    datasets.DatasetDict({"train": dataset, "extra": dataset}).save_to_disk(str(tmp_path / "extra"))
    with pytest.raises(ValueError, match="has the split 'extra'"):
        list(DatasetFolder(folder=tmp_path / "extra").records())


def test_a_folder_of_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}.jsonl").write_text(json.dumps({"text": part, "label": "yes"}) + "\n")
    assert {record.values["text"]: record.split for record in DatasetFolder(folder=folder).records()} == {"train": "", "test": "test"}


def test_hub_datasets_need_a_revision_and_folders_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give its name and a revision"):
        HubDataset(name="openai/gsm8k", revision="")
    with pytest.raises(ValueError, match="there is no dataset folder"):
        list(DatasetFolder(folder=tmp_path / "none").records())


def test_a_hub_dataset_is_loaded_at_its_revision(monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
    import datasets

    asked = {}

    def load_dataset(path: str, **options: Any) -> Any:
        asked.update(path=path, **options)
        return datasets.DatasetDict({"train": dataset})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(list(HubDataset(name="owner/name", revision="abc", subset="main").records())) == 3
    assert asked == {"path": "owner/name", "name": "main", "revision": "abc"}


def test_a_generator_gives_the_same_rows_for_the_same_seed_and_none_twice() -> None:
    source = ReasoningGym(name="gsm_symbolic", size=300, seed=1)
    records = list(source.records())
    assert [dict(record.values) for record in records] == [dict(record.values) for record in source.records()]
    assert len({record.values["question"] for record in records}) == len(records)
    assert records[0].values["rationale"]
    assert fingerprint(source) != fingerprint(ReasoningGym(name="gsm_symbolic", size=300, seed=2))
    with pytest.raises(ValueError, match="has no generator 'nothing'"):
        list(ReasoningGym(name="nothing").records())
