"""Do completions stand in the order of their rows? Files that are aligned by position alone cannot say, but their texts can.

A rationale repeats the numbers, names and words of its own question. Each completion is compared with every row by the words that they share, rare words
counting more (log inverse document frequency); it is misplaced when some other row shares more than twice as much with it as its own row does. On the
published PaLM completions for SVAMP none of 1,000 is misplaced, in spite of wrong answers and near-duplicate questions; of those put at another row, 99% are.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")
_COMMON_SHARE = 0.1  # a word in more rows than this tells no rows apart
_MISPLACED_BELOW = 0.5


@dataclass(frozen=True, kw_only=True)
class Misplaced:
    """Completion number `index` fits row number `fits` instead."""

    index: int
    fits: int


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """num_in_place: completions that no row fits better than their own. misplaced: those that another row fits more than twice as well, in order."""

    num_completions: int
    num_in_place: int
    misplaced: tuple[Misplaced, ...]

    @property
    def misplaced_share(self) -> float:
        """Of all completions."""
        return len(self.misplaced) / max(1, self.num_completions)

    @property
    def shift(self) -> int:
        """How many rows later most of the misplaced completions belong; 0 when they agree on nothing."""
        shifts = Counter(place.fits - place.index for place in self.misplaced)
        shift, num = shifts.most_common(1)[0] if shifts else (0, 0)
        return shift if num > 1 and num > len(self.misplaced) / 2 else 0


def align(texts: Sequence[str], completions: Sequence[str]) -> Alignment:
    """Compare each completion (cut where it runs on) with every row's text; there may be more of one than of the other."""
    words_of_row = [_words(text) for text in texts]
    num_rows_with = Counter(word for words in words_of_row for word in words)
    most = max(50, int(len(texts) * _COMMON_SHARE))
    weight = {word: math.log(1 + len(texts) / num) for word, num in num_rows_with.items() if num <= most}
    rows_with: dict[str, list[int]] = defaultdict(list)
    for row, words in enumerate(words_of_row):
        for word in sorted(words):
            if word in weight:
                rows_with[word].append(row)
    num_in_place, misplaced = 0, []
    for index, completion in enumerate(completions):
        shared: dict[int, float] = defaultdict(float)
        for word in sorted(_words(completion)):
            for row in rows_with.get(word, ()):
                shared[row] += weight[word]
        best = max(shared.values(), default=0.0)
        own = shared.get(index, 0.0)
        if best > 0 and own < _MISPLACED_BELOW * best:
            misplaced.append(Misplaced(index=index, fits=min(row for row, score in shared.items() if score == best)))
        elif best > 0 and own >= best * (1 - 1e-9):
            num_in_place += 1
    return Alignment(num_completions=len(completions), num_in_place=num_in_place, misplaced=tuple(misplaced))


def _words(text: str) -> set[str]:
    """Numbers by value ("7" and "7.0" are one) and words without case and plural s."""
    found = set()
    for word in _WORD.findall(text):
        found.add(f"{float(word):g}" if word[0].isdecimal() and len(word) < 300 else word.lower().rstrip("s"))
    return found
