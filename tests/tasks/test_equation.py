import time
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmdistill.tasks.answers import Equation
from llmdistill.tasks.answers.arithmetic import decimal_text, read_expression

EQUATION = Equation()


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("( 84.0 / 2.0 )", "84 / 2"),
        ("(84 / 2", "84 / 2"),
        ("84/2.", "84 / 2"),
        ("( ( 17.0 + 15.0 ) + 2.0 )", "17 + 15 + 2"),
        ("(102 * 11) - 8.", "102 * 11 - 8"),
        ("100 - (20 - 5)", "100 - (20 - 5)"),
        ("100 - (20 + 5)", "100 - (20 + 5)"),
        ("100 / (20 / 5)", "100 / (20 / 5)"),
        ("2 * (3 + 4)", "2 * (3 + 4)"),
        ("2 * (3 * 4)", "2 * 3 * 4"),
        ("-(3 + 4)", "-(3 + 4)"),
        ("3 - -5", "3 - -5"),
        ("+5", "5"),
        ("42", "42"),
        ("1,000 * 0.5", "1000 * 0.5"),
        ("$5 × 3", "5 * 3"),
        ("3 x 4", "3 * 4"),
        ("[90 − 18] ÷ 6", "(90 - 18) / 6"),
        ("\\(10 \\times 45\\)", None),
        ("10 \\times 45", "10 * 45"),
        ("10 * 45 = 450", "10 * 45"),
        ("450 = 10 * 45", "10 * 45"),
        ("x = 10 * 45", "10 * 45"),
        ("(10 * 45) seeds. There were 450 seeds", "10 * 45"),
        ("(10 * 45).\n\nQ: There are 15 trees", "10 * 45"),
        ("10 apples * 45", None),
        ("(10 *", None),
        ("* 5", None),
        ("", None),
        ("5 / 0", None),
        ("5 / (2 - 2)", None),
        ("2 ** 3", None),
        ("2(3 + 4)", None),
        ("__import__('os').system('true')", None),
        ("9 ** 9 ** 9", None),
        ("1" * 20, None),
        ("999999999999999 * 999999999999999", None),
        ("(" * 100 + "1", None),
        ("-" * 100 + "1", None),
    ],
)
def test_equations_as_teachers_write_them(text: str, canonical: str | None) -> None:
    assert EQUATION.parse(text) == canonical


def test_both_sides_are_compared_by_value() -> None:
    assert EQUATION.same("( 10.0 * 45.0 )", "45 * 10")
    assert EQUATION.same("450", "45 * 10")
    assert EQUATION.same("1 / 3", "0.33333333")
    assert not EQUATION.same("10 - 45", "45 - 10")
    assert not EQUATION.same("3000000 + 1", "3000000")
    assert not EQUATION.same("nonsense", "nonsense")


_NUMBERS = st.integers(0, 999).map(str) | st.decimals(0, 999, places=2, allow_nan=False).map(str)
_EXPRESSIONS = st.recursive(
    _NUMBERS,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({parts[0]} {parts[1]} {parts[2]})") | inner.map("(-{})".format),
    max_leaves=8,
)


def _exact(expression: str) -> Fraction:
    """Python's own arithmetic on a text that this test wrote itself."""
    import re

    return eval(re.sub(r"[0-9]+(?:\.[0-9]+)?", lambda match: f"Fraction('{match[0]}')", expression), {"Fraction": Fraction})


@settings(deadline=None)
@given(_EXPRESSIONS)
def test_values_are_those_of_exact_arithmetic_and_fewer_brackets_keep_them(text: str) -> None:
    try:
        value = _exact(text)
    except ZeroDivisionError:
        assert EQUATION.parse(text) is None
        return
    expression = read_expression(text)
    assume(expression is not None)  # too long or too large
    assert expression is not None
    assert expression.value == value
    assert _exact(expression.text) == value
    assert EQUATION.parse(expression.text) == expression.text


@settings(deadline=None)
@given(st.text(max_size=400) | st.text(alphabet="0123456789.,-+/*=$() xX\\\n", max_size=100))
def test_reading_never_raises(text: str) -> None:
    parsed = EQUATION.parse(text)
    assert parsed is None or EQUATION.parse(parsed) == parsed
    assert EQUATION.same(text, text) == (parsed is not None)


def test_the_longest_and_deepest_texts_cost_little() -> None:
    texts = ["1*" * 100_000, "(" * 100_000, "9" * 100_000, "1/7+" * 75, "-" * 100_000 + "1", "(1+" * 100]
    started = time.perf_counter()
    for text in texts * 10:
        EQUATION.parse(text)
    assert time.perf_counter() - started < 2.0


@settings(deadline=None)
@given(st.fractions(max_denominator=10**6))
def test_decimals_are_exact(value: Fraction) -> None:
    assert Fraction(decimal_text(value)) == value
