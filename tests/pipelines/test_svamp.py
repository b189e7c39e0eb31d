"""pipelines/svamp.py: published completions, joined by position with their problems."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmdistill.cli import main
from llmdistill.core.pipeline import run

SVAMP = Path(__file__).parents[3] / "shared" / "data" / "svamp"


def test_from_published_files_to_a_report(start: Callable[..., Any], svamp_folder: Path) -> None:
    pipeline = start("svamp", "--data", str(svamp_folder), "--student", "t5?vocabulary_size=300", "--duration", "steps:2", "--losses", "multitask")
    assert pipeline.names() == ["published_rationales", "multitask", "evaluate_multitask", "report"]
    report = pipeline.report()
    teacher = report.data()["teacher"]
    assert teacher["model"] == "PaLM 540B"
    assert (teacher["num_completions"], teacher["num_refused"], teacher["tokens_in"]) == (40, 0, None)
    assert (teacher["accuracy_train"], teacher["accuracy_train_published_rule"]) == (0.8, 0.8)
    assert (teacher["accuracy"], teacher["accuracy_published_rule"]) == (0.8, 0.7)
    assert [student["name"] for student in report.data()["students"]] == ["multitask"]
    page = report.page.read_text()
    assert all(part in page for part in ("PaLM 540B", "80.0%", "70.0%", "read by the published rule"))


def test_a_missing_completion_is_an_error_that_says_where(start: Callable[..., Any], svamp_folder: Path) -> None:
    path = svamp_folder / "llm" / "train_CoT_0.json"
    completions = json.loads(path.read_text())
    for kept, message in (
        (completions[:12] + completions[13:], r"30 rows but 29 completions.*completion 12 of train_CoT_0.json"),
        (completions[1:] + completions[:1], r"do not stand in the order of the rows.*completion 0 of train_CoT_0.json"),
    ):
        path.write_text(json.dumps(kept))
        pipeline = start("svamp", "--data", str(svamp_folder))
        with pytest.raises(ValueError, match=message):
            pipeline.store.build(pipeline.stage("published_rationales"))


def test_import_builds_what_the_pipeline_then_finds(
    svamp_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMDISTILL_RUNS", str(tmp_path / "runs"))
    task = f"equation:{svamp_folder}/svamp_train.json?test_rows={svamp_folder}/svamp_test.json&gold=label"
    main(["import", str(svamp_folder / "llm"), "--task", task, "--published", "--model", "PaLM 540B"])
    assert '"accuracy_published_rule": 0.7' in capsys.readouterr().out
    run(["svamp", "--data", str(svamp_folder), "--dry-run"])
    assert "published_rationales-" in (line := capsys.readouterr().out.splitlines()[1])
    assert line.split()[2] == "cached"


@pytest.mark.skipif(not SVAMP.is_dir(), reason="SVAMP is not here")
def test_the_published_figures(start: Callable[..., Any]) -> None:
    pipeline = start("svamp", "--data", str(SVAMP))
    summary = pipeline.store.build(pipeline.stage("published_rationales")).summary()
    assert (summary["accuracy_train_published_rule"], summary["accuracy_published_rule"]) == (0.735, 0.740)
    assert (summary["accuracy_train"], summary["accuracy"]) == (0.7425, 0.775)
