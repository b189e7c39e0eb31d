"""A kind and its fields as one string, and back."""

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmdistill.core import spec


class Dtype(enum.Enum):
    FLOAT32 = 1
    BFLOAT16 = 2


@dataclass(frozen=True)
class Source:
    spec: str


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Has no fields."""

    kind: ClassVar[str] = "plain"


@dataclass(frozen=True, kw_only=True)
class Rich:
    """Has every type of field."""

    kind: ClassVar[str] = "rich"
    source: Source
    dtype: Dtype = Dtype.FLOAT32
    path: Path = Path("a")
    stop: tuple[str, ...] = ("\n",)
    shape: tuple[int, float] = (1, 2.0)
    is_fast: bool = False
    rate: float = 0.5
    limit: int | None = None
    label: int | str = 0
    form: Literal["one", "two"] = "one"
    inner: "Plain | Rich" = Plain()


KINDS = spec.kinds_of(Plain | Rich)

rich = st.builds(
    Rich,
    source=st.text().map(Source),
    dtype=st.sampled_from(Dtype),
    path=st.text(min_size=1).map(Path),
    stop=st.lists(st.text(min_size=1)).map(tuple),
    shape=st.tuples(st.integers(), st.floats(allow_nan=False)),
    is_fast=st.booleans(),
    rate=st.floats(allow_nan=False),
    limit=st.none() | st.integers(),
    label=st.integers() | st.text().filter(lambda text: not text.strip().lstrip("+-").replace("_", "").isnumeric()),  # a number reads as one
    form=st.sampled_from(["one", "two"]),
)


@example(Rich(source=Source("%41"), label="%2C"), Rich(source=Source("a?b&c:%"), stop=("%41", ",")))
@given(rich, rich)
def test_what_is_written_reads_as_the_same(value: Rich, inner: Rich) -> None:
    assert spec.parse(spec.write(value), KINDS) == value
    nested = Rich(source=value.source, inner=inner)
    assert spec.parse(spec.write(nested), KINDS) == nested


def test_as_people_write_it() -> None:
    assert spec.parse("plain", KINDS) == Plain()
    text = "rich:org/model@main?dtype=bfloat16&is-fast=true&stop=a,b%2Cc&limit=none&shape=3,4"
    value = Rich(source=Source("org/model@main"), dtype=Dtype.BFLOAT16, is_fast=True, stop=("a", "b,c"), shape=(3, 4.0))
    assert spec.parse(text, KINDS) == value
    assert spec.write(Rich(source=Source("x:y"))) == "rich:x:y"


@pytest.mark.parametrize(
    "text, message",
    [
        ("poor:x", "begin with one of plain, rich"),
        ("plain:x", "takes no argument"),
        ("rich", "does not say source; write rich:SOURCE"),
        ("rich:x?y=1", "no field 'y'"),
        ("rich:x?source=z", "gives source twice"),
        ("rich:x?rate=fast", "rich.rate is 'fast'; it needs a number"),
        ("rich:x?limit=1.5", "rich.limit is '1.5'; it needs one of INT, none"),
        ("rich:x?dtype=int8", "use one of FLOAT32, BFLOAT16"),
        ("rich:x?form=three", "use one of one, two"),
        ("rich:x?is_fast=yes", "use one of true, false"),
        ("rich:x?shape=1", "needs 2 values"),
        ("rich:x?inner=poor", "no known kind"),
    ],
)
def test_errors_say_what_to_write(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec.parse(text, KINDS)


def test_only_unions_of_kinds_are_choices() -> None:
    annotations: list[Any] = [int, Source, Plain | None, Plain | Source, str | int, tuple[Plain, ...]]
    assert [spec.kinds_of(annotation) for annotation in annotations] == [()] * len(annotations)
    assert spec.kinds_of(Plain) == (Plain,)
