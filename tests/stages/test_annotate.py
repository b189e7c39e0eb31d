"""Annotate: what was asked is kept, a restart asks nothing twice and ends in the same files, and what is written is only a reading of the completions."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmdistill.core.artifacts import Rationales
from llmdistill.core.run import Run, Stopped
from llmdistill.core.store import Store
from llmdistill.stages.annotate import Annotate
from llmdistill.tasks.answers import Choice
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task
from llmdistill.teach.prompt import Prompt
from llmdistill.teach.recorded import Recorded
from llmdistill.teach.teacher import Completion, Request, Sampling, TeacherError
from llmdistill.teach.verify import Verification

NUM_ROWS = 60
FILES = ("rationales.jsonl", "refused.jsonl", "summary.json")


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@dataclass(frozen=True, kw_only=True)
class FakeTeacher:
    """Answers even messages with yes and odd ones with no; `oddities` by message number instead."""

    model: str = "fake"
    revision: str = "1"
    dollars_per_million_tokens_in: float = 1e6
    dollars_per_million_tokens_out: float = 2e6
    dies_after: int = 10**9
    oddities: dict[int, Any] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)

    def fingerprint(self) -> dict[str, object]:
        return {"model": self.model, "revision": self.revision}

    def render(self, prompt: str) -> str:
        return f"<{prompt}>"

    def complete(self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Completion], None]) -> None:
        assert sampling.stop == ("\n", ").")
        for index, request in enumerate(requests):
            if len(self.asked) >= self.dies_after:
                raise Killed
            self.asked.append((request.prompt, request.sample_index))
            done(index, Completion(text=self.text(request), tokens_in=20, tokens_out=10, seconds=0.5, finish_reason="stop"))

    def text(self, request: Request) -> str:
        number = int(request.prompt.split("Message: ")[1].split()[1])
        text = self.oddities.get(number, f" Because {number}. The answer is ({'no' if number % 2 else 'yes'}")
        return text[request.sample_index] if isinstance(text, tuple) else text


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """A third of the rows are test rows; rows below 40 have a known label, and 4 is known to be no."""
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(NUM_ROWS):
            gold = {} if number >= 40 else {"gold": "no" if number % 2 or number == 4 else "yes"}
            split = ("train", "validation", "test")[number % 3]
            file.write(json.dumps({"id": f"m{number}", "message": f"number {number} !", "split": split, **gold}) + "\n")
    answer = Choice(choices=("yes", "no"))
    return Task(source=Table(path=tmp_path / "rows.jsonl"), answer=answer, input_template="{message}", gold_column="gold", id_column="id", split_column="split")


@pytest.fixture
def prompt(tmp_path: Path) -> Prompt:
    (tmp_path / "p.jinja").write_text("Message: a\nReason: b. The answer is (yes).\n\nMessage: {{ message }}\nReason:".replace("Message: a", "Example: a"))
    return Prompt(path=tmp_path / "p.jinja", stop=("\n", ")."))


@pytest.fixture
def annotate(task: Task, prompt: Prompt) -> Callable[..., Annotate]:
    return lambda teacher, **options: Annotate(task=task, prompt=prompt, teacher=teacher, **options)


def build(folder: Path, stage: Annotate, name: str = "runs") -> Rationales:
    return Store(folder / name).build(stage)


def reasons(rationales: Rationales) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in rationales.refused()}


def test_every_row_is_kept_or_refused_with_a_reason(tmp_path: Path, annotate: Callable[..., Annotate]) -> None:
    teacher = FakeTeacher(
        oddities={6: "I do not know.", 7: " Hm. The answer is (maybe", 8: "The answer is (yes", 9: "Why? " * 300 + "The answer is (no", 20: " Hm."}
    )
    rationales = build(tmp_path, annotate(teacher))
    assert reasons(rationales) == {
        "m6": "no answer marker", "m7": "answer not understood", "m8": "empty rationale", "m9": "rationale too long", "m20": "no answer marker",
    }  # fmt: skip
    rows = rationales.rows()
    assert [row.id for row in rows] == [f"m{number}" for number in range(NUM_ROWS) if number not in (6, 7, 8, 9, 20)], "in the task's order"
    assert dataclasses.asdict(rows[2]) == {
        "id": "m2", "split": "test", "input": "number 2 !", "label": "yes", "rationale": "Because 2.", "gold": "yes", "confidence": 1.0,
    }  # fmt: skip
    assert rationales.refused()[0] == {
        "id": "m6", "split": "train", "input": "number 6 !", "gold": "yes", "label": None, "reason": "no answer marker", "completion": "I do not know.",
    }  # fmt: skip
    assert {row["id"]: row["label"] for row in rationales.refused()} == {"m6": None, "m7": None, "m8": "yes", "m9": "no", "m20": None}
    summary = rationales.summary()
    known_test = [number for number in range(40) if number % 3 == 2]
    assert summary["accuracy"] == pytest.approx(1 - 1 / len(known_test)), "20 is wrong; 8 is right, though its rationale is empty"
    assert summary["accuracy_train"] == pytest.approx(1 - len({4, 6, 7}) / (40 - len(known_test)))
    assert {name: summary[name] for name in ("model", "revision", "num_rows", "num_completions", "num_refused", "num_asked")} == {
        "model": "fake", "revision": "1", "num_rows": 60, "num_completions": 60, "num_refused": 5, "num_asked": 60,
    }  # fmt: skip
    assert (summary["tokens_in"], summary["tokens_out"], summary["seconds"], summary["tokens_per_second"]) == (1200, 600, 30, 20)
    assert summary["cost_dollars"] == 2400
    assert summary["refused_by_reason"]["no answer marker"] == 2


def test_a_killed_run_goes_on_and_ends_in_the_same_files(tmp_path: Path, annotate: Callable[..., Annotate], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(tmp_path, annotate(FakeTeacher(oddities={6: "?"})), "whole")
    monkeypatch.setenv("LLMDISTILL_CACHE", str(tmp_path / "another"))
    asked: list[tuple[str, int]] = []
    for dies_after in (7, 0, 30):
        dying = FakeTeacher(oddities={6: "?"}, dies_after=dies_after)
        with pytest.raises(Killed):
            build(tmp_path, annotate(dying))
        asked += dying.asked
    last = FakeTeacher(oddities={6: "?"})
    resumed = build(tmp_path, annotate(last))
    asked += last.asked
    assert len(asked) == len(set(asked)) == NUM_ROWS
    for name in FILES:
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_another_reading_asks_nothing(tmp_path: Path, annotate: Callable[..., Annotate]) -> None:
    build(tmp_path, annotate(FakeTeacher()))
    again = FakeTeacher()
    checked = build(tmp_path, annotate(again, verification=Verification(check_gold=True)))
    assert again.asked == []
    assert reasons(checked) == {"m4": "wrong against the known label"}
    assert checked.summary()["num_asked"] == 0
    assert checked.summary()["accuracy_train"] < 1, "a refused row still counts against the teacher"


def test_a_wrong_test_row_stays(tmp_path: Path, annotate: Callable[..., Annotate]) -> None:
    checked = build(tmp_path, annotate(FakeTeacher(oddities={2: " Hm. The answer is (no"}), verification=Verification(check_gold=True)))
    assert "m2" not in reasons(checked)
    assert checked.summary()["accuracy"] < 1


def test_rows_are_asked_in_an_order_that_mixes_splits(tmp_path: Path, annotate: Callable[..., Annotate], task: Task) -> None:
    teacher = FakeTeacher()
    build(tmp_path, annotate(teacher))
    splits = {row.fields["message"]: row.split for row in task.rows()}
    first = [splits[prompt.split("Message: ")[1].split("\nReason")[0]] for prompt, _ in teacher.asked[: NUM_ROWS // 2]]
    assert all(5 <= first.count(split) <= 15 for split in ("train", "validation", "test"))


def test_a_fair_part_of_the_rows(tmp_path: Path, annotate: Callable[..., Annotate]) -> None:
    teacher = FakeTeacher()
    part = build(tmp_path, annotate(teacher, max_rows=20))
    assert part.summary()["num_rows"] == len(teacher.asked) == 20
    rest = FakeTeacher()
    build(tmp_path, annotate(rest))
    assert len(rest.asked) == 40
    assert {row.id for row in build(tmp_path, annotate(FakeTeacher(), max_rows=10)).rows()} < {row.id for row in part.rows()}


def test_self_consistency(tmp_path: Path, annotate: Callable[..., Annotate]) -> None:
    yes, no = " Yes, {}. The answer is (yes", " No. The answer is (no"
    odd = {0: (no, yes.format(1), yes.format(2)), 1: (no, "?", yes), 2: ("?", "?", no)}
    stage = annotate(FakeTeacher(oddities={**dict.fromkeys(range(NUM_ROWS), (yes,) * 3), **odd}), num_samples=3, sampling=Sampling(temperature=0.7))
    rationales = build(tmp_path, stage)
    rows = {row.id: row for row in rationales.rows()}
    assert (rows["m0"].label, rows["m0"].rationale, rows["m0"].confidence) == ("yes", "Yes, 1.", pytest.approx(2 / 3))
    assert (rows["m2"].label, rows["m2"].confidence) == ("no", pytest.approx(1 / 3))
    assert reasons(rationales) == {"m1": "contradictory votes"}
    assert rationales.summary()["num_completions"] == 180


def test_the_same_prompt_is_asked_once(tmp_path: Path, annotate: Callable[..., Annotate], task: Task) -> None:
    lines = [{"id": f"m{number}", "message": "number 0 !", "split": "train", "gold": None if number else "yes"} for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    teacher = FakeTeacher()
    rationales = build(tmp_path, annotate(teacher))
    assert len(teacher.asked) == rationales.summary()["num_completions"] == 1
    assert len(rationales.rows()) == 5


@pytest.mark.parametrize("budget", [{"max_tokens": 900}, {"max_cost_dollars": 1_200}])
def test_a_budget_stops_cleanly_and_the_same_command_goes_on(tmp_path: Path, annotate: Callable[..., Annotate], budget: dict[str, float]) -> None:
    asked: list[tuple[str, int]] = []
    for _ in range(10):
        teacher = FakeTeacher()
        stage = annotate(teacher, **budget)
        try:
            build(tmp_path, stage)
        except Stopped as stopped:
            assert "are kept" in str(stopped)  # noqa: PT017
            assert not Store(tmp_path / "runs").is_complete(stage)
            assert len(teacher.asked) <= 30
        asked += teacher.asked
        if Store(tmp_path / "runs").is_complete(stage):
            break
    assert len(asked) == len(set(asked)) == NUM_ROWS
    assert stage.key == annotate(FakeTeacher()).key, "a budget is no part of the key"


def test_a_budget_in_dollars_needs_prices(tmp_path: Path, annotate: Callable[..., Annotate]) -> None:
    free = FakeTeacher(dollars_per_million_tokens_in=0.0, dollars_per_million_tokens_out=0.0)
    with pytest.raises(ValueError, match="has no prices"):
        build(tmp_path, annotate(free, max_cost_dollars=1.0))


def test_the_plan_counts_what_is_missing_and_asks_nothing(tmp_path: Path, annotate: Callable[..., Annotate]) -> None:
    store = Store(tmp_path / "runs")

    def plan(stage: Annotate) -> dict[str, Any]:
        return dict(stage.plan(Run(stage, store)))

    first = plan(annotate(FakeTeacher(), sampling=Sampling(max_tokens=50)))
    assert (first["num_rows"], first["num_completions"], first["num_completions_missing"]) == (60, 60, 60)
    assert first["tokens_out_estimated"] == 60 * 50
    assert 60 * 10 < first["tokens_in_estimated"] < 60 * 40
    build(tmp_path, annotate(FakeTeacher(), sampling=Sampling(max_tokens=50), max_rows=20))
    after = plan(annotate(FakeTeacher(), sampling=Sampling(max_tokens=50)))
    assert (after["num_completions_missing"], after["tokens_out_estimated"]) == (40, 400)
    assert after["tokens_in_estimated"] == pytest.approx(800, rel=0.05)
    assert after["cost_dollars_estimated"] == after["tokens_in_estimated"] + 2 * after["tokens_out_estimated"]


def test_the_key_follows_the_answers_and_not_the_speed(annotate: Callable[..., Annotate], prompt: Prompt) -> None:
    key = annotate(FakeTeacher()).key
    assert annotate(FakeTeacher(dies_after=3, dollars_per_million_tokens_in=7.0), max_tokens=5, name="other").key == key
    for changed in (
        annotate(FakeTeacher(model="other")),
        annotate(FakeTeacher(), sampling=Sampling(max_tokens=5)),
        annotate(FakeTeacher(), splits=("train",)),
        annotate(FakeTeacher(), max_rows=5),
        annotate(FakeTeacher(), verification=Verification(check_gold=True)),
    ):
        assert changed.key != key
    prompt.path.write_text(prompt.path.read_text() + " ")
    assert dataclasses.replace(annotate(FakeTeacher()), prompt=Prompt(path=prompt.path, stop=prompt.stop)).key != key


def test_a_recording_takes_the_teachers_place(tmp_path: Path, annotate: Callable[..., Annotate], monkeypatch: pytest.MonkeyPatch) -> None:
    stage = annotate(FakeTeacher(oddities={6: "?"}))
    original = build(tmp_path, stage)
    folder = stage.export(tmp_path / "recording")
    monkeypatch.setenv("LLMDISTILL_CACHE", str(tmp_path / "nothing"))
    played = annotate(Recorded(folder=folder))
    assert played.key != stage.key, "the teacher itself is another stage, which really asks"
    assert played.plan(Run(played, Store(tmp_path / "runs")))["num_completions_missing"] == 0
    again = build(tmp_path, played)
    for name in FILES[:2]:
        assert (again.folder / name).read_bytes() == (original.folder / name).read_bytes()
    assert again.summary() == {**original.summary(), "num_asked": 0}
    assert not (tmp_path / "nothing" / "completions.sqlite3").exists()
    with pytest.raises(TeacherError, match="max_tokens 128, not 5"):
        build(tmp_path, annotate(Recorded(folder=folder), sampling=Sampling(max_tokens=5)))


def test_a_changed_prompt_is_not_in_the_recording(tmp_path: Path, annotate: Callable[..., Annotate], prompt: Prompt) -> None:
    stage = annotate(FakeTeacher())
    build(tmp_path, stage)
    folder = stage.export(tmp_path / "recording")
    prompt.path.write_text("New. " + prompt.path.read_text())
    changed = dataclasses.replace(stage, prompt=Prompt(path=prompt.path, stop=prompt.stop), teacher=Recorded(folder=folder))
    with pytest.raises(TeacherError, match="if you changed the template"):
        build(tmp_path, changed)


def test_nothing_to_teach_is_an_error_that_shows_a_completion(tmp_path: Path, annotate: Callable[..., Annotate]) -> None:
    with pytest.raises(ValueError, match=r"all 60 rows were refused \(no answer marker: 60\).*'I like cheese'"):
        build(tmp_path, annotate(FakeTeacher(oddities=dict.fromkeys(range(NUM_ROWS), "I like cheese"))))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 2}, "temperature 0"),
        ({"splits": ()}, "splits"),
        ({"splits": ("dev",)}, "splits"),
        ({"max_rows": 0}, "max_rows"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_settings_are_checked(annotate: Callable[..., Annotate], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        annotate(FakeTeacher(), **options)
