"""A completion becomes a rationale and a label, or a reason why not.

A completion reads `RATIONALE The answer is (LABEL).` and may run on into an invented next question; it is cut there first. Nothing here raises, whatever
the text: what cannot be read is refused with a reason, and since the raw completion stays in the cache, a better parser asks the teacher nothing again.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Answer(Protocol):
    """How a task reads and compares answers (a task's `answer` is one)."""

    def parse(self, text: str) -> str | None: ...

    def same(self, a: str, b: str) -> bool: ...


class Refusal(enum.Enum):
    """Why a row is not taught; the value is what people read in reports."""

    EMPTY = "empty completion"
    CUT_SHORT = "cut short before the answer was complete"
    RAN_ON = "ran on into another question before answering"
    NO_MARKER = "no answer marker"
    UNPARSABLE = "answer not understood"
    EMPTY_RATIONALE = "empty rationale"
    TOO_LONG = "rationale too long"
    TOO_SHORT = "rationale too short"
    CONTRADICTORY = "contradictory votes"
    LOW_AGREEMENT = "too few votes agree"
    WRONG = "wrong against the known label"


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What a completion said; the label is in the task's canonical form. The rationale may be empty: the label is an answer and a vote all the same."""

    rationale: str
    label: str


_MAX_ANSWER_CHARACTERS = 2_000  # no answer is longer; keeps every parser's work bounded
_SPACES = re.compile(r"\s+")


def parse_completion(
    completion: str, answer: Answer, *, answer_marker: str = "The answer is", run_on: Sequence[str] = ("Q:",), finish_reason: str = "stop"
) -> Parsed | Refusal:
    """Read a completion.

    run_on: strings that begin an invented next question. finish_reason: "length" where the teacher was cut, so that an open bracket is half an answer;
    after "stop" it is an answer whose closing bracket was part of the stop string.
    """
    if not completion.strip():
        return Refusal.EMPTY
    kept = cut_run_on(completion, run_on)
    marker_at = _marker_position(kept, answer_marker)
    if marker_at < 0:
        if len(kept) < len(completion) and _marker_position(completion, answer_marker) >= 0:
            return Refusal.RAN_ON
        return Refusal.CUT_SHORT if finish_reason == "length" else Refusal.NO_MARKER
    rationale = _SPACES.sub(" ", kept[:marker_at]).strip()
    answer_lines = kept[marker_at + len(answer_marker) :].partition(answer_marker)[0].lstrip(" \t\r\n:").splitlines()
    answer_text, num_open = unwrap(answer_lines[0][:_MAX_ANSWER_CHARACTERS] if answer_lines else "")
    is_cut = finish_reason == "length" and len(kept) == len(completion) and len(answer_lines) <= 1 and not kept.rstrip().endswith((")", "."))
    if is_cut or num_open > 1 or (num_open == 1 and finish_reason == "length"):
        return Refusal.CUT_SHORT
    label = answer.parse(answer_text) if answer_text else None
    if label is None or not label.strip():
        return Refusal.UNPARSABLE
    return Parsed(rationale=rationale, label=label)


def cut_run_on(completion: str, run_on: Sequence[str]) -> str:
    """The completion before the first of these strings that begins a line or follows a sentence."""
    end = len(completion)
    for string in run_on:
        for match in re.finditer(rf"(?:^|(?<=\s)){re.escape(string)}", completion[:end]):
            if completion[: match.start()].strip():
                end = match.start()
                break
    return completion[:end]


def unwrap(text: str) -> tuple[str, int]:
    """The text of an answer without its final full stop and the brackets around all of it, and how many brackets are left open.

    `(84 / 2).` is `84 / 2`; `(84 / 2` too (1 open: the rest was a stop string); `(3 * 8) + 9.` keeps its brackets, which do not close at the end. A sentence
    after the answer, as chat models add it, is dropped.
    """
    text = text.strip()
    text = text.rstrip(". ") or text
    if not text.startswith("("):
        return text, max(0, text.count("(") - text.count(")"))
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            if position == len(text) - 1 or text[position + 1 : position + 3] == ". ":
                return text[1:position].strip(), 0
            return text, max(0, text.count("(") - text.count(")"))
    return text[1:].strip(), depth


def _marker_position(text: str, marker: str) -> int:
    """Where the answer is announced: the first marker with a bracket behind it, else the first marker, else -1."""
    first = position = text.find(marker)
    while position >= 0:
        if text[position + len(marker) :].lstrip(" \t\r\n:").startswith("("):
            return position
        position = text.find(marker, position + 1)
    return first
