"""Laws of sampling: the distribution is transformers', the draw follows it exactly, and a row's tokens depend on its seed and prompt alone."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import random_model, random_prompts
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers_reference import padded

from llmdistill.decode.decoding import Decoding
from llmdistill.decode.engine import Engine
from llmdistill.decode.sampling import BLOCK, draw, filter_logits, likeliest


@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 12),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    has_ties=st.booleans(),
)
def test_keeps_and_weights_the_tokens_that_transformers_does(seed: int, temperature: float, top_k: int, top_p: float, has_ties: bool) -> None:
    logits_BV = 3 * torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if has_ties:
        logits_BV = logits_BV.round()
    ours_BV = filter_logits(logits_BV, Decoding(temperature=temperature, top_k=top_k, top_p=top_p))
    reference_BV = TemperatureLogitsWarper(temperature)(torch.empty(0), logits_BV)  # pyright: ignore[reportArgumentType]
    if top_k:
        reference_BV = TopKLogitsWarper(top_k)(torch.empty(0), reference_BV)  # pyright: ignore[reportArgumentType]
    if top_p < 1:
        reference_BV = TopPLogitsWarper(top_p)(torch.empty(0), reference_BV)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(ours_BV.softmax(-1), reference_BV.softmax(-1), rtol=1e-9, atol=1e-12)
    assert torch.equal(ours_BV.isinf(), reference_BV.isinf())


@pytest.mark.parametrize("num_tokens", [1, BLOCK, 2 * BLOCK, 2 * BLOCK + 1, 5 * BLOCK - 1])
def test_the_likeliest_is_the_first_of_the_largest(num_tokens: int) -> None:
    logits_BV = torch.randint(0, 4, (64, num_tokens), generator=torch.Generator().manual_seed(0)).float()  # many ties
    logits_BV[:32] = torch.randn(32, num_tokens, generator=torch.Generator().manual_seed(1))
    assert torch.equal(likeliest(logits_BV), logits_BV.argmax(-1))


def test_evenly_spread_numbers_draw_each_token_by_its_probability() -> None:
    scores_V = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores_V[3] = -torch.inf
    num_draws = 20_000
    tokens = draw(scores_V.expand(num_draws, -1), [(place + 0.5) / num_draws for place in range(num_draws)])
    shares_V = torch.bincount(tokens, minlength=7) / num_draws
    torch.testing.assert_close(shares_V.double(), scores_V.softmax(-1), rtol=0, atol=1.5 / num_draws)
    assert shares_V[3] == 0


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_draw_no_token_of_probability_zero(number: float) -> None:
    scores_BV = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    assert int(draw(scores_BV, [number])) == (1 if number == 0 else 2)


@pytest.mark.parametrize("kind", ["t5 v1.1", "llama"])
def test_first_tokens_are_distributed_as_transformers_would_draw_them(kind: str) -> None:
    model, prompt, num_draws = random_model(kind, 1, vocab_size=12), [3, 5, 4], 1500
    asked = [Decoding(max_new_tokens=1, temperature=1.3, top_k=8, top_p=0.95, seed=seed) for seed in range(num_draws)]
    rows = Engine(model, max_batch_rows=500).generate([prompt] * num_draws, asked)
    inputs = padded(model, [prompt])
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.inference_mode():
        logits_BV = model(**inputs).logits[:, -1]
    for warper in (TemperatureLogitsWarper(1.3), TopKLogitsWarper(8), TopPLogitsWarper(0.95)):
        logits_BV = warper(inputs["input_ids"], logits_BV)  # pyright: ignore[reportArgumentType]
    probabilities = logits_BV[0].softmax(-1).tolist()
    counts = Counter(row.tokens[0] for row in rows)
    possible = [token for token, probability in enumerate(probabilities) if probability]
    assert 3 <= len(possible) <= 8
    assert set(counts) <= set(possible)
    assert chisquare([counts[token] for token in possible], [probabilities[token] * num_draws for token in possible]).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["t5 v1.0", "t5 v1.1", "llama", "qwen2"])
def test_a_rows_tokens_depend_on_its_seed_and_prompt_alone(kind: str) -> None:
    model, engine_rows = random_model(kind, 6), random.Random(6)
    prompts = random_prompts(6, 7, 10, model.config.vocab_size)
    settings = [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.5, 0, 0.9), (0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 5, 1.0), (2, 9, 0.8)]
    asked = [
        Decoding(max_new_tokens=engine_rows.choice([3, 8, 14]), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        for seed, (temperature, top_k, top_p) in enumerate(settings)
    ]
    together = Engine(model).generate(prompts, asked)
    in_twos = Engine(model, max_batch_rows=2).generate(prompts[::-1], asked[::-1])[::-1]
    alone = [Engine(model).generate([prompt], decoding)[0] for prompt, decoding in zip(prompts, asked, strict=True)]
    assert [row.tokens for row in together] == [row.tokens for row in in_twos] == [row.tokens for row in alone]


def test_seeds_differ_and_repeat() -> None:
    model = random_model("t5 v1.1", 6)
    asked = [Decoding(max_new_tokens=8, temperature=1.0, seed=seed) for seed in (1, 2, 3, 1)]
    rows = Engine(model).generate([[4, 5, 6]] * 4, asked)
    assert len({row.tokens for row in rows[:3]}) == 3
    assert rows[0] == rows[3]
    assert Engine(model).generate([[4, 5, 6]] * 4, asked) == rows
    [other] = Engine(model).generate([[4, 5, 7]], asked[0])
    assert other.tokens != rows[0].tokens


def test_the_likeliest_of_one_and_a_temperature_near_zero_are_greedy() -> None:
    model = random_model("llama", 6)
    prompts = random_prompts(6, 5, 8, model.config.vocab_size)
    engine = Engine(model)
    greedy = engine.generate(prompts, Decoding(max_new_tokens=10))
    for decoding in (
        Decoding(max_new_tokens=10, temperature=1.0, top_k=1),
        Decoding(max_new_tokens=10, temperature=1e-9),
        Decoding(max_new_tokens=10, temperature=1.0, top_p=1e-9),
    ):
        assert [row.tokens for row in engine.generate(prompts, decoding)] == [row.tokens for row in greedy]


def test_logprob_sum_is_of_the_models_own_distribution() -> None:
    model = random_model("llama", 6)
    [row] = Engine(model).generate([[4, 5, 6]], Decoding(max_new_tokens=6, temperature=0.5, top_k=3))
    with torch.inference_mode():
        logprobs_TV = model(torch.tensor([[4, 5, 6, *row.tokens[:-1]]])).logits[0, 2:].log_softmax(-1)
    assert row.logprob_sum == pytest.approx(float(logprobs_TV[torch.arange(6), torch.tensor(row.tokens)].sum()), abs=1e-4)
