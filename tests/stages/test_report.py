"""The report says what its stages measured, in the keys that programs rely on, and its page is one safe, self-contained file."""

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmdistill.core.artifacts import SEARCH, Checkpoint, FoundSubnets, RationaleRow, Rationales, Report
from llmdistill.core.run import RUN_BEGAN, Run
from llmdistill.core.stage import Stage
from llmdistill.core.store import Store
from llmdistill.report.text import summary
from llmdistill.stages import scoring
from llmdistill.stages.evaluate import Evaluate, write
from llmdistill.stages.evaluate_baseline import EvaluateBaseline
from llmdistill.stages.report import ReportStage, print_summary
from llmdistill.statistics import mcnemar, wilson_interval
from llmdistill.tasks.answers.choice import Choice
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task

NASTY = "<script>alert('&\"</script><img src=x onerror=alert(1)>"
LABELS = ("cancel", "refund", "question")
NUM_ROWS = 30
VOID_TAGS = {"meta"}


def gold_of(number: int) -> str:
    return LABELS[number % 3]


def answer_of(number: int, every: int) -> str:
    """Right but for one row in `every`, which is wrong or unreadable by turns."""
    if number % every:
        return gold_of(number)
    return LABELS[(number + 1) % 3] if number % 2 else NASTY


@dataclass(frozen=True, kw_only=True)
class Train(Stage[Checkpoint]):
    """Logs as a training does that was killed after step 20 and logged it again."""

    artifact = Checkpoint
    rationales: Stage[Rationales] | None
    rate: float = 1.0

    def build(self, run: Run) -> Mapping[str, float]:
        for step, loss in [(10, 3.0), (20, 9.0), (20, 2.0 * self.rate), (30, 1.0)]:
            run.log_metrics(step=step, loss=loss, learning_rate=0.1)
        run.log_metrics(step=30, validation_accuracy=0.5)
        return {}


@dataclass(frozen=True, kw_only=True)
class Told(Evaluate):
    """An evaluation whose student answers what the test says."""

    every: int = 5

    def build(self, run: Run) -> Mapping[str, Any]:
        return _write(run, self, [answer_of(number, self.every) for number in range(NUM_ROWS)], weight_bytes=4_000_000)


@dataclass(frozen=True, kw_only=True)
class ToldBaseline(EvaluateBaseline):
    """A baseline whose answers are told too."""

    every: int = 2

    def build(self, run: Run) -> Mapping[str, Any]:
        return _write(run, self, [answer_of(number, self.every) for number in range(NUM_ROWS)], weight_bytes=None)


def _write(run: Run, stage: Told | ToldBaseline, answers: list[str], *, weight_bytes: int | None) -> Mapping[str, Any]:
    rows = scoring.rows_of_split(stage.task, stage.split)
    teacher = scoring.teacher_answers(run.artifact(stage.rationales)) if stage.rationales else {}
    lines = scoring.predictions(stage.task, rows, answers, teacher)
    of_batch = {f"{name}_batch_{size}": 2.5 for size in (1, 32) for name in ("latency_ms", "latency_p95_ms", "tokens_per_second")}
    line_of = {line["id"]: line for line in lines}
    samples = [
        {"input": stage.task.text(row), **line_of[row.id], "teacher_rationale": teacher[row.id].rationale if row.id in teacher else None, "rationale": NASTY}
        for row in scoring.sampled(rows, 2)
    ]
    return write(
        run.folder,
        lines,
        {
            "task": {"name": stage.task.name, "split": "test"},
            **scoring.score(stage.task, rows, lines),
            **of_batch,
            "num_cut_short": 0,
            "parameters": 1_000_000,
            "weight_bytes": weight_bytes,
            "peak_memory_bytes": 5_000_000,
            "samples": samples,
            "machine": {"processor": NASTY, "num_threads": 2, "device": "cpu", "versions": "torch 2"},
        },
    )


@dataclass(frozen=True, kw_only=True)
class Taught(Stage[Rationales]):
    """A teacher that labels five rows in six, always rightly, and is refused on the others."""

    artifact = Rationales
    has_gold: bool = True

    def build(self, run: Run) -> Mapping[str, int]:
        rows = [
            RationaleRow(id=f"row-{number}", split="test", input=NASTY, label=gold_of(number), rationale=NASTY, gold=None, confidence=1.0)
            for number in range(NUM_ROWS)
            if number % 6
        ]
        reasons = [NASTY, "no answer", "no answer", "no answer", "no answer"]
        refused = [
            {"id": f"row-{6 * number}", "split": "test", "input": NASTY, "gold": None, "reason": reason, "completion": NASTY}
            for number, reason in enumerate(reasons)
        ]
        account: dict[str, Any] = {
            "model": f"teacher {NASTY}",
            "revision": "1",
            "accuracy": 25 / 30 if self.has_gold else None,
            "num_rows_accuracy": 30 if self.has_gold else 0,
            "accuracy_train": None,
            "num_rows": NUM_ROWS,
            "num_completions": 30,
            "num_refused": 5,
            "tokens_in": 1000,
            "tokens_out": 100,
            "seconds": 60.0,
            "tokens_per_second": 1.7,
            "cost_dollars": 0.0,
            "num_asked": 0,
        }
        (run.folder / "rationales.jsonl").write_text("".join(json.dumps(vars(row)) + "\n" for row in rows))
        (run.folder / "refused.jsonl").write_text("".join(json.dumps(row) + "\n" for row in refused))
        (run.folder / "summary.json").write_text(json.dumps(account))
        return {}


@dataclass(frozen=True, kw_only=True)
class Searched(Stage[FoundSubnets]):
    """A search that found one sub-network."""

    artifact = FoundSubnets

    def build(self, run: Run) -> Mapping[str, int]:
        point = {"subnet": f"ffn=8,{NASTY}", "parameters": 1000, "predicted_accuracy": 0.625, "measured_accuracy": 0.5, "is_largest": True, "is_smallest": True}
        costs = {"predicted": {"parameters": 1000}, "measured": {"parameters": 1000}}
        quality = {"kendall_tau": 0.5, "mean_absolute_error": 0.125, "num_held_out": 2}
        found = {"limits": [], "methods": {"evolution": {"num_asked": 1, "hypervolume": 0.25}}, "num_samples": 10, "accuracy_predictor": quality}
        found |= {
            "cost_predictors": {},
            "cost": "parameters",
            "asked": [{"accuracy": 0.625, "cost": 1000}],
            "chosen": point["subnet"],
            "points": [point | costs],
        }
        (run.folder / SEARCH).write_text(json.dumps(found))
        return {}


def pipeline(folder: Path, *, has_gold: bool = True, has_teacher: bool = True) -> ReportStage:
    rows = [{"id": f"row-{number}", "text": f"{NASTY} {number}", "gold": gold_of(number) if has_gold else None, "split": "test"} for number in range(NUM_ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task(
        name=NASTY,
        source=Table(path=folder / "rows.jsonl"),
        answer=Choice(choices=LABELS),
        input_template="{text}",
        gold_column="gold",
        id_column="id",
        split_column="split",
    )
    taught = Taught(has_gold=has_gold)
    rationales = taught if has_teacher else None
    students = [Train(name="label_only", rationales=rationales), Train(name="multi_task", rationales=rationales, rate=0.5)]
    evaluations = tuple(
        Told(name=f"evaluate_{student.name}", checkpoint=student, task=task, rationales=rationales, every=every)
        for student, every in zip(students, (2, 10), strict=True)
    )
    baselines = (ToldBaseline(task=task, rationales=taught),) if has_teacher else ()
    return ReportStage(title=NASTY, evaluations=evaluations, baselines=baselines, rationales=rationales)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Store(tmp_path / "store").build(pipeline(tmp_path))


def test_programs_find_what_they_rely_on(report: Report, tmp_path: Path) -> None:
    data = report.data()
    assert [student["name"] for student in data["students"]] == ["label_only", "multi_task"]
    for student, every in zip(data["students"], (2, 10), strict=True):
        num_correct = sum(answer_of(number, every) == gold_of(number) for number in range(NUM_ROWS))
        assert student["accuracy"] == num_correct / NUM_ROWS
        assert student["accuracy_ci95"] == list(wilson_interval(num_correct, NUM_ROWS))
        assert (student["parameters"], student["weight_bytes"], student["latency_ms_batch_1"], student["tokens_per_second_batch_32"]) == (
            1_000_000,
            4_000_000,
            2.5,
            2.5,
        )
        assert student["checkpoint"].startswith("train-")
    wanted = {"model", "accuracy", "num_completions", "num_refused", "tokens_in", "tokens_out"}
    assert wanted <= data["teacher"].keys()
    assert data["teacher"]["accuracy_ci95"] == list(wilson_interval(25, 30))
    assert data["refused"]["by_reason"] == {"no answer": 4, NASTY: 1}
    assert [set(stage) for stage in data["stages"]] == [{"name", "key", "seconds", "cached", "depends_on"}] * 7
    assert data["stages"][-1]["key"] == pipeline(tmp_path).key
    assert data["best_student"] == "multi_task"
    assert [row["name"] for row in data["baselines"]] == ["bag of words"]


def test_students_are_compared_on_the_same_rows(report: Report) -> None:
    pairs = {(pair["first"], pair["second"]): pair for pair in report.data()["comparisons"]}
    assert set(pairs) == {
        ("label_only", "multi_task"),
        *((student, other) for student in ("label_only", "multi_task") for other in ("bag of words", "teacher")),
    }
    right = {name: [answer_of(number, every) == gold_of(number) for number in range(NUM_ROWS)] for name, every in [("label_only", 2), ("multi_task", 10)]}
    right["teacher"] = [bool(number % 6) for number in range(NUM_ROWS)]
    for first, second in [("label_only", "multi_task"), ("multi_task", "teacher")]:
        expected = mcnemar(right[first], right[second])
        pair = pairs[first, second]
        assert (pair["p_exact"], pair["num_only_first_correct"], pair["num_rows"]) == (expected.p_exact, expected.num_only_first_correct, NUM_ROWS)
    assert pairs["label_only", "multi_task"]["verdict"] == "multi_task is better"
    assert pairs["multi_task", "teacher"]["verdict"] == "could be chance"


def test_searches_are_told_and_shown(report: Report, tmp_path: Path) -> None:
    assert report.data()["elastic"] == []
    stage = dataclasses.replace(pipeline(tmp_path), searches=(Searched(name="search"),))
    again = Store(tmp_path / "store").build(stage)
    (told,) = again.data()["elastic"]
    (read,) = (tmp_path / "store").glob("searched-*")
    assert told == {"name": "search", **FoundSubnets(read).found()}
    page = again.page.read_text(encoding="utf-8")
    assert "62.5%" in page
    assert NASTY not in page


def test_a_step_that_was_logged_twice_counts_once(report: Report) -> None:
    histories = {history["name"]: history["points"] for history in report.data()["training"]}
    assert list(histories) == ["label_only", "multi_task"]
    assert [point["step"] for point in histories["label_only"]] == [10, 20, 30]
    assert histories["label_only"][1]["loss"] == 2.0
    assert histories["label_only"][2]["validation_accuracy"] == 0.5


def test_stages_that_were_there_before_the_run_are_called_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, last = Store(tmp_path / "store"), pipeline(tmp_path)
    store.build(last.evaluations[0])
    time.sleep(0.02)
    monkeypatch.setenv(RUN_BEGAN, str(time.time()))
    time.sleep(0.02)
    states = {stage["name"]: stage["cached"] for stage in store.build(last).data()["stages"]}
    assert states == {
        "taught": True,
        "label_only": True,
        "evaluate_label_only": True,
        "multi_task": False,
        "evaluate_multi_task": False,
        "told_baseline": False,
        "report": False,
    }


class Page(HTMLParser):
    """Checks that tags are closed and collects what could reach out."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"


@pytest.mark.parametrize("has_gold, has_teacher", [(True, True), (False, True), (True, False)])
def test_the_page_is_one_safe_file(tmp_path: Path, has_gold: bool, has_teacher: bool) -> None:
    report = Store(tmp_path / "store").build(pipeline(tmp_path, has_gold=has_gold, has_teacher=has_teacher))
    html = report.page.read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert not page.tags & {"script", "img", "link", "iframe", "object", "form", "base"}, "what the teacher wrote must stay text"
    assert not any(name.startswith("on") or name == "src" for name, _ in page.attributes)
    anchors = {value for name, value in page.attributes if name == "id"}
    for name, value in page.attributes:
        assert name != "href" or (value.startswith("#") and value[1:] in anchors), f"a link leads to {value}"
        assert "url(" not in value
    assert "http://" not in html
    assert "https://" not in html
    assert "&lt;script&gt;" in html
    sections = {"students", "samples", "training", "pipeline"} | ({"errors"} if has_gold else set()) | ({"teacher"} if has_teacher else set())
    assert sections <= anchors
    assert json.loads((report.folder / "report.json").read_text())["students"][0]["accuracy"] is None or has_gold
    assert summary(report.data())


def test_the_terminal_shows_the_figures(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(report.data())
    shown = capsys.readouterr().out
    assert "90.0%" in shown
    assert "bag of words" in shown
    assert "5 rows refused" in shown
    lines = [line for line in shown.splitlines() if line.startswith(("label_only  ", "multi_task  ")) and "MB" in line]
    assert len(lines) == 2
    assert len({line.rindex("2.5") for line in lines}) == 1, "columns stand under each other"


def test_students_must_have_names_of_their_own(tmp_path: Path) -> None:
    stage = pipeline(tmp_path)
    with pytest.raises(ValueError, match="more than one student of the report is called 'label_only'"):
        ReportStage(evaluations=(stage.evaluations[0], stage.evaluations[0]))
    with pytest.raises(ValueError, match="evaluations is empty"):
        ReportStage(evaluations=())
