"""An arithmetic equation, as in SVAMP (Patel et al. 2021): "( 84.0 / 2.0 )" and "84 / 2" are the same answer, compared by value."""

from __future__ import annotations

from dataclasses import dataclass

from llmdistill.tasks.answers.arithmetic import MAX_EXPRESSION_CHARACTERS, Expression, close, read_expression


@dataclass(frozen=True, kw_only=True)
class Equation:
    """The canonical form is the expression with the fewest brackets: "( ( 17.0 + 15.0 ) + 2.0 )" is "17 + 15 + 2".

    Of "10 * 45 = 450" or "x = 10 * 45" the side with an operator is the answer.
    """

    relative_tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.relative_tolerance < 1:
            raise ValueError(f"Equation.relative_tolerance is {self.relative_tolerance}: give a share from 0 to below 1, such as 1e-6")

    def parse(self, text: str) -> str | None:
        expression = _read(text)
        return None if expression is None else expression.text

    def same(self, a: str, b: str) -> bool:
        first, second = _read(a), _read(b)
        return first is not None and second is not None and close(first.value, second.value, self.relative_tolerance)

    def describe(self) -> str:
        return "an arithmetic expression of numbers, + - * / and brackets, such as (84 - 12) / 2"


def _read(text: str) -> Expression | None:
    lines = text[:MAX_EXPRESSION_CHARACTERS].strip().splitlines()
    if not lines:
        return None
    sides = [expression for side in lines[0].split("=") if (expression := read_expression(side))]
    return next((side for side in sides if side.has_operator), sides[0] if sides else None)
