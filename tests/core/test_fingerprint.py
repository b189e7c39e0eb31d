"""Laws of the canonical forms: equal values have equal ones, different values have different ones, and what has none says so."""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.core.fingerprint import Json, fingerprint, sha256_of
from llmdistill.core.stage import speed


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Mode(enum.StrEnum):
    A = "a"


@dataclass(frozen=True, kw_only=True)
class Settings:
    rate: float = 0.5
    names: tuple[str, ...] = ()
    workers: int = speed(1)
    derived: str = field(default="x", init=False)


@dataclass(frozen=True)
class Revision:
    """Knows its identity better than its fields do."""

    nickname: str
    digest: str

    def fingerprint(self) -> Json:
        return self.digest


def _form(value: Any) -> str:
    return sha256_of(fingerprint(value))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(Colour),
    lambda inner: st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(VALUES, VALUES)
def test_forms_are_equal_just_where_values_are(one: Any, other: Any) -> None:
    assert (_form(one) == _form(other)) == (_without_booleans(one) == _without_booleans(other))


def _without_booleans(value: Any) -> Any:
    """True equals 1 in Python, but as a setting it is another thing."""
    if isinstance(value, bool):
        return f"boolean {value}"
    if isinstance(value, tuple):
        return tuple(_without_booleans(item) for item in value)
    if isinstance(value, dict):
        return {key: _without_booleans(item) for key, item in value.items()}
    return value


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_order_of_a_mapping_does_not_count(mapping: dict[str, int]) -> None:
    assert _form(mapping) == _form(dict(reversed(mapping.items())))


@pytest.mark.parametrize("value, same", [(1, 1.0), (0.0, -0.0), (1e300, int(1e300)), ((1, 2), [1, 2])])
def test_equal_however_it_was_written(value: Any, same: Any) -> None:
    assert _form(value) == _form(same)


@pytest.mark.parametrize("value, other", [(1, "1"), (True, 1), (None, "None"), (Colour.RED, "RED"), (Mode.A, "a"), (math.inf, -math.inf), ((), {}), ("", None)])
def test_different_kinds_differ(value: Any, other: Any) -> None:
    assert _form(value) != _form(other)


def test_speed_and_derived_fields_do_not_count() -> None:
    assert _form(Settings(workers=1)) == _form(Settings(workers=9))
    assert _form(Settings(rate=0.5)) != _form(Settings(rate=0.25))
    assert "derived" not in str(fingerprint(Settings()))


def test_an_object_that_knows_its_identity_is_asked() -> None:
    assert _form(Revision("main", "abc")) == _form(Revision("v1", "abc")) != _form(Revision("main", "abd"))


def test_a_path_counts_by_its_content(tmp_path: Path) -> None:
    one, other, folder = tmp_path / "one.txt", tmp_path / "other.txt", tmp_path / "folder"
    one.write_text("text")
    other.write_text("text")
    assert _form(one) == _form(other)
    other.write_text("text 2")
    assert _form(one) != _form(other)
    folder.mkdir()
    (folder / "a").write_text("1")
    before = _form(folder)
    (folder / "a").rename(folder / "b")
    assert _form(folder) != before
    (folder / "b").rename(folder / "a")
    assert _form(folder) == before


def test_a_path_to_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"value\[0\] is the path .*missing"):
        fingerprint([tmp_path / "missing"])


@pytest.mark.parametrize("value", [lambda: 1, object(), {1, 2}, b"bytes", Settings, 1j], ids=lambda value: type(value).__name__)
def test_what_has_no_identity_is_refused_by_name(value: Any) -> None:
    @dataclass(frozen=True)
    class Holder:
        inside: dict[str, Any]

    with pytest.raises(TypeError, match=r"value\.inside\['deep'\]\[1\] .* no stable fingerprint"):
        fingerprint(Holder({"deep": (0, value)}))


def test_nan_and_mappings_with_other_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        fingerprint(math.nan)
    with pytest.raises(TypeError, match="has the key 1"):
        fingerprint({1: 2})


def test_the_same_fields_of_another_class_differ() -> None:
    def make() -> Callable[..., Any]:
        @dataclass(frozen=True)
        class Other:
            rate: float = 0.5
            names: tuple[str, ...] = ()

        return Other

    assert _form(make()()) != _form(Settings())
