"""How a task reads answers: a text becomes a canonical answer or nothing, and two answers are the same or not.

One reader serves the teacher (the text after the prompt's answer marker), the student (whose whole output is the answer), the gold labels of the user's file
and the votes of self-consistency, so that none of them is judged by another rule. A reader would rather refuse than guess: a wrong label is taught, a refused
row is only counted.
"""

from __future__ import annotations

from typing import Protocol

MAX_ANSWER_CHARACTERS = 2_000  # what lies beyond is not an answer; bounds the work of every reader


class Answer(Protocol):
    """A kind of answer. Implementations are frozen dataclasses, so that they are part of a stage's key."""

    def parse(self, text: str) -> str | None:
        """The canonical form of the answer in a text, or None; never raises. A canonical form is its own canonical form."""
        ...

    def same(self, a: str, b: str) -> bool:
        """Whether both texts are answers of this kind and mean the same."""
        ...

    def describe(self) -> str:
        """What an answer looks like, for error messages: "one of yes, no"."""
        ...
