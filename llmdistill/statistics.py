"""The few statistics that evaluation needs: an interval for an accuracy, a test for two students on the same rows, a confusion matrix.

Plain Python in float64 (exact integers where counts allow), so that a report can be read and made without numpy or scipy; the tests compare
every function with scipy.

Sources: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927 (score interval without continuity correction);
Q. McNemar, "Note on the sampling error of the difference between correlated proportions", 1947, with Edwards' continuity correction (1948).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


def wilson_interval(num_correct: int, num_rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion: unlike mean +- 1.96 sd it stays inside [0, 1] and is sound near both ends."""
    if num_rows <= 0 or not 0 <= num_correct <= num_rows:
        raise ValueError(f"wilson_interval needs 0 <= num_correct <= num_rows and num_rows > 0, got num_correct={num_correct}, num_rows={num_rows}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}; 0.95 is usual")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = num_correct / num_rows
    scale = 1 + z * z / num_rows
    centre = (share + z * z / (2 * num_rows)) / scale
    half = z * math.sqrt(share * (1 - share) / num_rows + z * z / (4 * num_rows * num_rows)) / scale
    low = 0.0 if num_correct == 0 else max(0.0, centre - half)
    high = 1.0 if num_correct == num_rows else min(1.0, centre + half)
    return low, high


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Two classifiers on the same rows: how often only one of them is right, and how likely so uneven a split is by chance."""

    num_rows: int
    num_both_correct: int
    num_only_first_correct: int
    num_only_second_correct: int
    num_neither_correct: int
    p_exact: float  # two-sided binomial test on the rows where they differ: right at every sample size
    chi_square: float  # with continuity correction, one degree of freedom
    p_chi_square: float


def mcnemar(first_correct: Sequence[bool], second_correct: Sequence[bool]) -> McNemar:
    """McNemar's test; position i of both sequences must be the same row."""
    if len(first_correct) != len(second_correct):
        raise ValueError(f"McNemar's test needs the same rows on both sides, got {len(first_correct)} and {len(second_correct)} rows")
    counts = [0, 0, 0, 0]
    for first, second in zip(first_correct, second_correct, strict=True):
        counts[2 * bool(first) + bool(second)] += 1
    neither, only_second, only_first, both = counts
    num_different = only_first + only_second
    chi_square = max(abs(only_first - only_second) - 1, 0) ** 2 / num_different if num_different else 0.0
    return McNemar(
        num_rows=len(first_correct),
        num_both_correct=both,
        num_only_first_correct=only_first,
        num_only_second_correct=only_second,
        num_neither_correct=neither,
        p_exact=_two_sided_sign_test(only_first, only_second),
        chi_square=chi_square,
        p_chi_square=math.erfc(math.sqrt(chi_square / 2)),
    )


def _two_sided_sign_test(num_first: int, num_second: int) -> float:
    """P(a fair coin splits at least as unevenly), summed in integers: no rounding before the one division."""
    num_different = num_first + num_second
    term, tail = 1, 0
    for k in range(min(num_first, num_second) + 1):
        tail += term
        term = term * (num_different - k) // (k + 1)
    return min(1.0, 2 * tail / 2**num_different)


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Counts of (gold class, predicted class); the last column, `unreadable`, holds answers that are none of the classes."""

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]  # one row a gold class, len(classes) + 1 columns

    def per_class(self) -> list[dict[str, str | int | float | None]]:
        """Precision, recall and F1 of each class; None where nothing was predicted or nothing is there to find."""
        figures: list[dict[str, str | int | float | None]] = []
        for index, name in enumerate(self.classes):
            hits = self.counts[index][index]
            num_gold = sum(self.counts[index])
            num_predicted = sum(row[index] for row in self.counts)
            figures.append(
                {
                    "class": name,
                    "num_gold": num_gold,
                    "num_predicted": num_predicted,
                    "precision": hits / num_predicted if num_predicted else None,
                    "recall": hits / num_gold if num_gold else None,
                    "f1": 2 * hits / (num_gold + num_predicted) if num_gold + num_predicted else None,
                }
            )
        return figures

    def macro_f1(self) -> float | None:
        """The mean F1 over classes that occur among the gold labels or the predictions."""
        values = [figure["f1"] for figure in self.per_class() if isinstance(figure["f1"], float)]
        return math.fsum(values) / len(values) if values else None


def confusion(classes: Sequence[str], gold: Sequence[str], predicted: Sequence[str | None]) -> Confusion:
    """Count (gold, predicted) pairs; a prediction of None, or of something that is no class, goes to the last column."""
    if len(gold) != len(predicted):
        raise ValueError(f"confusion needs one prediction for each gold label, got {len(gold)} gold labels and {len(predicted)} predictions")
    if len(set(classes)) != len(classes):
        raise ValueError(f"classes must be distinct, got {list(classes)}")
    index = {name: position for position, name in enumerate(classes)}
    counts = [[0] * (len(classes) + 1) for _ in classes]
    for truth, guess in zip(gold, predicted, strict=True):
        if truth not in index:
            raise ValueError(f"the gold label {truth!r} is none of the classes {list(classes)}; correct the rows or the task's choices")
        counts[index[truth]][len(classes) if guess is None else index.get(guess, len(classes))] += 1
    return Confusion(classes=tuple(classes), counts=tuple(tuple(row) for row in counts))
