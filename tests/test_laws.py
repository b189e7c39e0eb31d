"""Laws of whole pipelines: what changes a key and what does not, and that a stage which is killed and run again ends in the same artefact.

Stages are built in processes forked from one that has imported everything, so that a kill and a new start cost milliseconds. A kill comes either when a process
is about to touch the file system for the n-th time, n drawn at random, or after a random time.
"""

import dataclasses
import enum
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import reviews

from llmdistill.compress.svd import SVD
from llmdistill.core.artifacts import Artifact, read_json, read_json_lines
from llmdistill.core.fingerprint import identity_fields
from llmdistill.core.graph import Graph
from llmdistill.core.pipeline import load
from llmdistill.core.stage import Stage
from llmdistill.core.store import Store
from llmdistill.stages.annotate import Annotate
from llmdistill.stages.calibrate import CalibrateExits
from llmdistill.stages.compress import Compress
from llmdistill.stages.exits import TrainExits, Trains
from llmdistill.teach.teacher import Sampling

ROOT = Path(__file__).parents[1]
REVIEWS = Path(reviews.__file__)
TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "sqlite3.connect"}
KINDS = ("annotate", "multitask", "evaluate_multitask", "evaluate_baseline", "report")
PRELOAD = ["__main__", "pytest", "llmdistill.train", "llmdistill.decode.latency", "llmdistill.stages.report", "llmdistill.report.page"]
NUM_ROUNDS = 5
MAX_KILLS = 3
TIMES = re.compile(r"seconds|_per_second|(^|_)ms(_|$)|memory_bytes$|_unix_s$|^time_s$|_utc$|^resumed$|^cached$")


# ---- keys ----


def _quickstart() -> Stage[Artifact]:
    return load(ROOT / "pipelines" / "quickstart.py")()


def _keys(last: Stage[Artifact]) -> dict[str, str]:
    return {stage.name: stage.key for stage in Graph.above(last).stages}


def test_the_keys_of_a_real_pipeline_are_equal_in_every_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmdistill", "run", str(ROOT / "pipelines" / "quickstart.py"), "--dry-run"]
    keys = _keys(_quickstart())
    for seed, folder in (("1", tmp_path), ("2", ROOT)):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        plan = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True).stdout
        assert dict(line.split()[:2] for line in plan.splitlines()[1:-1]) == keys


STUDENTS = {"label_only", "multitask", "evaluate_label_only", "evaluate_multitask", "report"}


@pytest.mark.parametrize(
    "options, changed",
    [
        ({}, set()),
        ({"checkpoint_every_s": 1.0}, set()),
        ({"rationale_weight": 0.25}, {"multitask", "evaluate_multitask", "report"}),
        ({"seed": 1}, STUDENTS),
        ({"num_steps": 9}, STUDENTS),
    ],
)
def test_an_option_changes_the_keys_of_what_it_reaches_and_no_others(tmp_path: Path, options: dict[str, Any], changed: set[str]) -> None:
    rows = reviews.write_rows(tmp_path / "rows.jsonl")
    before, after = _keys(reviews.pipeline(rows=rows)), _keys(reviews.pipeline(**{"rows": rows, **options}))
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_prompt_and_a_teacher_count_by_what_they_say(tmp_path: Path) -> None:
    rows, prompt = reviews.write_rows(tmp_path / "rows.jsonl"), tmp_path / "prompt.jinja"
    shutil.copy(reviews.PROMPT, prompt)
    before = _keys(reviews.pipeline(rows=rows))
    assert _keys(reviews.pipeline(rows=rows, prompt=prompt, teacher=reviews.WordTeacher(pause_s=1.0))) == before
    shutil.copy(rows, tmp_path / "other.jsonl")
    prompt.write_text(prompt.read_text() + "\n")
    with (tmp_path / "other.jsonl").open("a") as file:
        file.write('{"id": "new", "text": "a new one", "mood": "bad"}\n')
    others: list[dict[str, Any]] = [{"prompt": prompt}, {"teacher": reviews.WordTeacher(revision="2")}, {"rows": tmp_path / "other.jsonl"}]
    for options in others:
        after = _keys(reviews.pipeline(**{"rows": rows, **options}))
        assert all(before[name] != after[name] for name in before)


def test_every_identity_field_of_every_stage_counts_for_it_and_those_below_alone() -> None:
    last = _quickstart()
    annotate = Graph.above(last).stages[0]
    assert isinstance(annotate, Annotate)
    last = _with(last, annotate, dataclasses.replace(annotate, max_rows=100.0, sampling=Sampling(temperature=0.7)))  # so that more of both is allowed
    compressed = next(stage for stage in Graph.above(last).stages if isinstance(stage, Compress))
    in_order = tuple(dataclasses.replace(method, in_order=True) if isinstance(method, SVD) else method for method in compressed.methods)
    last = _with(last, compressed, dataclasses.replace(compressed, methods=in_order))
    exits = next(stage for stage in Graph.above(last).stages if isinstance(stage, TrainExits))
    last = _with(last, exits, dataclasses.replace(exits, trains=Trains.WHOLE))  # else no layer may be left out
    calibrated = next(stage for stage in Graph.above(last).stages if isinstance(stage, CalibrateExits))
    last = _with(last, calibrated, dataclasses.replace(calibrated, deltas=(0.02, 0.05)))
    before = _keys(last)
    below = {name: {other.name for other in Graph.above(last).stages if name in _keys(other)} for name in before}
    num_fields = 0
    for stage in Graph.above(last).stages:
        for where, changed in _changes(stage):
            after = _keys(_with(last, stage, changed))
            assert {name for name in before if before[name] != after[name]} == below[stage.name], f"{stage.name}: {where}"
            num_fields += 1
    assert num_fields > 150


def test_no_speed_field_counts() -> None:
    names = set()
    for stage in Graph.above(_quickstart()).stages:
        for field in dataclasses.fields(stage):
            if field.name not in dict(identity_fields(stage)):
                value = getattr(stage, field.name)
                changed = f"{value}x" if isinstance(value, str) else value / 2 if value != math.inf else 1.0
                assert dataclasses.replace(stage, **{field.name: changed}).key == stage.key
                names.add(field.name)
    assert {"name", "max_cost_dollars", "max_batch_rows"} <= names


def _with(last: Any, old: Stage[Artifact], new: Stage[Artifact]) -> Any:
    """The same graph with one stage in the place of another."""
    if isinstance(last, Stage) and last.key == old.key and last.name == old.name:
        return new
    if isinstance(last, tuple):
        return tuple(_with(item, old, new) for item in last)
    if isinstance(last, Stage):
        fields = {name: value for name, value in identity_fields(last) if _holds_stage(value)}
        return dataclasses.replace(last, **{name: _with(value, old, new) for name, value in fields.items()})
    return last


def _holds_stage(value: Any) -> bool:
    return isinstance(value, Stage) or (isinstance(value, tuple) and any(map(_holds_stage, value)))


def _changes(value: Any) -> Iterator[tuple[str, Any]]:
    """The dataclass with one of its identity's leaves changed, in every way that there is; stages upstream are left alone."""
    for name, item in identity_fields(value):
        if _holds_stage(item):
            continue
        if dataclasses.is_dataclass(item) and not hasattr(item, "fingerprint"):
            others = [(f"{name}.{where}", changed) for where, changed in _changes(item)]
        else:
            others = [(name, other) for other in _others(item)]
        accepted = []
        for where, other in others:
            try:
                accepted.append((where, dataclasses.replace(value, **{name: other})))
            except (ValueError, TypeError):  # out of the field's range
                continue
        assert accepted or not others, f"{type(value).__name__}.{name}: no value that the test tried is allowed"
        yield from accepted


def _others(value: Any) -> list[Any]:
    """Values of the same kind; the test needs one that the field allows."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, enum.Enum):
        return [member for member in type(value) if member is not value]
    if isinstance(value, (int, float)):
        return [value + 1, value + 0.25, value * 0.9 - 0.01] if isinstance(value, float) else [value + 1, value + 2]
    if isinstance(value, str):
        return [value + "x", "train", "{text}"]
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        changes = [(place, changed) for place, item in enumerate(value) for _, changed in _changes(item)]
        return [value[:-1], *((*value[:place], changed, *value[place + 1 :]) for place, changed in changes)]
    if isinstance(value, tuple):
        return [(*value, "x"), value[:-1]] if value else [("x",)]
    if isinstance(value, Mapping):
        return [{**value, "num_cycles": 2.0}]
    return []  # None, paths and objects with an identity of their own: tested where they are


# ---- kills ----


class _KillAt:
    """Kills this process when it is about to touch a folder's files for the n-th time; counts otherwise."""

    def __init__(self, folder: Path, number: int) -> None:
        self.num_touches = 0
        self._folder, self._number = str(folder), number
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in TOUCHES and isinstance(arguments[0], (str, os.PathLike)) and os.path.abspath(arguments[0]).startswith(self._folder):
            self.num_touches += 1
            if self.num_touches == self._number:
                os.kill(os.getpid(), signal.SIGKILL)


def _build(folder: str, name: str, kill_at: int) -> None:
    """In a process of its own: build one stage in a folder, whose upstream is there."""
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ["LLMDISTILL_CACHE"] = f"{folder}/cache"
    last = load(REVIEWS)(num_steps=4, checkpoint_every_s=1e-6)
    stage = next(stage for stage in Graph.above(last).stages if stage.name == name)
    killer = _KillAt(Path(folder), kill_at)
    begin = time.monotonic()
    Store(Path("store")).build(stage)
    Path("undisturbed.json").write_text(json.dumps({"num_touches": killer.num_touches, "seconds": time.monotonic() - begin, "key": stage.key}))


@pytest.fixture(scope="module")
def start() -> Callable[..., Any]:
    """Starts a build in a forked process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["__main__", "pytest", "llmdistill.train", "llmdistill.decode.latency", "llmdistill.stages.report", "llmdistill.report.page"]
    )

    def start(folder: Path, name: str, kill_at: int = 0) -> Any:
        process = context.Process(target=_build, args=(str(folder), name, kill_at))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Any]) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A folder where every stage was built undisturbed, and what that took."""
    folder = tmp_path_factory.mktemp("laws") / "finished"
    folder.mkdir()
    reviews.write_rows(folder / "rows.jsonl")
    costs = {}
    for name in ("annotate", "multitask", "label_only", "evaluate_multitask", "evaluate_label_only", "evaluate_baseline", "report"):
        process = start(folder, name)
        process.join()
        assert process.exitcode == 0
        costs[name] = read_json(folder / "undisturbed.json")
    (folder / "undisturbed.json").unlink()
    return folder, costs


@pytest.mark.parametrize("name", KINDS)
def test_killed_at_any_moment_and_run_again_it_is_the_same(tmp_path: Path, finished: tuple[Path, Any], start: Callable[..., Any], name: str) -> None:
    reference, costs = finished
    cost = costs[name]
    draw = random.Random(name)
    num_kills = 0
    for number in range(3 * NUM_ROUNDS):
        if number >= NUM_ROUNDS and num_kills >= NUM_ROUNDS:  # on a machine that is busy by fits and starts many kills come too late
            break
        folder = tmp_path / str(number)
        shutil.copytree(reference, folder, symlinks=True)
        shutil.rmtree(folder / "store" / cost["key"])
        if name == "annotate":
            shutil.rmtree(folder / "cache")
        exitcode = -1
        for _ in range(draw.randint(1, MAX_KILLS)):
            if draw.random() < 0.6:
                process = start(folder, name, draw.randint(1, cost["num_touches"]))
            else:
                process = start(folder, name)
                process.join(draw.uniform(0, cost["seconds"]))
                process.kill()
            process.join()
            num_kills += process.exitcode == -signal.SIGKILL
            exitcode = process.exitcode
        if exitcode != 0:
            process = start(folder, name)
            process.join()
            assert process.exitcode == 0
        assert _contents(folder / "store" / cost["key"]) == _contents(reference / "store" / cost["key"])
        assert not list((folder / "store").glob("*.partial"))
    assert num_kills >= NUM_ROUNDS


def _contents(folder: Path) -> dict[str, Any]:
    """Every file of an artefact, without the times that it took."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _content(path: Path) -> Any:
    if path.name == "report.html":
        return path.read_text().count("</html>")  # drawn from report.json
    if path.name == "metrics.jsonl":
        steps: dict[tuple[int, bool], Any] = {}
        for line in read_json_lines(path):
            steps[line.get("step", -1), "validation_loss" in line] = _without_times(line)  # a step that is logged again: the last line counts
        return steps
    if path.suffix == ".json":
        return _without_times(read_json(path))
    if path.name == "README.md":
        return re.sub(r"\| (training_seconds|training_cpu_seconds) \| [\d.]+ \|", "", path.read_text())
    return path.read_bytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if not TIMES.search(key)}
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    return re.sub(r"[\d.]+ (ms|s|tokens/s)\b|[\d.,k]+ tokens/s", "", value) if isinstance(value, str) else value
