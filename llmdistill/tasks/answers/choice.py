"""An answer out of a fixed set: by its text, by its letter, in brackets, or named once in a sentence."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from functools import cached_property

from llmdistill.tasks.answers.answer import MAX_ANSWER_CHARACTERS

_SEPARATORS = re.compile(r"[\s_\-]+")
_WRAPPING = " \t\r\n\"'`*()[]{}.,:;!"
# "b", "(b)", "b) bank", "B. bank", "option (b): bank"; never the "a" of "a bank".
_LETTER = re.compile(r"(?:(?:option|choice|answer) )?(?:\(([a-z])(?:\)|$)|([a-z])(?:[).:]|$)).*", re.DOTALL)
_BRACKETED_LETTER = re.compile(r"\(([a-z])\)")
_NEGATION = re.compile(r"(?:\b(?:not|no|never|nor|neither|than|instead of)|n't)(?: an?| the)? ?$")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of `choices`; the canonical form is the choice as written there.

    lettered: the prompt shows the choices with letters, so that "(b)" is the second of them. Choices that are themselves single letters ("a", "b", "c": the
    options stand in the row) are read from "(b)" and "b) bank" alike, and never from the article "a".
    """

    choices: tuple[str, ...]
    lettered: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.choices, str) or len(self.choices) < 2:
            raise ValueError(f"Choice.choices is {self.choices!r}: give a tuple of at least two labels")
        for choice in self.choices:
            if not _normalise(choice):
                raise ValueError(f"Choice.choices has the label {choice!r}, which has no letter or digit: give every label a name")
        if len(self._by_text) < len(self.choices):
            raise ValueError(f"Choice.choices is {self.choices!r}: two labels differ only in case, spaces or punctuation; rename one")

    def parse(self, text: str) -> str | None:
        text = _SEPARATORS.sub(" ", text[:MAX_ANSWER_CHARACTERS]).strip().casefold()
        exact = self._by_text.get(_normalise(text))
        if exact is not None:
            return exact
        named = self._named(text)
        lettered = self._lettered(text)
        if lettered is None or not named:
            return lettered or (named.pop() if len(named) == 1 else None)
        return lettered if named == {lettered} else None

    def same(self, a: str, b: str) -> bool:
        parsed = self.parse(a)
        return parsed is not None and parsed == self.parse(b)

    def describe(self) -> str:
        return "one of " + ", ".join(self.choices)

    @cached_property
    def _by_text(self) -> dict[str, str]:
        return {_normalise(choice): choice for choice in self.choices}

    @cached_property
    def _by_letter(self) -> dict[str, str]:
        letters = {text: choice for text, choice in self._by_text.items() if text in string.ascii_lowercase}
        if letters or not self.lettered:
            return letters
        return dict(zip(string.ascii_lowercase, self.choices, strict=False))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # The longest first: "not entailment" is not "entailment".
        texts = sorted((text for text in self._by_text if len(text) > 1), key=len, reverse=True)
        return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, texts)) + r")(?!\w)" if texts else r"(?!)")

    def _named(self, text: str) -> set[str]:
        """The choices that a text names and does not deny."""
        return {self._by_text[match[0]] for match in self._pattern.finditer(text) if not _NEGATION.search(text[max(0, match.start() - 20) : match.start()])}

    def _lettered(self, text: str) -> str | None:
        """The choice that the one letter stands for which begins the text or stands in brackets."""
        letters = {self._by_letter[letter] for letter in _BRACKETED_LETTER.findall(text) if letter in self._by_letter}
        match = _LETTER.fullmatch(text.lstrip(" \"'`*["))
        if match and (match[1] or match[2]) in self._by_letter:
            letters.add(self._by_letter[match[1] or match[2]])
        return letters.pop() if len(letters) == 1 else None


def _normalise(text: str) -> str:
    return _SEPARATORS.sub(" ", text).casefold().strip(_WRAPPING)
