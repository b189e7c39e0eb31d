"""A safe evaluator for + - * / brackets and unary minus over decimal numbers.

Generated text is never executed: it is cut into tokens that we know, read by recursive descent, and computed in exact fractions. Length, depth, digits and
magnitude are bounded, so that no text costs more than a few microseconds; there are no powers, names or calls.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPRESSION_CHARACTERS = 300
_MAX_DEPTH = 20
_MAX_DIGITS = 15
_MAX_MAGNITUDE = 10**18

_SIGNS = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "∕": "/", "$": " ", "€": " ", "£": " ", "[": "(", "]": ")"})
_LATEX = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"))
_TIMES = re.compile(r"(?<=[0-9) ])[xX](?=[\s(-]*[0-9.])")
_TOKEN = re.compile(r"\s*([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9,])|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[-+*/()])")
_SENTENCE_END = re.compile(r"\.(?:\s|$)|\n")

_ADD, _MULTIPLY, _NEGATE, _ATOM = 1, 2, 3, 4  # how tightly an expression's outermost operator binds


class NotArithmetic(Exception):
    """The text is not an expression that we compute."""


@dataclass(frozen=True, kw_only=True)
class Expression:
    """An expression that was read: its value, and its text with the fewest brackets."""

    text: str
    value: Fraction
    has_operator: bool


@dataclass(frozen=True)
class _Part:
    text: str
    binding: int
    value: Fraction


def read_expression(text: str) -> Expression | None:
    """The expression that a text begins with, or None.

    Brackets that are left open are closed, since the stop string of a completion may have taken them. Words may follow, numbers may not: "10 apples * 45" is
    refused and not read as 10.
    """
    if len(text) > MAX_EXPRESSION_CHARACTERS:
        text = text[:MAX_EXPRESSION_CHARACTERS]
    for latex, sign in _LATEX:
        text = text.replace(latex, sign)
    text = _TIMES.sub("*", text.translate(_SIGNS))
    tokens: list[str] = []
    position = 0
    while match := _TOKEN.match(text, position):
        tokens.append(match[1])
        position = match.end()
    rest = _SENTENCE_END.split(text[position:], maxsplit=1)[0]
    if not tokens or re.search(r"[0-9]", rest):
        return None
    try:
        part = _Reader(tokens).read()
    except NotArithmetic:
        return None
    return Expression(text=part.text, value=part.value, has_operator=part.binding in (_ADD, _MULTIPLY))


def decimal_text(value: Fraction) -> str:
    """A number as people write it: "42", "0.5", and "1/3" where no decimal is exact."""
    numerator, denominator = value.numerator, value.denominator
    twos = fives = 0
    while denominator % 2 == 0:
        denominator, twos = denominator // 2, twos + 1
    while denominator % 5 == 0:
        denominator, fives = denominator // 5, fives + 1
    places = max(twos, fives)
    if denominator != 1 or places > _MAX_DIGITS:
        return f"{value.numerator}/{value.denominator}"
    if places == 0:
        return str(numerator)
    digits = str(abs(numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if numerator < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def close(a: Fraction, b: Fraction, relative_tolerance: float) -> bool:
    """Equality: exact between whole numbers, within the tolerance where rounding may have been at work."""
    if a == b:
        return True
    if a.denominator == b.denominator == 1:
        return False
    return abs(a - b) <= Fraction(relative_tolerance) * max(abs(a), abs(b))


def bounded(value: Fraction) -> Fraction:
    """The value, if it is of a size that an answer has."""
    if abs(value.numerator) > _MAX_MAGNITUDE or value.denominator > _MAX_MAGNITUDE:
        raise NotArithmetic
    return value


class _Reader:
    """expression = term (("+"|"-") term)*; term = factor (("*"|"/") factor)*; factor = ("+"|"-") factor | number | "(" expression ")"."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._next = 0

    def read(self) -> _Part:
        part = self._expression(0)
        if any(token != ")" for token in self._tokens[self._next :]):
            raise NotArithmetic
        return part

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self._next += 1
        return token

    def _expression(self, depth: int) -> _Part:
        left = self._term(depth)
        while self._peek() in ("+", "-"):
            sign = self._take()
            right = self._term(depth)
            value = left.value + right.value if sign == "+" else left.value - right.value
            right_text = f"({right.text})" if sign == "-" and right.binding == _ADD else right.text
            left = _Part(f"{left.text} {sign} {right_text}", _ADD, bounded(value))
        return left

    def _term(self, depth: int) -> _Part:
        left = self._factor(depth)
        while self._peek() in ("*", "/"):
            sign = self._take()
            right = self._factor(depth)
            if sign == "/" and right.value == 0:
                raise NotArithmetic
            value = left.value * right.value if sign == "*" else left.value / right.value
            left_text = f"({left.text})" if left.binding == _ADD else left.text
            right_text = f"({right.text})" if right.binding == _ADD or (sign == "/" and right.binding == _MULTIPLY) else right.text
            left = _Part(f"{left_text} {sign} {right_text}", _MULTIPLY, bounded(value))
        return left

    def _factor(self, depth: int) -> _Part:
        if depth > _MAX_DEPTH:
            raise NotArithmetic
        token = self._take()
        if token == "+":
            return self._factor(depth + 1)
        if token == "-":
            part = self._factor(depth + 1)
            return _Part(f"-{part.text}" if part.binding == _ATOM else f"-({part.text})", _NEGATE, -part.value)
        if token == "(":
            part = self._expression(depth + 1)
            if self._peek() == ")":
                self._take()
            elif self._peek():
                raise NotArithmetic
            return part
        if not token or token in "*/)":
            raise NotArithmetic
        if sum(character.isdigit() for character in token) > _MAX_DIGITS:
            raise NotArithmetic
        value = Fraction(token.replace(",", ""))
        return _Part(decimal_text(value), _ATOM, bounded(value))
