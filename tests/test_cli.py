"""The command line as people use it: real processes, killed, doubled, launched by accelerate."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reviews
import yaml

ROOT = Path(__file__).parents[1]
REVIEWS = Path(reviews.__file__)
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "fastapi", "openai", "numpy", "tyro", "jinja2"}
COUNTING = ROOT / "tests" / "core" / "counting.py"
SUMMARY = "sums 2470 and 2870"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LLMDISTILL_RUNS")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no accelerate config here"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "llmdistill", *words]


def _run(*words: str, code: int = 0, launcher: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "llmdistill", *words] if launcher else _command(*words)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    return result


def _artifacts(runs: Path = Path("runs")) -> dict[str, bytes]:
    """Every file that the stages themselves wrote."""
    return {
        str(path.relative_to(runs / "store")): path.read_bytes()
        for path in sorted((runs / "store").rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", "options.yaml", "writers.txt")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of an undisturbed run; only to be read."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    environment = os.environ | {"LLMDISTILL_RUNS": str(runs), "PYTHONPATH": str(ROOT)}
    subprocess.run(_command("run", str(COUNTING)), env=environment, check=True, capture_output=True)
    return runs


def _imported_by(*commands: list[str]) -> tuple[str, set[str]]:
    """What commands print, and which heavy packages they have imported for that."""
    script = f"""
import sys
from llmdistill.cli import main
for words in {commands!r}:
    try:
        main(words)
    except SystemExit as end:
        assert not end.code
print("imported:", *({HEAVY!r} & sys.modules.keys()))
"""
    begin = time.perf_counter()
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    print(f"{commands}: {time.perf_counter() - begin:.2f} s")
    text, _, names = printed.rpartition("imported:")
    return text, set(names.split())


def test_help_comes_at_once() -> None:
    text, imported = _imported_by(["--help"])
    assert "run FILE|NAME" in text
    assert not imported


def test_help_of_a_pipeline_shows_its_options_and_imports_nothing_heavy() -> None:
    text, imported = _imported_by(["run", str(COUNTING), "--help"], ["run", str(ROOT / "pipelines" / "quickstart.py"), "--help"])
    for part in (
        "Count, add up, say so.",
        "--num-lines INT",
        "how far (default: 20)",
        "--series squares|multiples",
        "multiples:FACTOR",
        "n * factor",
        "--dry-run",
        "--rationale-weight FLOAT",
        "recorded:FOLDER",
    ):
        assert part in text
    assert imported == {"tyro"}


def test_every_command_has_help() -> None:
    names = ("status", "init", "report", "serve", "extract", "import", "export")
    text, imported = _imported_by(*([name, "--help"] for name in names))
    assert all(f"usage: llmdistill {name}" in text for name in names)
    assert not imported & {"torch", "transformers", "datasets", "peft", "accelerate"}


def test_a_run_from_plan_to_status(here: Path) -> None:
    plan = _run("run", str(COUNTING), "--dry-run").stdout
    assert re.search(r"count +count-\w{20} +to build +num_rows=20, cost_dollars=0.02", plan)
    assert re.search(r"add +add-\w{20} +to build +known when count is built", plan)
    assert "5 of 5 stages to build" in plan
    assert not Path("runs").exists()

    _run("run", str(COUNTING), "--until", "add")
    assert sorted(link.name for link in Path("runs/counting/latest").iterdir()) == ["add", "count"]
    plan = _run("run", str(COUNTING), "--dry-run").stdout
    assert re.search(r"add +add-\w{20} +cached\n", plan)
    assert "3 of 5 stages to build" in plan

    result = _run("run", str(COUNTING))
    assert "[1/3] count_more" in result.stderr
    assert "[3/3] summary done" in result.stderr
    assert Path("runs/counting/latest/summary/summary.txt").read_text() == SUMMARY
    assert Path("runs/counting/latest/summary").is_symlink()


def test_status_is_a_tree(here: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing has been run yet" in _run("status").stdout
    monkeypatch.setenv("LLMDISTILL_RUNS", str(finished))
    status = _run("status", "counting").stdout
    assert re.search(r"summary +summary-\w{20} +complete +[\d.]+ s +\d+ k?B", status)
    assert re.search(r"├─ add +add-\w{20} +complete", status)
    assert re.search(r"│  └─ count +count-\w{20} +complete", status)


def test_a_finished_run_builds_nothing(here: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMDISTILL_RUNS", str(finished))
    files = _artifacts(finished)
    begin = time.perf_counter()
    result = _run("run", str(COUNTING))
    print(f"a finished pipeline: {time.perf_counter() - begin:.2f} s")
    assert "[1/" not in result.stderr
    assert "summary: " in result.stdout
    assert _artifacts(finished) == files


def test_options_are_kept_and_run_again(here: Path) -> None:
    _run("run", str(COUNTING), "--series", "multiples:3", "--num-lines", "4")
    kept = Path("runs/counting/options.yaml").read_text()
    template = str(COUNTING.with_name("counting.txt"))
    assert yaml.safe_load(kept) == {"series": "multiples:3", "num_lines": 4, "pause_s": 0.0, "failure": "", "template": template}
    assert Path("runs/counting/latest/summary/options.yaml").read_text() == kept
    Path("mine.yaml").write_text(kept)
    assert "0 of 5 stages to build" in _run("run", str(COUNTING), "--config", "mine.yaml", "--dry-run").stdout
    assert "5 of 5 stages to build" in _run("run", str(COUNTING), "--config=mine.yaml", "--num-lines", "9", "--dry-run").stdout
    directly = subprocess.run([sys.executable, str(COUNTING), "--config", "mine.yaml", "--dry-run"], capture_output=True, text=True, check=True)
    assert "0 of 5 stages to build" in directly.stdout


def test_the_text_of_a_prompt_counts_and_not_its_place(here: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMDISTILL_RUNS", str(finished))
    template = Path("template.txt")
    template.write_text("sums {} and {}")
    assert "0 of 5 stages to build" in _run("run", str(COUNTING), "--template", str(template), "--dry-run").stdout
    template.write_text("the sums {} and {}")
    assert "1 of 5 stages to build" in _run("run", str(COUNTING), "--template", str(template), "--dry-run").stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["run", "nothing"], "there is no pipeline 'nothing'"),
        (["run", "nothing.py"], "there is no pipeline file"),
        (["run", str(COUNTING), "--until", "end"], "this pipeline has count, add, count_more, add_more, summary"),
        (["run", str(COUNTING), "--config", "missing.yaml"], "there is no such file"),
        (["run", str(COUNTING), "--series", "cubes"], "is of no known kind"),
        (["run", str(COUNTING), "--template", "missing.txt", "--dry-run"], "the path missing.txt, where there is no file"),
        (["run", str(REVIEWS), "--num-steps", "0"], "duration is 0 steps; give 1 or more"),
        (["run"], "usage: llmdistill run"),
        (["walk"], "there is no command 'walk'"),
    ],
)
def test_misuse_is_told_in_one_message(here: Path, words: list[str], message: str) -> None:
    result = _run(*words, code=2)
    assert message in (result.stderr + result.stdout).replace("\n", " ")
    assert "Traceback" not in result.stderr


def test_a_reader_that_has_enough_is_no_error(here: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(_command("run", str(COUNTING), "--dry-run"), stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, "")


def test_unknown_options_in_a_config_are_refused(here: Path) -> None:
    Path("mine.yaml").write_text("num_linse: 4\n")
    assert "sets 'num_linse', which is no option" in _run("run", str(COUNTING), "--config", "mine.yaml", code=2).stderr


def test_a_failing_stage_shows_its_traceback_and_keeps_what_it_did(here: Path) -> None:
    result = _run("run", str(COUNTING), "--failure", "error", code=1)
    assert "RuntimeError: failed as asked" in result.stderr
    assert "count did not finish (exit code 1)" in result.stderr
    assert re.search(r"count +count-\w{20} +partial", _run("status").stdout)
    assert "[1/1] count (" in _run("run", str(COUNTING), "--until", "count").stderr


def test_a_stage_that_stops_on_purpose_has_no_traceback(here: Path) -> None:
    result = _run("run", str(COUNTING), "--failure", "stop", code=75)
    assert "the budget is spent" in result.stderr
    assert "Traceback" not in result.stderr
    assert "count stopped early, as asked" in result.stderr


def test_killed_at_any_moment_it_ends_in_the_same_artefacts(here: Path, finished: Path) -> None:
    moments = random.Random(0)
    command = _command("run", str(COUNTING), "--pause-s", "0.02")
    num_kills = 0
    for _ in range(100):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(moments.uniform(0.3, 1.5)) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # the stage's own process is left behind, as after a real kill
            process.wait()
            num_kills += 1
            if num_kills == 8:
                subprocess.run(command, check=True, capture_output=True)
                break
    assert num_kills > 0
    assert _artifacts() == _artifacts(finished)
    writers = Path("runs/store/writers.txt").read_text().split()
    turns = [writer for index, writer in enumerate(writers) if index == 0 or writers[index - 1] != writer]
    assert len(turns) == len(set(turns)), "two processes wrote at the same time"
    assert not list(Path("runs/store").glob("*.partial"))


def test_two_runs_at_once_build_once(here: Path, finished: Path) -> None:
    command = _command("run", str(COUNTING), "--pause-s", "0.06")
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    texts = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("waiting for it" in text for text in texts) >= 1
    assert len(Path("runs/store/writers.txt").read_text().split()) == 20 + 21
    assert _artifacts() == _artifacts(finished)


def test_sigterm_ends_the_stage_too(here: Path) -> None:
    process = subprocess.Popen(_command("run", str(COUNTING), "--pause-s", "1"), stderr=subprocess.DEVNULL)
    writers = Path("runs/store/writers.txt")
    while not (writers.exists() and writers.read_text()):
        time.sleep(0.1)
    child = int(writers.read_text().split()[0])
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


SMALL = ("--num_machines", "1", "--dynamo_backend", "no")


def test_launched_by_hand(here: Path) -> None:
    result = _run("run", str(COUNTING), launcher=("--cpu", "--num_processes", "1", "--mixed_precision", "no", *SMALL))
    assert Path("runs/counting/latest/summary/summary.txt").read_text() == SUMMARY
    assert '"num_processes": 1' in Path("runs/counting/latest/add_more/manifest.json").read_text()
    assert len(Path("runs/store/writers.txt").read_text().split()) == 20 + 21  # a stage that does not train runs once
    assert result.stderr.count("[3/5] count_more (") == 1
    assert "--accelerate-args" in _run("run", str(COUNTING), "--accelerate-args=--cpu", launcher=("--cpu", "--num_processes", "1", *SMALL), code=1).stderr


def test_a_training_launched_by_hand_as_an_accelerate_config_says(here: Path) -> None:
    reviews.write_rows(Path("rows.jsonl"))
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 1, "mixed_precision": "bf16"}
    Path("two.yaml").write_text(yaml.safe_dump(config))
    _run("run", str(REVIEWS), "--until", "label_only", launcher=("--config_file", "two.yaml"))
    figures = json.loads(Path("runs/reviews/latest/label_only/manifest.json").read_text())["figures"]
    assert (figures["num_processes"], figures["mixed_precision"]) == (2, "bf16")
    assert json.loads(Path("runs/reviews/latest/annotate/summary.json").read_text())["num_asked"] == 40
    assert not list(Path("runs/store").glob("*.*"))


def test_a_users_accelerate_config_and_flags_arrive_where_stages_train(here: Path) -> None:
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True},
        "num_processes": 1,
        "num_machines": 1,
        "mixed_precision": "bf16",
    }
    path = Path(os.environ["HF_HOME"]) / "accelerate" / "default_config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(config))
    _run("run", str(COUNTING), "--until", "add", "--accelerate-args", "--num_processes 2")
    assert Path("runs/counting/latest/add/sum.txt").read_text() == "2470"
    figures = json.loads(Path("runs/counting/latest/add/manifest.json").read_text())["figures"]
    assert figures == {"num_processes": 2, "precision": "bf16", "fsdp_offload": "true"}
