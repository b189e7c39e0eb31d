"""The store: finished or not there; built once; and what a run may read."""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes import Join, Twice, Words

from llmdistill.core.artifacts import Artifact
from llmdistill.core.run import NotBuilt, Run
from llmdistill.core.stage import Stage
from llmdistill.core.store import State, Store


@dataclass(frozen=True, kw_only=True)
class Fragile(Stage[Artifact]):
    """Fails the first time, and counts what it found."""

    artifact = Artifact

    def build(self, run: Run) -> Mapping[str, int]:
        left = run.folder / "left.txt"
        if not left.exists():
            left.write_text("half")
            raise RuntimeError("the first time")
        left.write_text(left.read_text() + " whole")
        return {}


@dataclass(frozen=True, kw_only=True)
class Peeking(Stage[Artifact]):
    """Reads what is no field of it."""

    artifact = Artifact

    def build(self, run: Run) -> Mapping[str, int]:
        run.artifact(Words())
        return {}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_builds_what_is_missing_upstream(store: Store) -> None:
    ab, c = Words(text="ab"), Words(text="c")
    stage = Join(parts=(Twice(words=ab), Words(text="ab", batch_size=9)), named={"c": c})
    artifact = store.build(stage)
    assert (artifact.folder / "words.txt").read_text() == "abababc"
    assert sorted(path.name for path in store.root.iterdir()) == sorted([stage.key, Twice(words=ab).key, ab.key, c.key])


def test_the_manifest_says_how_it_came_to_be(store: Store) -> None:
    stage = Twice(words=Words(text="ab", batch_size=2))
    manifest = store.build(stage).manifest()
    assert manifest["stage"] == "twice"
    assert manifest["key"] == stage.key
    assert manifest["upstream"] == [stage.words.key]
    assert manifest["settings"] == {"type": "Twice", "name": "twice", "words": stage.words.key}
    assert manifest["peak_memory_bytes"] > 1_000_000
    assert manifest["seconds"] >= 0
    assert {"python", "torch", "transformers"} <= manifest["versions"].keys()
    words = store.artifact(stage.words).manifest()
    assert words["figures"] == {"num_characters": 2}
    assert words["settings"]["batch_size"] == 2


def test_a_finished_stage_is_not_built_again(store: Store) -> None:
    first = store.build(Words()).manifest()
    assert store.build(Words(batch_size=99)).manifest() == first


def test_a_failed_build_keeps_what_it_did_and_goes_on(store: Store) -> None:
    with pytest.raises(RuntimeError, match="the first time"):
        store.build(Fragile())
    assert store.state(Fragile().key) is State.PARTIAL
    artifact = store.build(Fragile())
    assert (artifact.folder / "left.txt").read_text() == "half whole"
    assert artifact.manifest()["resumed"]
    assert [path.name for path in store.root.iterdir()] == [Fragile().key]


def test_a_kill_between_manifest_and_rename_only_needs_the_rename(store: Store) -> None:
    partial = store.partial(Words())
    partial.mkdir(parents=True)
    (partial / "manifest.json").write_text("{}")
    store.publish(Words(), lambda token: pytest.fail("built again"), beside={"options.yaml": "a: 1\n"})
    assert sorted(path.name for path in store.folder(Words()).iterdir()) == ["manifest.json", "options.yaml"]


def test_builders_of_one_key_take_turns(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    num_builds = 0
    begun, may_end = threading.Event(), threading.Event()

    def build(token: str) -> None:
        nonlocal num_builds
        num_builds += 1
        assert store.state(Words().key) is State.BUILDING
        begun.set()
        assert may_end.wait(20)
        store.work(Words())

    threads = [threading.Thread(target=store.publish, args=(Words(), build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(20)
    for _ in range(200):
        if "waiting for it" in caplog.text:
            break
        threading.Event().wait(0.05)
    may_end.set()
    for thread in threads:
        thread.join(20)
    assert num_builds == 1
    assert "another run (process" in caplog.text
    assert [path.name for path in store.root.iterdir()] == [Words().key]


def test_a_stage_reads_only_what_its_key_covers(store: Store) -> None:
    store.build(Words())
    with pytest.raises(ValueError, match="none of its fields holds"):
        store.build(Peeking())


def test_a_plan_learns_that_its_upstream_is_not_built(store: Store) -> None:
    stage = Twice(words=Words())
    run = Run(stage, store)
    assert not run.has(stage.words)
    with pytest.raises(NotBuilt, match="known when words is built"):
        run.artifact(stage.words)


def test_above_tells_what_this_run_built(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Join(parts=(Twice(words=Words()),), named={"again": Words()})
    store.build(stage)
    finished = store.artifact(Words()).manifest()["finished_unix_s"]
    for began, is_cached in ((finished + 1000, True), (finished - 1000, False)):
        monkeypatch.setenv("LLMDISTILL_RUN_BEGAN_UNIX_S", str(began))
        above = Run(stage, store).above()
        assert [(manifest["stage"], manifest["cached"]) for manifest in above] == [("words", is_cached), ("twice", is_cached)]


def test_metrics_survive_a_torn_line(store: Store) -> None:
    run = Run(Words(), store)
    run.folder.mkdir(parents=True)
    run.log_metrics(step=1, loss_nats=2.0)
    path = run.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    run.log_metrics(step=2, loss_nats=1.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss_nats"]) for line in lines] == [(1, 2.0), (2, 1.0)]


def test_progress_is_silent_without_a_terminal(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with Run(Words(), store).progress(10, "rows") as bar:
        bar.advance()
        bar.advance(9)
    assert capsys.readouterr() == ("", "")
