"""Rows that leave at layers of their own: tokens and depths are those of a reference that knows no cache and no batch."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from exit_models import exiting_model, reference
from random_models import KINDS, random_prompts
from transformers.modeling_outputs import BaseModelOutput

from llmdistill.decode.confidence import MEASURES, Seen, decayed
from llmdistill.decode.decoding import Decoding
from llmdistill.decode.engine import Engine
from llmdistill.decode.exiting import Rule
from llmdistill.models.exit_settings import Calibration, Confidence, Point, Policy
from llmdistill.models.exits import digest, keep_settings, read_exits


def full_tokens(model: Any, prompts: list[list[int]], num_tokens: int) -> list[tuple[int, ...]]:
    return [row.tokens for row in Engine(model).generate(prompts, Decoding(max_new_tokens=num_tokens, exit_threshold=1.0))]


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("confidence", Confidence)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_depths_are_those_of_the_reference(kind: str, confidence: Confidence, policy: Policy) -> None:
    num_vocabulary = 20 if confidence in (Confidence.GAP, Confidence.GATE) else 0
    model = exiting_model(kind, 3, confidence=confidence, policy=policy, num_vocabulary=num_vocabulary, decay=2.0 if kind == "llama" else 0.0)
    prompts = random_prompts(3, 4, 7, model.config.vocab_size)
    engine = Engine(model, max_batch_rows=3)
    for threshold in (0.6, 0.8, 0.3, 0.1, 0.9, 0.01):
        generated = engine.generate(prompts, Decoding(max_new_tokens=8, exit_threshold=threshold))
        if len({depth for row in generated for depth in row.layers}) >= 2:
            break
    else:
        pytest.fail("all tokens left at one depth at every threshold: these rows do not show what is tested; take another seed")
    for prompt, row in zip(prompts, generated, strict=True):
        tokens, layers = reference(model, prompt, threshold=threshold, num_tokens=8)
        assert (list(row.tokens), list(row.layers)) == (tokens, layers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_threshold_of_1_never_leaves_and_gives_the_tokens_of_the_model_without_exits(kind: str) -> None:
    model = exiting_model(kind, 4)
    prompts = random_prompts(4, 6, 9, model.config.vocab_size)
    with_exits = Engine(model).generate(prompts, Decoding(max_new_tokens=8, exit_threshold=1.0))
    assert {depth for row in with_exits for depth in row.layers} == {6}
    model.config.exits = None
    assert [row.tokens for row in Engine(model).generate(prompts, Decoding(max_new_tokens=8))] == [row.tokens for row in with_exits]


@pytest.mark.parametrize("kind", KINDS)
def test_a_threshold_of_0_leaves_at_the_first_exit(kind: str) -> None:
    model = exiting_model(kind, 4, layers=(2, 4))
    generated = Engine(model).generate(random_prompts(4, 3, 9, model.config.vocab_size), Decoding(max_new_tokens=8, exit_threshold=0.0))
    assert {depth for row in generated for depth in row.layers} == {2}


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_whoever_is_beside_it(kind: str, policy: Policy) -> None:
    """20 rows with thresholds and lengths of their own, that join and leave, and each of them alone."""
    model, draw = exiting_model(kind, 6, policy=policy), random.Random(6)
    prompts = random_prompts(6, 20, 12, model.config.vocab_size)
    decodings = [Decoding(max_new_tokens=draw.randint(1, 24), exit_threshold=draw.choice([0.3, 0.5, 0.7, 0.9, 1.0])) for _ in prompts]
    together = {size: Engine(model, max_batch_rows=size).generate(prompts, decodings) for size in (7, 20)}
    engine = Engine(model, max_batch_rows=1)
    for number, (prompt, decoding) in enumerate(zip(prompts, decodings, strict=True)):
        (alone,) = engine.generate([prompt], decoding)
        for rows in together.values():
            assert (rows[number].tokens, rows[number].layers) == (alone.tokens, alone.layers)
            assert rows[number].logprob_sum == pytest.approx(alone.logprob_sum, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_deferred_keys_and_values_are_those_of_the_full_model(kind: str) -> None:
    """A row that left early for a while, and then goes the whole depth, has in its cache what it would have had at full depth all along."""
    model = exiting_model(kind, 8)
    prompt = random_prompts(8, 1, 6, model.config.vocab_size)[0]
    engine = Engine(model, max_batch_rows=1)
    row = engine.add(prompt, Decoding(max_new_tokens=12, exit_threshold=0.0))
    tokens = [engine.step()[0].token for _ in range(7)]
    active = engine._active[0]
    active.decoding = replace(active.decoding, exit_threshold=1.0)
    engine.step()
    cache = engine._batch.batch.cache
    found = [layer[:, :1, :, cache.starts[0] : cache.column].clone() for layer in cache.store.layers[:-1]]
    engine.drop(row)

    full = Engine(model, max_batch_rows=1)
    full.add(prompt, Decoding(max_new_tokens=12, exit_threshold=1.0))
    for token in [None, *tokens]:
        if token is not None:
            full._inputs = [token]
        full.step()
    cache = full._batch.batch.cache
    for layer, expected in zip(found, cache.store.layers[:-1], strict=True):
        torch.testing.assert_close(layer, expected[:, :1, :, cache.starts[0] : cache.column], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft_tokens", [1, 3, 6])
def test_what_drafts_and_verification_say_is_what_the_full_model_says(kind: str, draft_tokens: int) -> None:
    model = exiting_model(kind, 5, layers=(2, 5))
    with torch.no_grad():
        for norm in model.exits.norms:
            norm.weight.copy_(model.decoder.final_layer_norm.weight if kind.startswith("t5") else model.model.norm.weight)
        for adapter in model.exits.adapters:
            torch.nn.init.zeros_(adapter.up.weight)
        for layer in (model.decoder.block if kind.startswith("t5") else model.model.layers)[-1:]:
            for parameter in layer.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(0.1)
    prompts = random_prompts(5, 9, 8, model.config.vocab_size)
    expected = full_tokens(model, prompts, 21)
    stop = expected[0][len(expected[0]) // 2]
    for size in (1, 4):
        engine = Engine(model, max_batch_rows=size)
        decoding = Decoding(max_new_tokens=21, draft_tokens=draft_tokens, draft_exit=1)
        generated = engine.generate(prompts, decoding)
        assert [row.tokens for row in generated] == expected
        stopping = Decoding(max_new_tokens=21, stop_token_ids=(stop,))
        drafted = engine.generate(prompts, replace(stopping, draft_tokens=draft_tokens, draft_exit=1))
        assert drafted == Engine(model).generate(prompts, replace(stopping, exit_threshold=1.0))


def test_drafts_save_steps_where_the_exit_is_right() -> None:
    """Of an exit that says what the last layer says, all drafts are verified at once."""
    model = exiting_model("llama", 5, layers=(5,))
    with torch.no_grad():
        model.exits.norms[0].weight.copy_(model.model.norm.weight)
        torch.nn.init.zeros_(model.exits.adapters[0].up.weight)
        for parameter in model.model.layers[-1].parameters():
            if parameter.dim() == 2:
                torch.nn.init.zeros_(parameter)
    engine = Engine(model)
    engine.add([3, 4, 5], Decoding(max_new_tokens=10, draft_tokens=4, stop_token_ids=()))
    news = []
    while engine.num_active:
        news.append(len(engine.step()))
    assert news == [0, 0, 0, 0, 5, 0, 0, 0, 0, 5]


def test_rows_that_draft_beside_rows_that_leave_early() -> None:
    model = exiting_model("t5 v1.1", 7)
    prompts = random_prompts(7, 8, 9, model.config.vocab_size)
    decodings = [Decoding(max_new_tokens=17, draft_tokens=3, draft_exit=1) if n % 2 else Decoding(max_new_tokens=13, exit_threshold=0.6) for n in range(8)]
    together = Engine(model).generate(prompts, decodings)
    alone = [Engine(model).generate([prompt], decoding)[0] for prompt, decoding in zip(prompts, decodings, strict=True)]
    assert [row.tokens for row in together] == [row.tokens for row in alone]
    assert [together[n].tokens for n in range(1, 8, 2)] == full_tokens(model, prompts[1::2], 17)


def test_confidences_are_from_0_to_1_and_order_a_sure_distribution_above_an_unsure_one() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0], [1.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [float("-inf"), 0.0, float("-inf"), float("-inf")]])
    for confidence in (Confidence.TOP1, Confidence.GAP, Confidence.ENTROPY):
        values = MEASURES[confidence].confidence_N(Seen(state_ND=torch.zeros(4, 2), logits_NK=logits))
        assert ((values >= 0) & (values <= 1)).all()
        assert values[3] == 1
        assert values[0] > values[1] > values[2] - 1e-6
    states = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    saturation = MEASURES[Confidence.SATURATION].confidence_N(Seen(state_ND=states, before_ND=torch.tensor([[2.0, 0.0]]).expand(3, -1)))
    assert saturation.tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_a_threshold_falls_along_the_answer_and_never_stays_never() -> None:
    along = [decayed(0.5, 4.0, step, 10) for step in range(10)]
    assert along == sorted(along, reverse=True)
    assert along[0] == pytest.approx(0.55)
    assert {decayed(1.0, 4.0, step, 10) for step in range(10)} == {1.0}
    assert {decayed(0.5, 0.0, step, 10) for step in range(10)} == {0.5}


def calibrated(model: Any, weights: str) -> None:
    points = tuple(Point(delta=delta, threshold=threshold, mean_loss=0.0, mean_layers=2.0) for delta, threshold in ((0.01, 0.9), (0.05, 0.4)))
    settings = read_exits(model.config)
    assert settings is not None
    keep_settings(model, replace(settings, calibration=Calibration(weights=weights, epsilon=0.05, quality="accuracy", num_rows=9, points=points)))


def test_the_models_own_threshold_is_that_of_the_smallest_delta() -> None:
    model = exiting_model("qwen2", 4)
    calibrated(model, digest(model))
    prompts = random_prompts(4, 3, 5, model.config.vocab_size)
    own, given = (Engine(model).generate(prompts, decoding) for decoding in (Decoding(max_new_tokens=9), Decoding(max_new_tokens=9, exit_threshold=0.9)))
    assert [(row.tokens, row.layers) for row in own] == [(row.tokens, row.layers) for row in given]
    calibration = Calibration.read(model.config)
    assert calibration is not None
    assert [calibration.threshold(risk) for risk in (0.0, 0.01, 0.03, 0.05, 1.0)] == [1.0, 0.9, 0.9, 0.4, 0.4]


def test_a_threshold_that_was_calibrated_for_other_weights_is_refused() -> None:
    model = exiting_model("qwen2", 4)
    calibrated(model, digest(model))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="calibrated for other weights"):
        Engine(model).generate([[3, 4]], Decoding(max_new_tokens=2))
    assert Engine(model).generate([[3, 4]], Decoding(max_new_tokens=2, exit_threshold=0.5))  # a threshold of the caller's own promises nothing


def test_what_cannot_be_drafted_is_refused() -> None:
    model = exiting_model("qwen2", 4, layers=(2, 4))
    with pytest.raises(ValueError, match=r"after layers \[2, 4\]"):
        Engine(model).generate([[3]], Decoding(draft_tokens=2, draft_exit=2))
    model.config.exits = None
    with pytest.raises(ValueError, match="not there"):
        Engine(model).generate([[3]], Decoding(draft_tokens=2))
    with pytest.raises(ValueError, match="temperature"):
        Decoding(draft_tokens=2, temperature=1.0)


@pytest.mark.parametrize("kind", ["t5 v1.0", "t5 v1.1"])
def test_prompts_leave_the_encoder_where_its_gate_is_sure(kind: str) -> None:
    """Depths and tokens are those of transformers' generate from the states that were left with."""
    model = exiting_model(kind, 9, encoder_layers=(2, 4))
    prompts = random_prompts(9, 12, 9, model.config.vocab_size)
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            states = model.encoder(input_ids=tokens, output_hidden_states=True)
            encoded, depth = states.last_hidden_state, 6
            for place, layers in enumerate((2, 4)):
                read = model.exits.encoded(place, states.hidden_states[layers])
                if float(model.exits.encoder_gate(place, read, torch.ones_like(tokens).bool()).sigmoid()) > 0.6:
                    encoded, depth = read, layers
                    break
            made = model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=encoded), max_new_tokens=7, do_sample=False)
        expected.append((tuple(made[0, 1:].tolist()), depth))
    assert len({depth for _, depth in expected}) >= 2, "these prompts do not show what is tested; take another seed"
    for size in (1, 5):
        batch = Engine(model, max_batch_rows=size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rule, "may_leave", lambda self, place: False)  # of the decoder
            generated = batch.generate(prompts, Decoding(max_new_tokens=7, exit_threshold=0.6))
        assert [(row.tokens, row.encoder_layers) for row in generated] == expected
    full = Engine(model).generate(prompts, Decoding(max_new_tokens=7, exit_threshold=1.0))
    assert {row.encoder_layers for row in full} == {6}


def test_beams_go_the_whole_depth() -> None:
    model = exiting_model("t5 v1.1", 4)
    prompts = random_prompts(4, 3, 6, model.config.vocab_size)
    decoding = Decoding(max_new_tokens=6, num_beams=3, exit_threshold=0.0)
    found = Engine(model).generate(prompts, decoding)
    model.config.exits = None
    assert found == Engine(model).generate(prompts, decoding)
