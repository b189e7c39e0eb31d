"""Losses: sums are those of transformers' own forward pass in float64, part by part, and do not depend on padding or on the form of a batch."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from llmdistill.batches import Example, collate
from llmdistill.losses.multitask import Form, LabelOnly, Lesson, Multitask, RationaleOnly
from llmdistill.losses.prompts import EXPLAIN, PREDICT, Prompts
from llmdistill.models.tokenizer import train_tokenizer

LESSONS = [
    Lesson(input="where is it", label="late", rationale="it has not come"),
    Lesson(input="my lamp is in pieces, all four of them", label="broken", rationale="the lamp broke on its way here"),
    Lesson(input="stop", label="cancel", rationale=""),
]
LIMITS = {"max_input_tokens": 64, "max_target_tokens": 32}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([text for lesson in LESSONS for text in (lesson.input, lesson.label)], 280, lower_case=False, ends_every_text=True)


@pytest.fixture(scope="module")
def causal_tokenizer() -> Any:
    return train_tokenizer([text for lesson in LESSONS for text in (lesson.input, lesson.label)], 280, lower_case=False, ends_every_text=False)


def t5(tokenizer: Any, **settings: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=4,
        num_heads=3,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=1,
        decoder_start_token_id=0,  # pyright: ignore[reportCallIssue] - a field of every config
        pad_token_id=0,
        eos_token_id=1,
    )
    for name, value in settings.items():
        setattr(config, name, value)
    return T5ForConditionalGeneration(config).double().eval()


def causal(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        num_hidden_layers=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).double().eval()


def by_hand(model: Any, examples: list[Example], num_parts: int) -> torch.Tensor:
    """One pair at a time through transformers, without any padding."""
    sums_P = torch.zeros(num_parts, dtype=torch.float64)
    for pair in (pair for example in examples for pair in example):
        target_T = torch.from_numpy(pair.target.astype(np.int64))
        input_L = torch.from_numpy(pair.input.astype(np.int64))
        if model.config.is_encoder_decoder:
            decoder_input = torch.cat([torch.tensor([pair.start]), target_T[:-1]])
            logits = model(input_ids=input_L[None], decoder_input_ids=decoder_input[None]).logits[0]
        else:
            logits = model(input_ids=torch.cat([input_L, target_T])[None]).logits[0, len(input_L) - 1 : -1]
        sums_P[pair.part] += F.cross_entropy(logits, target_T, reduction="sum")
    return sums_P.detach()


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize(
    "settings", [{}, {"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new", "scale_decoder_outputs": False}]
)
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_sums_are_those_of_transformers(tokenizer: Any, form: Form, settings: dict[str, Any], multiple_of: int) -> None:
    model, loss = t5(tokenizer, **settings), Multitask(form=form)
    examples = loss.examples(LESSONS, tokenizer, model.config, **LIMITS)
    batch = collate(examples, causal=False, multiple_of=multiple_of)
    torch.testing.assert_close(loss.sums_P(model, batch).double(), by_hand(model, examples, 2), rtol=1e-6, atol=0)
    assert loss.counts_P(batch).tolist() == [sum(len(pair.target) for example in examples for pair in example if pair.part == part) for part in (0, 1)]


def test_sums_of_a_causal_student_are_those_of_transformers(causal_tokenizer: Any) -> None:
    model, loss = causal(causal_tokenizer), Multitask()
    examples = loss.examples(LESSONS, causal_tokenizer, model.config, **LIMITS)
    torch.testing.assert_close(loss.sums_P(model, collate(examples, causal=True)).double(), by_hand(model, examples, 2), rtol=1e-6, atol=0)


def test_the_halves_add_up_to_the_whole(tokenizer: Any) -> None:
    model = t5(tokenizer)
    sums = []
    for loss in (LabelOnly(), RationaleOnly()):
        examples = loss.examples(LESSONS, tokenizer, model.config, **LIMITS)
        sums.append(loss.sums_P(model, collate(examples, causal=False)))
        assert loss.weights == (1.0,)
    both = Multitask(rationale_weight=0.25)
    assert both.weights == (1.0, 0.25)
    examples = both.examples(LESSONS, tokenizer, model.config, **LIMITS)
    torch.testing.assert_close(both.sums_P(model, collate(examples, causal=False)), torch.cat(sums))


def test_the_shared_encoder_reads_each_text_once(tokenizer: Any) -> None:
    model = t5(tokenizer)
    rows = {form: len(collate(Multitask(form=form).examples(LESSONS, tokenizer, model.config, **LIMITS), causal=False).input_EL) for form in Form}
    assert rows == {Form.TWO_PASS: 5, Form.SHARED_ENCODER: 3}  # the third row has no rationale


def test_what_is_learned_is_what_will_be_asked(tokenizer: Any, causal_tokenizer: Any) -> None:
    for form, model, own in (
        (Form.TWO_PASS, t5(tokenizer), tokenizer),
        (Form.SHARED_ENCODER, t5(tokenizer), tokenizer),
        (Form.TWO_PASS, causal(causal_tokenizer), causal_tokenizer),
    ):
        loss = Multitask(form=form)
        prompts = Prompts.from_config(loss.prompts(model.config).to_config())
        example = loss.examples(LESSONS, own, model.config, **LIMITS)[0]
        for pair, task, text in zip(example, (PREDICT, EXPLAIN), ("late", "it has not come"), strict=True):
            assert pair.input.tolist() == own(prompts.text(task, LESSONS[0].input))["input_ids"]
            assert own.decode(pair.target[:-1]) == text
            assert pair.target[-1] == own.eos_token_id
            assert pair.start == prompts.decoder_start_token_ids.get(task, 0)


def test_label_smoothing_is_of_training_only(tokenizer: Any) -> None:
    model = t5(tokenizer)
    model.config.dropout_rate = 0.0
    model = T5ForConditionalGeneration(model.config).double()
    plain, smooth = LabelOnly(), LabelOnly(label_smoothing=0.3)
    batch = collate(plain.examples(LESSONS, tokenizer, model.config, **LIMITS), causal=False)
    assert smooth.sums_P(model.eval(), batch) == plain.sums_P(model, batch)
    assert smooth.sums_P(model.train(), batch) != plain.sums_P(model, batch)


def test_long_rows_are_cut_and_said_to_be(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = t5(tokenizer)
    example = Multitask().examples(LESSONS[1:2], tokenizer, model.config, max_input_tokens=5, max_target_tokens=4)[0]
    assert [len(pair.input) for pair in example] == [5, 5]
    assert [pair.input[-1] for pair in example] == [1, 1]
    assert len(example[1].target) == 4
    assert example[1].target[-1] != 1
    assert "max_input_tokens" in caplog.text
    assert "max_target_tokens" in caplog.text


def test_wrong_settings_are_refused(causal_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="rationale_weight is 0"):
        Multitask(rationale_weight=0)
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.0"):
        LabelOnly(label_smoothing=1.0)
    with pytest.raises(ValueError, match="needs an encoder"):
        Multitask(form=Form.SHARED_ENCODER).examples(LESSONS, causal_tokenizer, causal(causal_tokenizer).config, **LIMITS)
