import itertools
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmdistill.tasks.answers import Choice
from llmdistill.tasks.duplicates import find_duplicates
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Row, Task

TASK = Task(name="test", source=Table(path=Path("unused.jsonl")), answer=Choice(choices=("yes", "no")), input_template="{text}")


def make_rows(texts: list[str], splits: list[str] | None = None, golds: list[str | None] | None = None) -> list[Row]:
    return [
        Row(id=f"r{index}", fields={"text": text}, gold=golds[index] if golds else None, split=splits[index] if splits else "train")
        for index, text in enumerate(texts)
    ]


def test_duplicates_overlap_and_contradictions_are_reported() -> None:
    texts = [
        "Where is my parcel?",
        "where IS my parcel",
        "cancel the order of two red lamps please now",
        "cancel the order of two red lamps please today",
        "hello",
    ]
    rows = make_rows(texts, ["train", "test", "train", "validation", "test"], ["yes", "yes", "yes", "no", None])
    report = find_duplicates(TASK, rows, threshold=0.8)
    assert report.data() == {
        "num_duplicate_pairs": 1,
        "num_near_duplicate_pairs": 1,
        "num_pairs_across_splits": 2,
        "num_test_rows_seen_elsewhere": 1,
        "num_pairs_with_different_answers": 1,
    }
    text = "\n".join(report.lines())
    assert "r0 (train) and r1 (test) share 100% of their words" in text
    assert "r2 (train) and r3 (validation) share 80% of their words; the known answers differ" in text
    assert "remove one row of each such pair" in text
    assert report.lines(limit=1)[2] == "and 1 more"
    assert find_duplicates(TASK, rows[4:]).lines() == ["no duplicate rows"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=7).map(" ".join), max_size=12), st.sampled_from([0.3, 0.5, 0.6, 0.75, 0.85, 1.0]))
def test_the_quick_search_finds_what_comparing_all_pairs_finds(texts: list[str], threshold: float) -> None:
    sets = [frozenset(text.split()) or frozenset({text}) for text in texts]
    expected = {(i, j) for i, j in itertools.combinations(range(len(sets)), 2) if len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j])}
    report = find_duplicates(TASK, make_rows(texts), threshold=threshold)
    assert [(int(pair.first.id[1:]), int(pair.second.id[1:])) for pair in report.pairs] == sorted(expected)


def test_texts_of_the_users_file_are_compared_as_the_student_reads_them(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "same", "note": str(number)}) + "\n" for number in range(2)))
    task = Task(name="test", source=Table(path=tmp_path / "rows.jsonl"), answer=TASK.answer, input_template="{text}")
    assert len(find_duplicates(task, task.rows()).pairs) == 1


def test_the_threshold_is_a_share() -> None:
    with pytest.raises(ValueError, match="threshold"):
        find_duplicates(TASK, [], threshold=0.0)
