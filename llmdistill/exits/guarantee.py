"""Thresholds with a guarantee: the expected loss of quality is at most delta, with probability at least 1 - epsilon over the calibration rows.

Each threshold is a hypothesis "its expected loss is above delta", with a p-value from the losses of n rows, each in [0, 1] (Hoeffding-Bentkus: Bates et al.
2021, "Distribution-Free, Risk-Controlling Prediction Sets", section 3.1, as Angelopoulos et al. 2021, "Learn then Test", use it in section 2.1):

    p = min(1, exp(-n h(min(m, delta), delta)), e P(Binomial(n, delta) <= ceil(n m)))       m the mean loss, h(a, b) = a log(a/b) + (1-a) log((1-a)/(1-b))

Thresholds are tested from the most careful one down, each at level epsilon, and the first that is not rejected ends it: fixed-sequence testing, which needs no
correction for their number (CALM, section 4.1). So the order must not depend on the rows: the grid is fixed.

With m = 0 the p-value is (1 - delta)^n: fewer than log(epsilon) / log(1 - delta) rows cannot say anything of a delta (299 rows for 0.01 at 0.05, 149 for
0.02), and delta = 0 is met by the full model alone.

Shapes: T thresholds, n rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from llmdistill.models.exit_settings import NEVER

THRESHOLDS = (*(1 - 10 ** (-number / 5) for number in range(20, 0, -1)), 0.0)
"""From 0.9999 down to 0, closer to one another near 1, where a cosine of states or a sure student's probabilities are."""


def p_value(mean_loss: float, num_rows: int, delta: float) -> float:
    """Of "the expected loss is above delta" where so many rows lost so much on average."""
    if not 0 <= mean_loss <= 1 or num_rows < 1 or not 0 <= delta <= 1:
        raise ValueError(f"the mean loss is {mean_loss} of {num_rows} rows, and delta {delta}: losses and delta are from 0 to 1, and there is a row")
    if delta in (0.0, 1.0):
        return 1.0 - delta  # no loss is above 1, and no number of rows excludes one that is above 0
    hoeffding = math.exp(-num_rows * _divergence(min(mean_loss, delta), delta))
    bentkus = math.e * binomial_cdf(math.ceil(num_rows * mean_loss - 1e-9), num_rows, delta)
    return min(1.0, hoeffding, bentkus)


def binomial_cdf(successes: int, num_trials: int, rate: float) -> float:
    """P(Binomial(num_trials, rate) <= successes)."""
    if successes >= num_trials:
        return 1.0
    logs = [
        math.lgamma(num_trials + 1) - math.lgamma(k + 1) - math.lgamma(num_trials - k + 1) + k * math.log(rate) + (num_trials - k) * math.log1p(-rate)
        for k in range(successes + 1)
    ]
    largest = max(logs, default=-math.inf)
    return min(1.0, math.exp(largest) * math.fsum(math.exp(log - largest) for log in logs)) if logs else 0.0


def fewest_rows(delta: float, epsilon: float) -> int:
    """How many rows a delta needs where not one of them loses anything."""
    return math.ceil(math.log(epsilon) / math.log1p(-delta) - 1e-9)


def last_safe(losses_Tn: Float[np.ndarray, "T n"], delta: float, epsilon: float) -> int | None:
    """The place of the least careful threshold that is safe; they are in order, the most careful first. None where the first is not."""
    place = None
    for candidate, losses_n in enumerate(losses_Tn):
        if p_value(float(losses_n.mean()), len(losses_n), delta) > epsilon:
            break
        place = candidate
    return place


def threshold_at(place: int | None, thresholds: Sequence[float]) -> float:
    """What a place means."""
    return NEVER if place is None else thresholds[place]


def violations(losses_Tn: Float[np.ndarray, "T n"], delta: float, epsilon: float, *, num_rows: int, num_splits: int, seed: int) -> float:
    """In what share of calibrations the guarantee does not hold.

    Each calibrates on `num_rows` rows that are drawn, with replacement, from all n, whose mean is then the expected loss exactly."""
    expected_T = losses_Tn.mean(1)
    generator = np.random.default_rng(seed)
    places = (last_safe(losses_Tn[:, generator.integers(0, losses_Tn.shape[1], num_rows)], delta, epsilon) for _ in range(num_splits))
    return sum(place is not None and bool(expected_T[place] > delta) for place in places) / num_splits


def _divergence(a: float, b: float) -> float:
    """Kullback-Leibler's, of two coins."""
    return (a * math.log(a / b) if a else 0.0) + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)
