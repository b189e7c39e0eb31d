"""Parity: the hypotheses of beam search, all of them and in their order, are those of transformers' generate."""

from __future__ import annotations

import random

import pytest
from random_models import KINDS, random_model, random_prompts
from transformers_reference import beams, differing_stops, generate

from llmdistill.decode.decoding import Decoding
from llmdistill.decode.engine import Engine


@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize("kind", KINDS)
def test_hypotheses_are_those_of_generate(kind: str, seed: int) -> None:
    model, draw = random_model(kind, seed), random.Random(seed)
    prompts = random_prompts(seed, draw.choice([1, 2, 4, 6]), 9, model.config.vocab_size)
    settings = {
        "num_beams": [2, 3, 4, 5][seed % 4],
        "length_penalty": draw.choice([-0.5, 0.0, 0.7, 1.0, 2.0]),
        "early_stopping": draw.choice([False, True]),
        "max_new_tokens": draw.choice([1, 5, 13]),
    }
    # The tokens that greedy rows would end with at many places end many hypotheses, too.
    stops = differing_stops(generate(model, prompts, max_new_tokens=13), seed % 4)
    engine = Engine(model, max_batch_rows=draw.choice([4, 12, 64]))
    decoding = Decoding(**settings, stop_token_ids=tuple(stops))
    ours = engine.beams(prompts, decoding)
    reference = beams(model, prompts, stops=stops, **settings)
    for hypotheses, scored in zip(ours, reference, strict=True):
        assert [(one.tokens, one.finish_reason) for one in hypotheses] == [(one.tokens, one.finish_reason) for one, _ in scored]
        lengths = [len(one.tokens) + (one.finish_reason == "stop") for one in hypotheses]
        scores = [one.logprob_sum / length**decoding.length_penalty for one, length in zip(hypotheses, lengths, strict=True)]
        assert scores == pytest.approx([score for _, score in scored], rel=1e-4, abs=1e-4)
    assert engine.generate(prompts, decoding) == [hypotheses[0] for hypotheses in ours]


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_that_end_at_different_steps(kind: str, early_stopping: bool) -> None:
    model = random_model(kind, 5)
    prompts = random_prompts(5, 8, 9, model.config.vocab_size)
    stops = differing_stops(generate(model, prompts, max_new_tokens=16), 2)
    reference = beams(model, prompts, max_new_tokens=16, num_beams=3, stops=stops, early_stopping=early_stopping)
    assert len({len(scored[0][0].tokens) for scored in reference}) >= 3, "these prompts do not show what is tested; take another seed"
    decoding = Decoding(max_new_tokens=16, num_beams=3, early_stopping=early_stopping, stop_token_ids=tuple(stops))
    ours = Engine(model).beams(prompts, decoding)
    assert [[one.tokens for one in hypotheses] for hypotheses in ours] == [[one.tokens for one, _ in scored] for scored in reference]


@pytest.mark.parametrize("kind", ["t5 v1.1", "qwen2"])
def test_a_prompt_alone_and_among_others(kind: str) -> None:
    model = random_model(kind, 2)
    prompts = random_prompts(2, 6, 12, model.config.vocab_size)
    decoding = Decoding(max_new_tokens=9, num_beams=3)
    engine = Engine(model)
    together = engine.generate(prompts, decoding)
    assert [row.tokens for row in together] == [engine.generate([prompt], decoding)[0].tokens for prompt in prompts]


def test_a_vocabulary_with_fewer_beginnings_than_beams() -> None:
    model = random_model("t5 v1.0", 0, vocab_size=3)
    [hypotheses] = Engine(model).beams([[2, 1]], Decoding(max_new_tokens=1, num_beams=5))
    assert sorted(one.tokens for one in hypotheses) == [(0,), (1,), (2,)]
    assert [one.logprob_sum for one in hypotheses] == sorted((one.logprob_sum for one in hypotheses), reverse=True)


def test_refuses_what_beam_search_cannot_do() -> None:
    engine = Engine(random_model("t5 v1.0", 0, vocab_size=8))
    with pytest.raises(ValueError, match="num_beams is 1 and max_new_tokens 64; give 2 beams or more"):
        engine.beams([[2]], Decoding())
    with pytest.raises(ValueError, match="8 stop tokens are too many for a vocabulary of 8"):
        engine.generate([[2]], Decoding(num_beams=2, stop_token_ids=tuple(range(8))))
    with pytest.raises(ValueError, match="num_beams is 2, but beam search has no tokens to hand out"):
        engine.add([2], Decoding(num_beams=2))
