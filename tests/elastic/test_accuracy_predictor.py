"""The accuracy predictor: it orders sub-networks that it has not seen, tells honestly how well, and survives JSON exactly."""

from __future__ import annotations

import json
import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau
from synthetic import LARGE, SMALL, question, synthetic_accuracy

from llmdistill.elastic.accuracy_predictor import MIN_SAMPLES, Predictor, PredictorSettings, fit
from llmdistill.elastic.agreement import held_out, kendall_tau
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.evolution import Evolution
from llmdistill.elastic.question import Question, search
from llmdistill.elastic.space import Space, Subnet

QUICK = PredictorSettings(epochs=30)


def samples(num: int, *, seed: int = 0, space: Space = LARGE) -> list[tuple[Subnet, float]]:
    accuracy, generator = synthetic_accuracy(space), Random(seed)
    drawn = dict.fromkeys(space.sample(generator) for _ in range(num))
    return [(subnet, accuracy(subnet)) for subnet in drawn]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
@settings(max_examples=100)
def test_kendall_tau_is_scipys(pairs: list[tuple[int, int]]) -> None:
    predicted, measured = [float(one) for one, _ in pairs], [float(other) for _, other in pairs]
    tau = kendall_tau(predicted, measured)
    if len(set(predicted)) == 1 or len(set(measured)) == 1:
        assert tau == 0
    else:
        assert tau == pytest.approx(kendalltau(predicted, measured)[0], abs=1e-12)


def test_it_orders_what_it_has_not_seen() -> None:
    predictor = fit(LARGE, samples(250))
    unseen = samples(150, seed=1)
    predicted, true = predictor.predict([subnet for subnet, _ in unseen]), [accuracy for _, accuracy in unseen]
    tau = kendall_tau(predicted, true)
    assert tau > 0.85
    quality = predictor.quality
    assert (quality.num_samples, quality.num_held_out) == (250, 50)
    assert quality.kendall_tau == pytest.approx(tau, abs=0.08)
    mean_error = sum(abs(one - other) for one, other in zip(predicted, true, strict=True)) / len(true)
    assert quality.mean_absolute_error == pytest.approx(mean_error, rel=0.5)
    assert quality.mean_absolute_error <= quality.root_mean_square_error < 0.03


def test_held_out_samples_do_not_touch_what_judges_them() -> None:
    """Other accuracies for the held-out ones change the quality, and not what it says of them."""
    given_samples = samples(40)
    _, others = held_out(40, share=0.2, seed=0)
    changed = [(subnet, accuracy + 100 * (place in others)) for place, (subnet, accuracy) in enumerate(given_samples)]
    honest, wrong = (fit(LARGE, one, QUICK).quality for one in (given_samples, changed))
    assert wrong.mean_absolute_error == pytest.approx(100, abs=1)
    assert honest.kendall_tau == wrong.kendall_tau


def test_the_same_seed_gives_the_same_predictor() -> None:
    given_samples, subnet = samples(60), LARGE.largest()
    first = fit(LARGE, given_samples, QUICK)
    with torch.inference_mode():  # wherever it is fitted
        second = fit(LARGE, given_samples, QUICK)
    assert first(subnet) == second(subnet)
    assert first.quality == second.quality
    assert fit(LARGE, given_samples, PredictorSettings(epochs=30, seed=1))(subnet) != first(subnet)


def test_it_survives_json_exactly() -> None:
    predictor = fit(LARGE, samples(30), QUICK)
    read = Predictor.from_json(json.loads(json.dumps(predictor.to_json())), LARGE)
    subnets = [subnet for subnet, _ in samples(20, seed=2)]
    assert read.predict(subnets) == predictor.predict(subnets)
    assert read.quality == predictor.quality
    with pytest.raises(ValueError, match=r"features of another space"):
        Predictor.from_json(predictor.to_json(), Axes(heads=(1.0,)).space(LARGE.shape))


def test_many_at_once_are_as_one_by_one() -> None:
    predictor = fit(SMALL, samples(200, space=SMALL)[:20], QUICK)
    subnets = list(SMALL.every())
    assert predictor.predict(subnets) == pytest.approx([predictor(subnet) for subnet in subnets], rel=1e-6)
    assert predictor.predict([]) == []


def test_equal_accuracies_are_predicted_equal() -> None:
    predictor = fit(LARGE, [(subnet, 0.5) for subnet, _ in samples(12)], QUICK)
    assert predictor(LARGE.smallest()) == pytest.approx(0.5, abs=1e-6)
    assert predictor.quality.kendall_tau == 0


def test_a_search_asks_it_and_finds_what_is_better_than_its_samples() -> None:
    given_samples = samples(150)
    true = synthetic_accuracy(LARGE)
    costs = question(LARGE, 1).costs
    asked = Question(space=LARGE, accuracy=fit(LARGE, given_samples), costs=costs, cost="flops", budget=300, limits=question(LARGE, 1, limit=0.4).limits)
    within = [accuracy for subnet, accuracy in given_samples if costs(subnet)["flops"] <= asked.limits[0].most]
    best = max(search(Evolution(), asked, seed=0), key=lambda one: one.accuracy)
    assert true(best.subnet) > max(within)


def test_what_cannot_be_fitted_says_why() -> None:
    few = samples(40)
    with pytest.raises(ValueError, match=rf"there are 9 sub-networks .* measure {MIN_SAMPLES} or more"):
        fit(LARGE, few[:9])
    with pytest.raises(ValueError, match=r"given twice"):
        fit(LARGE, [*few, few[0]])
    with pytest.raises(ValueError, match=r"nan is no accuracy"):
        fit(LARGE, [*few[1:], (few[0][0], math.nan)])
    with pytest.raises(ValueError, match=r"hidden_width is 0"):
        PredictorSettings(hidden_width=0)
    with pytest.raises(ValueError, match=r"weight_decay 1000.0"):
        PredictorSettings(weight_decay=1000.0)
