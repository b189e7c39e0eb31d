"""An even sub-network of a T5 is stock enough for CTranslate2, and writes the same tokens there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_models import T5_SHAPE
from transformers import T5Config

from llmdistill.decode.engine import Decoding, Engine
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.extract import extract
from llmdistill.elastic.kept import keep
from llmdistill.elastic.measure import shape_of
from llmdistill.export.formats import CTranslate2
from llmdistill.models import checkpoint
from llmdistill.models.t5 import new_t5
from llmdistill.models.tokenizer import train_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ctranslate2: Any = pytest.importorskip("ctranslate2")

PROMPTS = ["a cat", "some more text", "7"]


@pytest.mark.parametrize("is_gated", [False, True])
def test_an_extracted_t5_converts_and_writes_the_same(is_gated: bool, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text of a cat"], 280, lower_case=False, ends_every_text=True)
    torch.manual_seed(0)
    form = {"feed_forward_proj": "gated-gelu" if is_gated else "relu", "tie_word_embeddings": not is_gated, "vocab_size": len(tokenizer), "eos_token_id": 1}
    model: Any = new_t5(T5Config(**T5_SHAPE | form)).eval()
    for name, parameter in model.named_parameters():
        if "relative" in name:
            torch.nn.init.normal_(parameter)
    space = Axes(ffn=(0.5,), heads=(0.5,), depth=(0.67,), width=(0.5,), even=True).space(shape_of(model), {"decoder": (2, 1, 0)})
    keep(model, space)
    checkpoint.save(model, tokenizer, tmp_path / "elastic", lineage=[], card="")
    extract(tmp_path / "elastic", "smallest", tmp_path / "small")

    CTranslate2().write(tmp_path / "small", tmp_path / "converted")
    translator = ctranslate2.Translator(str(tmp_path / "converted"), device="cpu", compute_type="float32", inter_threads=1, intra_threads=1)
    ids = tokenizer(PROMPTS)["input_ids"]
    theirs = translator.translate_batch(
        [tokenizer.convert_ids_to_tokens(prompt) for prompt in ids], beam_size=1, max_decoding_length=6, return_scores=True, length_penalty=0.0
    )
    small, _ = checkpoint.load(tmp_path / "small")
    ours = Engine(small).generate(ids, Decoding(max_new_tokens=6))
    for answer, result in zip(ours, theirs, strict=True):
        assert result.hypotheses[0] == tokenizer.convert_ids_to_tokens(list(answer.tokens))
        assert result.scores[0] == pytest.approx(answer.logprob_sum, rel=1e-3)  # 1e-4 apart, as the whole model is
