"""Every figure against scipy, and the laws that need no reference."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from llmdistill.statistics import confusion, mcnemar, wilson_interval

counts = st.integers(1, 3000).flatmap(lambda num_rows: st.tuples(st.integers(0, num_rows), st.just(num_rows)))


@given(counts, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_interval_is_scipys(count: tuple[int, int], confidence: float) -> None:
    num_correct, num_rows = count
    low, high = wilson_interval(num_correct, num_rows, confidence)
    reference = stats.binomtest(num_correct, num_rows).proportion_ci(confidence_level=confidence, method="wilson")
    assert math.isclose(low, reference.low, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(high, reference.high, rel_tol=1e-9, abs_tol=1e-12)
    assert 0 <= low <= num_correct / num_rows <= high <= 1


def test_wilson_interval_covers_as_often_as_it_says() -> None:
    """Exact coverage, summed over the binomial distribution and averaged over many true proportions, is close to 95%."""
    num_rows = 60
    intervals = [wilson_interval(k, num_rows) for k in range(num_rows + 1)]
    shares = [i / 200 for i in range(10, 191)]
    coverage = [sum(stats.binom.pmf(k, num_rows, share) for k, (low, high) in enumerate(intervals) if low <= share <= high) for share in shares]
    assert 0.94 < sum(coverage) / len(coverage) < 0.96


@pytest.mark.parametrize("num_correct, num_rows", [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(num_correct: int, num_rows: int) -> None:
    with pytest.raises(ValueError, match=f"num_correct={num_correct}"):
        wilson_interval(num_correct, num_rows)


def rows_of(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    pairs = [(True, True)] * both + [(True, False)] * only_first + [(False, True)] * only_second + [(False, False)] * neither
    random.Random(0).shuffle(pairs)
    return [first for first, _ in pairs], [second for _, second in pairs]


@given(st.integers(0, 50), st.integers(0, 200), st.integers(0, 200), st.integers(0, 50))
def test_mcnemar_is_scipys(both: int, only_first: int, only_second: int, neither: int) -> None:
    result = mcnemar(*rows_of(both, only_first, only_second, neither))
    assert (result.num_both_correct, result.num_only_first_correct) == (both, only_first)
    assert (result.num_only_second_correct, result.num_neither_correct) == (only_second, neither)
    assert result.num_rows == both + only_first + only_second + neither
    num_different = only_first + only_second
    exact = stats.binomtest(only_first, num_different, 0.5).pvalue if num_different else 1.0
    assert math.isclose(result.p_exact, exact, rel_tol=1e-9)
    chi_square = max(abs(only_first - only_second) - 1, 0) ** 2 / num_different if num_different else 0.0
    assert math.isclose(result.p_chi_square, stats.chi2.sf(chi_square, df=1), rel_tol=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_mcnemar_is_symmetric(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    there, back = mcnemar(first, second), mcnemar(second, first)
    assert (there.p_exact, there.chi_square) == (back.p_exact, back.chi_square)
    assert there.num_only_first_correct == back.num_only_second_correct


def test_mcnemar_of_many_rows_does_not_overflow() -> None:
    assert 0 <= mcnemar(*rows_of(0, 9000, 11000, 0)).p_exact < 1e-40
    assert mcnemar(*rows_of(5, 0, 0, 5)).p_exact == 1.0


def test_mcnemar_refuses_different_rows() -> None:
    with pytest.raises(ValueError, match="3 and 2 rows"):
        mcnemar([True, True, False], [True, False])


classes = ("a", "b", "c")
answers = st.lists(st.tuples(st.sampled_from(classes), st.sampled_from([*classes, "nonsense", None])), max_size=80)


@given(answers)
def test_confusion_counts_every_row_once(pairs: list[tuple[str, str | None]]) -> None:
    gold, predicted = [g for g, _ in pairs], [p for _, p in pairs]
    matrix = confusion(classes, gold, predicted)
    assert sum(map(sum, matrix.counts)) == len(pairs)
    assert sum(matrix.counts[i][i] for i in range(3)) == sum(g == p for g, p in pairs)
    assert sum(row[-1] for row in matrix.counts) == sum(p not in classes for p in predicted)
    for figure in matrix.per_class():
        name = figure["class"]
        hits = sum(g == p == name for g, p in pairs)
        num_gold, num_predicted = gold.count(str(name)), predicted.count(str(name))
        assert figure["recall"] == (hits / num_gold if num_gold else None)
        assert figure["precision"] == (hits / num_predicted if num_predicted else None)


@given(answers.filter(bool))
def test_macro_f1_is_scikit_learns(pairs: list[tuple[str, str | None]]) -> None:
    gold = [g for g, _ in pairs]
    predicted = [p if p in classes else "unreadable" for _, p in pairs]
    seen = sorted({*gold, *predicted} - {"unreadable"})
    reference = f1_score(gold, predicted, labels=seen, average="macro", zero_division=0)  # pyright: ignore[reportArgumentType]
    ours = confusion(classes, gold, [p for _, p in pairs]).macro_f1()
    assert ours is not None
    assert math.isclose(ours, float(reference), rel_tol=1e-12, abs_tol=1e-12)


def test_confusion_refuses_an_unknown_gold_label() -> None:
    with pytest.raises(ValueError, match="'d' is none of the classes"):
        confusion(classes, ["a", "d"], ["a", "a"])
    with pytest.raises(ValueError, match="2 gold labels and 1 predictions"):
        confusion(classes, ["a", "b"], ["a"])
