"""An answer in words of its own, compared without case, punctuation, articles and spacing (as SQuAD's evaluation does, Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmdistill.tasks.answers.answer import MAX_ANSWER_CHARACTERS

_SPACES = re.compile(r"\s+")
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


@dataclass(frozen=True, kw_only=True)
class FreeText:
    """The canonical form is the text in one line, without brackets or quotes around all of it."""

    def parse(self, text: str) -> str | None:
        text = _SPACES.sub(" ", text[:MAX_ANSWER_CHARACTERS]).strip()
        while len(text) > 1 and (text[0], text[-1]) in {("(", ")"), ('"', '"'), ("'", "'")} and not _opens_again(text):
            text = text[1:-1].strip()
        return text if _comparable(text) else None

    def same(self, a: str, b: str) -> bool:
        first, second = self.parse(a), self.parse(b)
        return first is not None and second is not None and _comparable(first) == _comparable(second)

    def describe(self) -> str:
        return "a text with at least one letter or digit"


def _opens_again(text: str) -> bool:
    """Whether the first bracket or quote is closed before the end: `(a) or (b)`."""
    return text[-1] in text[1:-1]


def _comparable(text: str) -> str:
    words = _SPACES.sub(" ", _PUNCTUATION.sub(" ", text.casefold())).strip()
    return _SPACES.sub(" ", _ARTICLES.sub(" ", words)).strip() or words
