"""A number in words: "$1,234.50 in all", "12%", "3/4", "-7 degrees", "2.5 million"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from llmdistill.tasks.answers.answer import MAX_ANSWER_CHARACTERS
from llmdistill.tasks.answers.arithmetic import NotArithmetic, bounded, close, decimal_text

_CLEAN = str.maketrans({"−": "-", "–": "-", "\u00a0": " ", "\u202f": " ", "$": "", "€": "", "£": "", "¥": "", "*": " ", "`": " ", "⁄": "/"})
_SENTENCE_END = re.compile(r"[.!?;](?:\s|$)|\n")
_DECIMAL = r"[0-9][0-9,]*(?:\.[0-9,]*)*|\.[0-9]+"
# Not inside a word or a longer number ("m2", "B12"); a minus counts where no digit or letter stands before it.
_NUMBER = re.compile(
    rf"(?<![\w.,])(?P<sign>(?<![0-9)])-)?(?:(?P<whole>[0-9]+)[ ])?(?P<top>[0-9]+) ?/ ?(?P<bottom>[0-9]+)(?![\w/]|[.,][0-9])"
    rf"|(?<![\w.,])(?P<minus>-)?(?P<decimal>{_DECIMAL})(?P<power>[eE][-+]?[0-9]+)?(?P<scale> ?(?:thousand|million|billion|trillion)\b)?(?P<glued>[kKMB]\b)?"
)
_WELL_FORMED = re.compile(r"[0-9]+(?:\.[0-9]+)?|[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|\.[0-9]+")
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MAX_CHARACTERS = 30


@dataclass(frozen=True, kw_only=True)
class Number:
    """The canonical form is a plain decimal ("1234.5"), or a fraction in lowest terms where no decimal is exact ("1/3").

    Units, currency and percent signs are dropped: "12%" is 12. Of "3 * 4 = 12" the last side counts; a text with several different numbers is refused, as are
    "3,5" and "5k", which different people read differently.
    """

    relative_tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.relative_tolerance < 1:
            raise ValueError(f"Number.relative_tolerance is {self.relative_tolerance}: give a share from 0 to below 1, such as 1e-6")

    def parse(self, text: str) -> str | None:
        value = _read(text)
        return None if value is None else decimal_text(value)

    def same(self, a: str, b: str) -> bool:
        first, second = _read(a), _read(b)
        return first is not None and second is not None and close(first, second, self.relative_tolerance)

    def describe(self) -> str:
        return "one number, such as 42, 1,234.50 or 3/4"


def _read(text: str) -> Fraction | None:
    text = text[:MAX_ANSWER_CHARACTERS].translate(_CLEAN).strip()
    if text.startswith("(") and ")" in text:
        text = text[1 : text.index(")")]
    text = _SENTENCE_END.split(text, maxsplit=1)[0].rsplit("=", 1)[-1].strip(" \t\r()[]{}\"',")
    text = re.sub(r"^- +(?=[0-9.])", "-", text)
    try:
        values = set(_values(text))
    except NotArithmetic:
        return None
    return values.pop() if len(values) == 1 else None


def _values(text: str) -> Iterator[Fraction]:
    for match in _NUMBER.finditer(text):
        if len(match[0]) > _MAX_CHARACTERS:
            raise NotArithmetic
        if match["bottom"]:
            if int(match["bottom"]) == 0:
                raise NotArithmetic
            value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
            yield bounded(-value if match["sign"] else value)
            continue
        digits = match["decimal"].rstrip(".,")
        if not _WELL_FORMED.fullmatch(digits) or match["glued"] or len(match["power"] or "") > 4:
            raise NotArithmetic
        value = Fraction(digits.replace(",", "") + (match["power"] or "")) * _SCALES.get((match["scale"] or "").strip(), 1)
        yield bounded(-value if match["minus"] else value)
