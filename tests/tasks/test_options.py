import json
from pathlib import Path

import pytest

from llmdistill.core.spec import kinds_of, parse, write
from llmdistill.tasks.answers import Choice, Equation, FreeText, Number
from llmdistill.tasks.options import TaskOption
from llmdistill.tasks.sources.hugging_face import DatasetFolder, HubDataset
from llmdistill.tasks.sources.reasoning_gym import ReasoningGym
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task

KINDS = kinds_of(TaskOption)


def task_of(text: str) -> Task:
    return parse(text, KINDS).task()


def test_every_kind_is_one_string() -> None:
    assert [kind.__dict__["kind"] for kind in KINDS] == ["tickets", "choices", "number", "equation", "text", "gym"]
    assert task_of("tickets").name == "tickets"
    task = task_of("choices:some/rows.csv?choices=yes,no&input={premise} {hypothesis}&gold=label&test_share=0.2&lettered=true")
    assert task.answer == Choice(choices=("yes", "no"), lettered=True)
    assert (task.name, task.source, task.input_columns) == ("rows", Table(path=Path("some/rows.csv")), ("premise", "hypothesis"))
    assert task_of("number:gsm8k.jsonl?input={question}&gold=answer&gold_after=####").answer == Number()
    assert task_of("equation:train.json?test_rows=test.json&gold=label").source == Table(path=Path("train.json"), test_path=Path("test.json"))
    assert task_of("equation:train.json").answer == Equation()
    assert task_of("text:rows.parquet").answer == FreeText()
    gym = task_of("gym:gsm_symbolic?size=50&seed=3")
    assert gym.source == ReasoningGym(name="gsm_symbolic", size=50, seed=3)
    assert {row.split for row in gym.rows()} <= {"train", "validation", "test"}
    assert task_of("gym:spell_backward?numbers=false&size=5").answer == FreeText()


def test_datasets_are_folders_or_hub_ids_with_a_revision(tmp_path: Path) -> None:
    assert task_of(f"text:{tmp_path}").source == DatasetFolder(folder=tmp_path)
    assert task_of("number:openai/gsm8k@main?subset=main&input={question}").source == HubDataset(name="openai/gsm8k", revision="main", subset="main")
    with pytest.raises(ValueError, match="neither a file ending in"):
        task_of("number:openai/gsm8k")
    with pytest.raises(ValueError, match="a dataset brings its own test split"):
        task_of("number:openai/gsm8k@main?test_rows=test.jsonl")


def test_an_option_is_written_as_it_is_read() -> None:
    for text in ("tickets", "choices:rows.csv?gold=label&choices=yes,no", "gym:gsm_symbolic?size=50"):
        assert parse(write(parse(text, KINDS)), KINDS) == parse(text, KINDS)


def test_a_task_of_the_users_own_file_gives_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"premise": "It rains.", "hypothesis": "It is wet.", "label": "yes"}) + "\n")
    (row,) = task_of(f"choices:{path}?choices=yes,no&input={{premise}} {{hypothesis}}&gold=label").rows()
    assert row.gold == "yes"
    assert row.fields == {"premise": "It rains.", "hypothesis": "It is wet."}
