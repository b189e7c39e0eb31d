from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.tasks.answers import Number

NUMBER = Number()


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("42", "42"),
        ("(42)", "42"),
        ("(42", "42"),
        ("42.", "42"),
        ("51.0", "51"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("-7", "-7"),
        ("−7 degrees", "-7"),
        ("- 7", "-7"),
        ("-0", "0"),
        ("1,234", "1234"),
        ("1,234,567.50", "1234567.5"),
        ("$1,234.50", "1234.5"),
        ("-$5", "-5"),
        ("€ 20", "20"),
        ("USD 5", "5"),
        ("18.50 dollars.", "18.5"),
        ("12%", "12"),
        ("12 percent", "12"),
        ("5kg", "5"),
        ("30 km/h", "30"),
        ("20 m2", "20"),
        ("the 3rd", "3"),
        ("**42**", "42"),
        ("3/4", "0.75"),
        ("1/3", "1/3"),
        ("2 / 6", "1/3"),
        ("1 1/2 cups", "1.5"),
        ("-1/2", "-0.5"),
        ("2.5 million", "2500000"),
        ("1.5e3", "1500"),
        ("3 * 4 = 12", "12"),
        ("x = 12 apples", "12"),
        ("12. There are 3 more.", "12"),
        ("(12) because 3 * 4", "12"),
        ("12, that is 12 eggs", "12"),
    ],
)
def test_numbers_as_people_write_them(text: str, canonical: str | None) -> None:
    assert NUMBER.parse(text) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        "3,5",
        "1,23",
        "1.234.567",
        "12\u00a0000",
        "5-8",
        "5 or 6",
        "3 + 4",
        "10/12/2020",
        "5:30",
        "B12",
        "5k",
        "1/0",
        "9" * 40,
        "1e99",
        "1e5000",
        "٣",
        "3, 5",
    ],
)
def test_what_people_read_in_two_ways_is_refused(text: str) -> None:
    assert NUMBER.parse(text) is None


def test_sameness_is_exact_between_whole_numbers_and_tolerant_of_rounding() -> None:
    assert NUMBER.same("1,000", "1000.00")
    assert NUMBER.same("0.3333333", "1/3")
    assert not NUMBER.same("0.333", "1/3")
    assert not NUMBER.same("10000000", "10000001")
    assert not NUMBER.same("none", "none")


@settings(deadline=None)
@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=1000))
def test_a_canonical_form_is_its_own_and_keeps_the_value(value: Fraction) -> None:
    canonical = NUMBER.parse(f"{value.numerator}/{value.denominator}")
    assert canonical is not None
    assert Fraction(canonical) == value
    assert NUMBER.parse(canonical) == canonical


@settings(deadline=None)
@given(st.text(max_size=200) | st.text(alphabet="0123456789.,-+/*=$%() eEkmx\n", max_size=60))
def test_reading_never_raises(text: str) -> None:
    parsed = NUMBER.parse(text)
    assert parsed is None or NUMBER.parse(parsed) == parsed


@pytest.mark.parametrize("tolerance", [-1e-6, 1.0])
def test_a_tolerance_is_a_share(tolerance: float) -> None:
    with pytest.raises(ValueError, match="relative_tolerance"):
        Number(relative_tolerance=tolerance)
