"""A pipeline's options: from words, from a file, and back into one."""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmdistill.core import options
from llmdistill.core.artifacts import Artifact
from llmdistill.core.options import UsageError
from llmdistill.core.stage import Stage


class Order(enum.Enum):
    FIRST = "1st"
    LAST = "last"


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Has one field."""

    kind: ClassVar[str] = "plain"
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Other:
    """Is the other kind."""

    kind: ClassVar[str] = "other"
    number: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Options of one subject."""

    rate: float = 0.5
    is_fast: bool = False
    inner: Plain | Other = Plain()


def pipeline(
    kind: Plain | Other = Plain(),
    number: int = 1,
    rate: float = 1.0,
    text: str = "a",
    path: Path = Path("a"),
    is_fast: bool = True,
    order: Order = Order.FIRST,
    form: Literal["one", "two"] = "one",
    limit: int | None = None,
    words: tuple[str, ...] = ("a",),
    shape: tuple[int, float] = (1, 2.0),
    group: Group = Group(),
) -> Stage[Artifact]:
    """Has every type of option."""
    raise NotImplementedError


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00\x85\u2028\u2029"))  # PyYAML loses blanks beside the last three
KIND = st.builds(Plain, text=TEXT) | st.builds(Other, number=st.integers())
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "kind": KIND,
        "number": st.integers(),
        "rate": st.floats(allow_nan=False),
        "text": TEXT,
        "path": TEXT.filter(bool).map(Path),
        "is_fast": st.booleans(),
        "order": st.sampled_from(Order),
        "form": st.sampled_from(["one", "two"]),
        "limit": st.none() | st.integers(),
        "words": st.lists(TEXT.filter(lambda text: not text.startswith("-"))).map(tuple),
        "shape": st.tuples(st.integers(), st.floats(allow_nan=False)),
        "group": st.builds(Group, rate=st.floats(allow_nan=False), is_fast=st.booleans(), inner=KIND),
    },
)


def _read(words: Sequence[str]) -> dict[str, Any]:
    return options.read(pipeline, options.with_config(pipeline, words), "program")[1]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options") / "options.yaml"


def test_without_words_all_is_as_the_pipeline_says() -> None:
    assert _read([]) == {name: parameter.default for name, parameter in options.inspect.signature(pipeline).parameters.items()}


@example({"text": "--number", "path": Path("--until"), "number": -1, "rate": -math.inf, "shape": (-1, -math.inf)})
@example({"text": "", "words": (), "limit": None, "path": Path("a b")})
@example({"text": "null", "words": ("true", "1.0", "~", "a: b", "x\ny")})
@settings(max_examples=25)
@given(OPTIONS)
def test_what_is_kept_reads_as_the_same(file: Path, values: dict[str, Any]) -> None:
    whole = _read([]) | values
    file.write_text(yaml.safe_dump(options.resolved(pipeline, whole), allow_unicode=True), encoding="utf-8")
    assert _read(["--config", str(file)]) == whole


def test_as_people_write_it(file: Path) -> None:
    file.write_text("rate: 1e-3\nis-fast: no\nkind: other:3\nwords: [a, b]\ngroup:\n  rate: 2\n  is_fast: true\n")
    found = _read(["--number", "7", "--config", str(file), "--words", "c"])
    assert found["rate"] == 0.001
    assert found["is_fast"] is False
    assert found["kind"] == Other(number=3)
    assert found["words"] == ("c",)  # what is typed wins
    assert found["number"] == 7
    assert found["group"] == Group(rate=2.0, is_fast=True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("numbr: 1", "sets 'numbr', which is no option"),
        ("- 1", "holds a list; it must map"),
        ("a: [", "is not YAML"),
        ("dry_run: true", "sets 'dry_run', which is no option"),
    ],
)
def test_a_file_that_cannot_be_followed_is_refused(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        _read(["--config", str(file)])


def test_what_no_word_can_say_is_read_where_it_is_the_default(file: Path) -> None:
    def pipeline(stop: tuple[str, ...] = ("--",)) -> Stage[Artifact]:
        raise NotImplementedError

    file.write_text(yaml.safe_dump(options.resolved(pipeline, {"stop": ("--",)})))
    assert options.with_config(pipeline, ["--config", str(file)]) == []
    file.write_text("stop: [a, -b]")
    with pytest.raises(UsageError, match="begins with - cannot be read"):
        options.with_config(pipeline, ["--config", str(file)])


def test_flags_for_the_launcher_stay_together() -> None:
    how, _ = options.read(pipeline, options.with_config(pipeline, ["--accelerate-args", "--num_processes 2 --cpu", "--until", "x"]), "program")
    assert (how.accelerate_args, how.until, how.dry_run) == ("--num_processes 2 --cpu", "x", False)


def test_an_option_that_a_run_has_itself_is_refused() -> None:
    def pipeline(until: int = 1) -> Stage[Artifact]:
        raise NotImplementedError

    with pytest.raises(ValueError, match="has an option 'until', which `llmdistill run` has too"):
        options.read(pipeline, [], "program")
