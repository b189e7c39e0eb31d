"""Latencies: measured on the engine for every architecture, and tables that are exact where latencies are sums of parts."""

from __future__ import annotations

import json
import math
import time
from random import Random

import numpy as np
import pytest
import torch
from elastic_models import AXES, MODELS, elastic_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from synthetic import LARGE, SMALL

from llmdistill.decode.engine import Engine
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.cost import flops
from llmdistill.elastic.decisions import Decisions
from llmdistill.elastic.expected_cost import ExpectedCost
from llmdistill.elastic.latency import LatencySetting, measure_latencies
from llmdistill.elastic.latency_features import latency_feature_names, latency_features
from llmdistill.elastic.latency_table import LatencyTable, fit_latency_table
from llmdistill.elastic.nonnegative import nonnegative_least_squares
from llmdistill.elastic.space import Space, Subnet
from llmdistill.elastic.subnet import running, with_subnet

SETTING = LatencySetting(batch_size=1, prompt_tokens=6, new_tokens=4)


def drawn(space: Space, num: int, *, seed: int = 0) -> list[Subnet]:
    generator = Random(seed)
    return list(dict.fromkeys(space.sample(generator) for _ in range(num)))


def additive(space: Space, *, seed: int = 0) -> dict[str, float]:
    generator = Random(seed)
    return {name: generator.choice((0.0, generator.uniform(0.1, 3.0))) if name != "fixed" else 1.0 for name in latency_feature_names(space)}


def total(parts: dict[str, float], space: Space, subnet: Subnet) -> float:
    return sum(one * feature for one, feature in zip(parts.values(), latency_features(space, subnet), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_measured(name: str) -> None:
    model, space = elastic_model(name)
    model.train()
    subnets = [space.smallest(), space.largest()]
    measured = measure_latencies(model, subnets, [SETTING, LatencySetting(batch_size=3, prompt_tokens=5, new_tokens=2)], num_rounds=2, num_repeats=1)
    assert [set(one) for one in measured] == [{"latency_ms_batch_1", "latency_ms_batch_3"}] * 2
    assert all(0 < latency < math.inf for one in measured for latency in one.values())
    assert model.training
    assert running(model) is None


def test_all_tokens_are_made_and_rounds_go_over_all_subnets(monkeypatch: pytest.MonkeyPatch) -> None:
    model, space = elastic_model("t5 v1.1")
    subnets = drawn(space, 3)
    calls: list[tuple[Subnet | None, int]] = []
    real = Engine.generate

    def counted(self: Engine, prompts: list[list[int]], decoding: object) -> object:
        answers = real(self, prompts, decoding)  # pyright: ignore[reportArgumentType]
        assert [len(prompt) for prompt in prompts] == [6]
        calls.append((running(model), len(answers[0].tokens)))
        return answers

    monkeypatch.setattr(Engine, "generate", counted)
    measure_latencies(model, subnets, [SETTING], num_rounds=2, num_repeats=2)
    assert len(calls) == 3 * 2 * (1 + 2)
    assert {num for _, num in calls} == {4}
    rounds = [[subnet for subnet, _ in calls[first : first + 9]] for first in (0, 9)]
    assert all(set(one) == set(subnets) for one in rounds)
    with with_subnet(model, subnets[0]):  # stays what it was
        measure_latencies(model, subnets[1:], [SETTING], num_rounds=1, num_repeats=1)
        assert running(model) == subnets[0]


def test_a_latency_is_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    model, space = elastic_model("llama grouped")
    clock = iter([0.0, 5.0, 10.0, 11.0, 20.0, 23.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert measure_latencies(model, [space.smallest()], [SETTING], num_rounds=3, num_repeats=1) == [{"latency_ms_batch_1": 3000.0}]


def test_what_cannot_be_measured_says_why() -> None:
    model, space = elastic_model("llama grouped")
    with pytest.raises(ValueError, match=r"new_tokens is 0"):
        LatencySetting(new_tokens=0)
    with pytest.raises(ValueError, match=r"0 sub-networks, 1 settings"):
        measure_latencies(model, [], [SETTING])
    with pytest.raises(ValueError, match=r"both named latency_ms_batch_1"):
        measure_latencies(model, [space.largest()], [SETTING, LatencySetting(prompt_tokens=9)])
    with pytest.raises(ValueError, match=r"more than the model's 2048 positions"):
        measure_latencies(model, [space.largest()], [LatencySetting(prompt_tokens=2000, new_tokens=49)])


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=150)
def test_nonnegative_least_squares_is_scipys(seed: int, num_rows: int, num_columns: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(num_rows, num_columns)) * 10 ** rng.uniform(-3, 3, num_columns)
    if num_columns > 2:
        matrix[:, 1] = matrix[:, 0]  # twins and empty columns, as features that always go together make them
        matrix[:, 2] *= rng.integers(0, 2)
    targets = rng.normal(size=num_rows)
    found = nonnegative_least_squares(matrix, targets)
    _, error = nnls(matrix, targets)
    assert (found >= 0).all()
    assert np.linalg.norm(matrix @ found - targets) == pytest.approx(error, rel=1e-7, abs=1e-9)


def test_nonnegative_least_squares_refuses_what_is_no_number() -> None:
    with pytest.raises(ValueError, match=r"finite targets"):
        nonnegative_least_squares(np.ones((2, 1)), np.array([1.0, np.nan]))


@pytest.mark.parametrize("name", [*MODELS, "large", "even", "fixed width"])
def test_a_table_of_sums_of_parts_is_exact(name: str) -> None:
    spaces = {"large": LARGE, "even": SMALL, "fixed width": Axes().space(LARGE.shape)}
    space = spaces[name] if name in spaces else elastic_model(name)[1]
    parts = additive(space)
    table = fit_latency_table(space, SETTING, [(subnet, total(parts, space, subnet)) for subnet in drawn(space, 150)])
    assert table.quality.mean_error_percent < 1e-6
    assert table.quality.kendall_tau > 0.999
    for subnet in drawn(space, 30, seed=1):
        assert table(subnet) == pytest.approx(total(parts, space, subnet), rel=1e-8)
    if not space.even:  # there parts go together, and any share of each explains them
        assert dict(zip(table.names, table.coefficients, strict=True)) == pytest.approx(parts, abs=1e-6)


def test_the_quality_is_that_of_subnets_it_has_not_seen() -> None:
    generator = Random(0)
    measured = [(subnet, flops(LARGE, subnet, prompt_tokens=64, new_tokens=32) / 1e6 * generator.gauss(1, 0.03)) for subnet in drawn(LARGE, 250)]
    table = fit_latency_table(LARGE, SETTING, measured[:150])
    assert (table.quality.num_measured, table.quality.num_held_out) == (150, 30)
    errors = [100 * abs(table(subnet) - latency) / latency for subnet, latency in measured[150:]]
    assert table.quality.mean_error_percent == pytest.approx(sum(errors) / len(errors), rel=0.35)
    assert 1.5 < table.quality.mean_error_percent < 4
    assert table.quality.worst_error_percent < 15
    assert table.quality.kendall_tau > 0.85


def test_its_mean_over_random_choices_is_exact() -> None:
    parts = additive(LARGE)
    table = fit_latency_table(LARGE, SETTING, [(subnet, total(parts, LARGE, subnet)) for subnet in drawn(LARGE, 100)])
    decisions = Decisions(LARGE)
    expected = ExpectedCost(lambda subnet: {SETTING.name: table(subnet)}, decisions, [SETTING.name])
    assert expected.errors(drawn(LARGE, 50, seed=3))[SETTING.name] < 1e-9
    uniform = [torch.full((len(one.values),), 1 / len(one.values), dtype=torch.float64) for one in decisions.open]
    generator = Random(0)
    sampled = [table(LARGE.sample(generator)) for _ in range(4_000)]
    assert float(expected(uniform)) == pytest.approx(sum(sampled) / len(sampled), rel=0.02)


def test_it_survives_json() -> None:
    table = fit_latency_table(LARGE, SETTING, [(subnet, total(additive(LARGE), LARGE, subnet)) for subnet in drawn(LARGE, 60)])
    written = json.loads(json.dumps(table.to_json()))
    assert LatencyTable.from_json(written, LARGE) == table
    with pytest.raises(ValueError, match=r"measure sub-networks of this space"):
        LatencyTable.from_json(written, Axes().space(LARGE.shape))


def test_what_cannot_be_fitted_says_why() -> None:
    measured = [(subnet, 1.0) for subnet in drawn(LARGE, 40)]
    num = len(latency_feature_names(LARGE))
    with pytest.raises(ValueError, match=rf"5 sub-networks are measured, and the table has {num} parts"):
        fit_latency_table(LARGE, SETTING, measured[:5])
    with pytest.raises(ValueError, match=r"given twice"):
        fit_latency_table(LARGE, SETTING, [*measured, measured[0]])
    with pytest.raises(ValueError, match=r"0.0 is no latency"):
        fit_latency_table(LARGE, SETTING, [*measured[1:], (measured[0][0], 0.0)])
    with pytest.raises(ValueError, match=r"held_out_share is 1"):
        fit_latency_table(LARGE, SETTING, measured, held_out_share=1)


@pytest.mark.parametrize("name", MODELS)
def test_features_have_names_and_are_whole_at_the_largest(name: str) -> None:
    _, space = elastic_model(name, AXES)
    named = dict(zip(latency_feature_names(space), latency_features(space, space.largest()), strict=True))
    assert named["fixed"] == named["width"] == 1
    for shape in space.shape.stacks:
        assert named[f"{shape.name}.layers"] == named[f"{shape.name}.heads"] == named[f"{shape.name}.ffn x width"] == shape.num_layers
    assert all(small <= large for small, large in zip(latency_features(space, space.smallest()), named.values(), strict=True))
