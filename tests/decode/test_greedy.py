"""Parity: the engine's tokens, ends and log-probabilities are those of transformers' generate."""

from __future__ import annotations

import random

import pytest
import torch
from random_models import KINDS, random_model, random_prompts
from transformers import PreTrainedModel
from transformers_reference import assert_same, differing_stops, generate, padded

from llmdistill.decode.decoding import Decoding
from llmdistill.decode.engine import Engine


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_generate(kind: str, seed: int) -> None:
    model, draw = random_model(kind, seed), random.Random(seed)
    prompts = random_prompts(seed, draw.choice([1, 2, 3, 6, 11]), draw.choice([1, 5, 17]), model.config.vocab_size)
    num_tokens = draw.choice([1, 2, 9, 20])
    engine = Engine(model, max_batch_rows=draw.choice([1, 3, 16]))
    unstopped = generate(model, prompts, max_new_tokens=num_tokens)
    assert_same(engine.generate(prompts, Decoding(max_new_tokens=num_tokens)), unstopped)
    stops = differing_stops(unstopped, draw.choice([1, 1, 2, 3]))
    reference = generate(model, prompts, max_new_tokens=num_tokens, stops=stops)
    assert any(row.finish_reason == "stop" for row in reference)
    assert_same(engine.generate(prompts, Decoding(max_new_tokens=num_tokens, stop_token_ids=tuple(stops))), reference)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_end_at_different_steps(kind: str) -> None:
    model = random_model(kind, 5)
    prompts = random_prompts(5, 16, 9, model.config.vocab_size)
    stops = differing_stops(generate(model, prompts, max_new_tokens=24), 1)
    reference = generate(model, prompts, max_new_tokens=24, stops=stops)
    assert len({len(row.tokens) for row in reference}) >= 4, "these rows do not show what is tested; take another seed"
    assert {row.finish_reason for row in reference} == {"stop", "length"}
    for max_batch_rows in (16, 5):  # all at once; and the next prompts in the places of those that have ended
        engine = Engine(model, max_batch_rows=max_batch_rows)
        assert_same(engine.generate(prompts, Decoding(max_new_tokens=24, stop_token_ids=tuple(stops))), reference)


@pytest.mark.parametrize("kind", KINDS)
def test_stops_at_the_models_own_tokens(kind: str) -> None:
    model = random_model(kind, 5)
    prompts = random_prompts(5, 6, 9, model.config.vocab_size)
    stops = differing_stops(generate(model, prompts, max_new_tokens=12), 2)
    reference = generate(model, prompts, max_new_tokens=12, stops=stops)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = sorted(stops)
    assert_same(Engine(model).generate(prompts, Decoding(max_new_tokens=12)), reference)
    assert all(row.finish_reason == "length" for row in Engine(model).generate(prompts, Decoding(max_new_tokens=12, stop_token_ids=())))
    model.generation_config.eos_token_id = min(stops)
    assert_same(Engine(model).generate(prompts, Decoding(max_new_tokens=12)), generate(model, prompts, max_new_tokens=12, stops={min(stops)}))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_prompts_longer_than_the_cache_grows_by_at_once(kind: str) -> None:
    model = random_model(kind, 3)
    prompts = random_prompts(3, 2, 150, model.config.vocab_size)
    engine, reference = Engine(model), generate(model, prompts, max_new_tokens=70)
    assert_same(engine.generate(prompts, Decoding(max_new_tokens=70)), reference)
    assert_same(engine.generate(prompts, Decoding(max_new_tokens=70)), reference)  # in storage that is there already


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_too(kind: str, seed: int) -> None:
    model = random_model(kind, seed, dtype=torch.float32)
    for num_prompts in (1, 7):
        prompts = random_prompts(seed, num_prompts, 12, model.config.vocab_size)
        assert_same(Engine(model).generate(prompts, Decoding(max_new_tokens=12)), generate(model, prompts, max_new_tokens=12))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "t5 v1.1 with wo in float32"])
def test_in_half_precision_every_token_is_the_likeliest_up_to_rounding(kind: str, dtype: torch.dtype) -> None:
    """Rounding decides between tokens, so the tokens are put before transformers' model, which must find them as likely as the engine did."""
    kind, _, keeps_wo = kind.partition(" with ")
    model = random_model(kind, 1, dtype=dtype)
    for name, module in model.named_modules():  # transformers keeps T5's wo so where it loads the rest in float16
        if keeps_wo and name.endswith("wo"):
            module.float()
    prompts = random_prompts(1, 4, 9, model.config.vocab_size)
    rows = Engine(model).generate(prompts, Decoding(max_new_tokens=10))
    for prompt, row in zip(prompts, rows, strict=True):
        logprobs_TV = _logprobs(model, prompt, row.tokens)
        chosen_T = logprobs_TV[torch.arange(len(row.tokens)), torch.tensor(row.tokens)]
        tolerance = 40 * torch.finfo(dtype).eps
        assert (chosen_T >= logprobs_TV.amax(-1) - 2 * tolerance).all()
        assert row.logprob_sum == pytest.approx(float(chosen_T.sum()), abs=tolerance * len(row.tokens))


def test_a_t5_with_more_decoder_than_encoder_layers() -> None:
    model = random_model("t5 v1.1", 7, num_layers=1, num_decoder_layers=3)
    prompts = random_prompts(7, 4, 8, model.config.vocab_size)
    reference = generate(model, prompts, max_new_tokens=10, use_cache=False)  # transformers' cache has as many layers as the encoder
    assert_same(Engine(model).generate(prompts, Decoding(max_new_tokens=10)), reference)


def test_no_token_is_asked_for() -> None:
    engine = Engine(random_model("llama", 0))
    asked = [Decoding(max_new_tokens=0), Decoding(max_new_tokens=2), Decoding(max_new_tokens=0, num_beams=2)]
    assert [len(row.tokens) for row in engine.generate([[2], [3], [4]], asked)] == [0, 2, 0]
    assert engine.generate([], Decoding()) == []


def test_a_causal_answer_ends_at_the_models_last_position() -> None:
    model = random_model("llama", 4, max_position_embeddings=12)
    prompts = [[3, 4, 5, 6, 7], [8] * 11]
    rows = Engine(model).generate(prompts, Decoding(max_new_tokens=50))
    assert [(len(row.tokens), row.finish_reason) for row in rows] == [(7, "length"), (1, "length")]
    [reference] = generate(model, prompts[:1], max_new_tokens=7)
    assert rows[0].tokens == reference.tokens


def _logprobs(model: PreTrainedModel, prompt: list[int], tokens: tuple[int, ...]) -> torch.Tensor:
    """transformers' log-probabilities at the steps that gave the tokens."""
    if model.config.is_encoder_decoder:
        inputs = padded(model, [prompt]) | {"decoder_input_ids": torch.tensor([[model.config.decoder_start_token_id, *tokens[:-1]]])}
    else:
        inputs = padded(model, [[*prompt, *tokens[:-1]]])
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -len(tokens) :]
    return logits.float().log_softmax(-1)
