"""Rows that say the same: twice in a split, in training and in test, or with two answers.

A test row that was trained on measures memory, and users' files are full of them. Texts are compared as sets of words: two rows are near when the words that
they share are at least `threshold` of all their words (Jaccard). Prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007, section 3) finds every such
pair without comparing all: sets that near share one of their rarest words.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from llmdistill.tasks.task import Row, Task

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two rows that say the same; similarity 1.0 is the same words."""

    first: Row
    second: Row
    similarity: float

    @property
    def crosses_splits(self) -> bool:
        return self.first.split != self.second.split

    @property
    def contradicts(self) -> bool:
        return self.first.gold is not None and self.second.gold is not None and self.first.gold != self.second.gold


@dataclass(frozen=True, kw_only=True)
class DuplicatesReport:
    """Every pair that was found, in the order of the rows."""

    pairs: tuple[Pair, ...]
    threshold: float

    def data(self) -> dict[str, int]:
        return {
            "num_duplicate_pairs": sum(pair.similarity == 1.0 for pair in self.pairs),
            "num_near_duplicate_pairs": sum(pair.similarity < 1.0 for pair in self.pairs),
            "num_pairs_across_splits": sum(pair.crosses_splits for pair in self.pairs),
            "num_test_rows_seen_elsewhere": len(
                {row.id for pair in self.pairs if pair.crosses_splits for row in (pair.first, pair.second) if row.split == "test"}
            ),
            "num_pairs_with_different_answers": sum(pair.contradicts for pair in self.pairs),
        }

    def lines(self, limit: int = 10) -> list[str]:
        """For people: the first pairs, those across splits before others, and what to do."""
        if not self.pairs:
            return ["no duplicate rows"]
        lines = [", ".join(f"{name.removeprefix('num_').replace('_', ' ')}: {count}" for name, count in self.data().items())]
        for pair in sorted(self.pairs, key=lambda pair: (not pair.crosses_splits, -pair.similarity))[:limit]:
            note = "; the known answers differ" if pair.contradicts else ""
            lines.append(f"{pair.first.id} ({pair.first.split}) and {pair.second.id} ({pair.second.split}) share {pair.similarity:.0%} of their words{note}")
        if len(self.pairs) > limit:
            lines.append(f"and {len(self.pairs) - limit} more")
        if any(pair.crosses_splits for pair in self.pairs):
            lines.append("rows in two splits make test figures too good: remove one row of each such pair, or give both one split in a split column")
        return lines


def find_duplicates(task: Task, rows: list[Row], *, threshold: float = 0.85) -> DuplicatesReport:
    """Compare the texts that the student reads; `threshold` is the share of common words from which two rows are near."""
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold of similarity is {threshold}: give a share above 0 and up to 1")
    words = [frozenset(_WORD.findall(task.text(row).casefold())) or frozenset({task.text(row)}) for row in rows]
    pairs = [Pair(first=rows[i], second=rows[j], similarity=similarity) for i, j, similarity in sorted(_near(words, threshold))]
    return DuplicatesReport(pairs=tuple(pairs), threshold=threshold)


def _near(sets: list[frozenset[str]], threshold: float) -> Iterator[tuple[int, int, float]]:
    frequency = Counter(word for words in sets for word in words)
    holders: dict[str, list[int]] = defaultdict(list)
    for index, words in enumerate(sets):
        rarest_first = sorted(words, key=lambda word: (frequency[word], word))
        # Two sets with Jaccard >= t share at least ceil(t * size) words, so one of the first size - ceil(t * size) + 1 is among them.
        prefix = rarest_first[: len(words) - math.ceil(threshold * len(words) - 1e-9) + 1]
        candidates = {other for word in prefix for other in holders[word]}
        for other in candidates:
            common = len(words & sets[other])
            similarity = common / (len(words) + len(sets[other]) - common)
            if similarity >= threshold:
                yield other, index, similarity
        for word in prefix:
            holders[word].append(index)
