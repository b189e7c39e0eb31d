"""Laws of keys: equal fields, equal keys, in every process; a change reaches what lies below it, and nothing else."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from fakes import Join, Twice, Words
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.core.artifacts import Artifact
from llmdistill.core.graph import Graph
from llmdistill.core.stage import Stage, upstream


@dataclass(frozen=True, kw_only=True)
class FromFile(Stage[Artifact]):
    artifact = Artifact
    prompt: Path


@dataclass(frozen=True, kw_only=True)
class Call(Stage[Artifact]):
    artifact = Artifact
    function: Callable[[], int]


def _join() -> Join:
    one, other = Words(text="one"), Words(name="other", text="other")
    return Join(parts=(Twice(words=one), other), named={"again": Twice(name="again", words=other)})


@given(st.text(), st.floats(allow_nan=False), st.integers(), st.integers())
def test_equal_fields_give_equal_keys_and_speed_does_not_count(text: str, weight: float, batch_size: int, other_size: int) -> None:
    assert Words(text=text, weight=weight, batch_size=batch_size).key == Words(text=text, weight=weight, batch_size=other_size, name="b").key


@given(st.text(), st.text(), st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_keys_differ_where_fields_do(text: str, other_text: str, weight: float, other_weight: float) -> None:
    is_same = (text, weight) == (other_text, other_weight)
    assert (Words(text=text, weight=weight).key == Words(text=other_text, weight=other_weight).key) == is_same


def test_a_change_reaches_what_is_below_and_nothing_else() -> None:
    before = _join()
    changed = replace(before, parts=(Twice(words=Words(text="changed")), before.parts[1]))
    keys = {stage.key for stage in Graph.above(before).stages}
    keys_after = {stage.key for stage in Graph.above(changed).stages}
    assert len(keys) == 5
    assert keys - keys_after == {before.key, before.parts[0].key, upstream(before.parts[0])[0].key}
    assert keys & keys_after == {before.parts[1].key, before.named["again"].key}


def test_the_text_of_a_prompt_counts(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.jinja"
    prompt.write_text("Question: {{ question }}")
    before = FromFile(prompt=prompt).key
    assert FromFile(prompt=prompt).key == before
    prompt.write_text("Question: {{ question }}\n")
    assert FromFile(prompt=prompt).key != before


def test_the_version_counts() -> None:
    class Newer(Words):
        version: ClassVar[int] = 2

    Newer.__qualname__ = Words.__qualname__
    Newer.__module__ = Words.__module__
    Newer.__name__ = "Words"
    assert Newer().key != Words().key


def test_a_value_without_identity_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Call\.function"):
        _ = Call(function=lambda: 1).key


def test_a_name_that_a_class_chooses_does_not_count_either() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Named(Stage[Artifact]):
        artifact = Artifact
        name: str = "chosen"

    assert Named().name == "chosen"
    assert Named(name="other").key == Named().key


def test_names() -> None:
    assert Words().name == "words"
    assert Words(name="other").name == "other"
    assert Words().key.startswith("words-")


def test_upstream_is_found_at_any_depth() -> None:
    stage = _join()
    assert [above.name for above in upstream(stage)] == ["twice", "other", "again"]


def test_keys_are_equal_in_every_process(tmp_path: Path) -> None:
    script = "from test_stage import _join; print(_join().key)"
    keys = {_join().key}
    for seed, folder in (("0", tmp_path), ("1", Path.cwd())):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[2]}"}
        keys.add(subprocess.run([sys.executable, "-c", script], env=environment, cwd=folder, capture_output=True, text=True, check=True).stdout.strip())
    assert len(keys) == 1


def test_two_stages_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two different stages are called 'words'"):
        Graph.above(Join(parts=(Words(text="a"), Words(text="b")), named={}))
    with pytest.raises(ValueError, match="use letters"):
        Graph.above(Words(name="a/b"))


def test_a_stage_that_two_others_share_appears_once() -> None:
    words = Words()
    graph = Graph.above(Join(parts=(Twice(words=words), words), named={}))
    assert [stage.name for stage in graph.stages] == ["words", "twice", "join"]
