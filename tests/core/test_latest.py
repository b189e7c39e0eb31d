"""What a run leaves for people: links to what is finished, whoever else writes there."""

import json
import threading
from pathlib import Path

import pytest
from fakes import Twice, Words

from llmdistill.core.graph import Graph
from llmdistill.core.latest import Latest
from llmdistill.core.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def _names(latest: Latest) -> list[str]:
    return sorted(path.name for path in (latest.folder / "latest").iterdir())


def test_links_what_is_finished_and_nothing_else(tmp_path: Path, store: Store) -> None:
    words = Words(text="ab")
    latest = Latest(tmp_path / "pipeline", Graph.above(Twice(words=words)), store)
    latest.begin("a: 1\n")
    assert (latest.folder / "options.yaml").read_text() == "a: 1\n"
    assert [stage["name"] for stage in json.loads((latest.folder / "graph.json").read_text())] == ["words", "twice"]
    assert _names(latest) == []
    store.build(words)
    (latest.folder / "latest" / ".words").symlink_to("left by a run that was killed")
    latest.link()
    assert _names(latest) == ["words"]
    assert (latest.folder / "latest" / "words" / "words.txt").read_text() == "ab"
    Latest(latest.folder, Graph.above(Words(text="other")), store).begin("")
    assert _names(latest) == []


def test_a_link_moves_to_the_newer_stage_of_its_name(tmp_path: Path, store: Store) -> None:
    for text in ("old", "new"):
        stage = Words(text=text)
        store.build(stage)
        latest = Latest(tmp_path / "pipeline", Graph.above(stage), store)
        latest.begin("")
        assert (latest.folder / "latest" / "words" / "words.txt").read_text() == text


def test_two_runs_do_not_clear_away_each_others_links(tmp_path: Path, store: Store) -> None:
    stage = Twice(words=Words())
    store.build(stage)
    errors: list[Exception] = []

    def link() -> None:
        try:
            for _ in range(100):
                Latest(tmp_path / "pipeline", Graph.above(stage), store).begin("a: 1\n")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=link) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert _names(Latest(tmp_path / "pipeline", Graph.above(stage), store)) == ["twice", "words"]
