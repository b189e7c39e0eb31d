"""The p-value against scipy's binomial, its laws, and the promise itself on rows whose expected loss is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from llmdistill.exits.guarantee import THRESHOLDS, binomial_cdf, fewest_rows, last_safe, p_value, violations


@pytest.mark.parametrize("num_trials", [1, 7, 150, 4000])
@pytest.mark.parametrize("rate", [0.001, 0.02, 0.5, 0.99])
def test_the_binomial_is_that_of_scipy(num_trials: int, rate: float) -> None:
    for successes in {0, 1, num_trials // 3, num_trials - 1, num_trials}:
        assert binomial_cdf(successes, num_trials, rate) == pytest.approx(binom.cdf(successes, num_trials, rate), rel=1e-9, abs=1e-300)


def test_the_p_value_is_monotone_in_the_loss_in_delta_and_in_the_number_of_rows() -> None:
    losses = [p_value(loss, 200, 0.05) for loss in np.linspace(0, 0.2, 41)]
    assert losses == sorted(losses)
    deltas = [p_value(0.01, 200, delta) for delta in np.linspace(0.001, 0.5, 41)]
    assert deltas == sorted(deltas, reverse=True)
    rows = [p_value(0.0, num_rows, 0.02) for num_rows in range(1, 400)]
    assert rows == sorted(rows, reverse=True)


def test_no_loss_at_all_has_the_p_value_of_that_many_rows_in_a_row() -> None:
    for num_rows in (20, 149, 1000):
        assert p_value(0.0, num_rows, 0.02) == pytest.approx(0.98**num_rows)
    assert (fewest_rows(0.02, 0.05), fewest_rows(0.01, 0.05)) == (149, 299)
    assert p_value(0.0, 149, 0.02) <= 0.05 < p_value(0.0, 148, 0.02)


def test_delta_0_is_the_full_models_alone() -> None:
    assert p_value(0.0, 10**6, 0.0) == 1.0
    assert last_safe(np.zeros((3, 10**4)), 0.0, 0.05) is None


def test_a_loss_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mean loss is 1\.5"):
        p_value(1.5, 10, 0.1)


def losses_of(expected: list[float], num_rows: int, seed: int) -> np.ndarray:
    """Rows that lose 0 or 1; one that loses at a threshold loses at all less careful ones too."""
    draws = np.random.default_rng(seed).random(num_rows)
    return np.array([draws < loss for loss in expected], dtype=float)


EXPECTED = [0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.2]


@pytest.mark.parametrize("delta", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("epsilon", [0.05, 0.2])
def test_the_promise_is_kept(delta: float, epsilon: float) -> None:
    """2,000 calibrations on fresh rows: at most a share of epsilon chooses a threshold whose expected loss is above delta."""
    places = [last_safe(losses_of(EXPECTED, 400, seed), delta, epsilon) for seed in range(2000)]
    broken = sum(place is not None and EXPECTED[place] > delta for place in places) / len(places)
    assert broken <= epsilon + 2 * math.sqrt(epsilon * (1 - epsilon) / len(places))
    assert any(place is not None for place in places), "a promise that is never made is easily kept"


def test_a_larger_delta_never_chooses_a_more_careful_threshold() -> None:
    losses = losses_of(EXPECTED, 500, 1)
    places = [last_safe(losses, delta, 0.05) for delta in np.linspace(0.001, 0.5, 60)]
    found = [-1 if place is None else place for place in places]
    assert found == sorted(found)
    assert found[-1] == len(EXPECTED) - 1


def test_the_first_threshold_that_is_not_safe_ends_the_sequence() -> None:
    losses = losses_of([0.0, 0.5, 0.0], 500, 2)
    assert last_safe(losses, 0.05, 0.05) == 0


def test_violations_of_redrawn_rows_stay_under_epsilon() -> None:
    assert violations(losses_of(EXPECTED, 2000, 3), 0.05, 0.1, num_rows=300, num_splits=200, seed=0) <= 0.1


def test_the_grid_goes_from_careful_to_careless() -> None:
    assert list(THRESHOLDS) == sorted(THRESHOLDS, reverse=True)
    assert THRESHOLDS[-1] == 0.0
    assert max(THRESHOLDS) < 1.0
