"""A folder for CTranslate2 writes what the student writes. Extracted T5s are in tests/elastic/test_ctranslate2.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_models import logits, random_model, write
from transformers import AutoTokenizer, LlamaForCausalLM

from llmdistill.decode.engine import Decoding, Engine
from llmdistill.export.formats import CTranslate2, Numbers
from llmdistill.models.exit_settings import ExitSettings
from llmdistill.models.exits import add_exits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ctranslate2: Any = pytest.importorskip("ctranslate2")

GREEDY: dict[str, Any] = {"beam_size": 1, "return_scores": True, "length_penalty": 0.0}
HERE: dict[str, Any] = {"device": "cpu", "compute_type": "float32", "inter_threads": 1, "intra_threads": 1}


@pytest.mark.parametrize("name", ["llama", "llama tied", "llama with biases", "llama linear", "qwen2", "qwen2 tied"])
def test_a_causal_student_has_the_same_logits(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    CTranslate2().write(write(model, tmp_path / "student"), tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids_BL = torch.randint(3, 270, (2, 100), generator=torch.Generator().manual_seed(1))
    theirs = np.array(ctranslate2.Generator(str(tmp_path / "out"), **HERE).forward_batch([tokenizer.convert_ids_to_tokens(row.tolist()) for row in ids_BL]))
    np.testing.assert_allclose(theirs, logits(model).numpy(), atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"student", "out"}


@pytest.mark.parametrize("numbers", [Numbers.F32, Numbers.INT8])
@pytest.mark.parametrize("name", ["t5", "t5 gated"])
def test_a_t5_whose_heads_do_not_make_up_its_width_and_whose_exits_stay_behind(name: str, numbers: Numbers, tmp_path: Path) -> None:
    model = random_model(name)
    add_exits(model, ExitSettings(layers=(1,)))
    CTranslate2(numbers=numbers, leave_exits=True).write(write(model, tmp_path / "student"), tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompts = [[5, 9, 31, 7, 1], [40, 3, 1]]
    translator = ctranslate2.Translator(str(tmp_path / "out"), **HERE | {"compute_type": numbers.value})
    theirs = translator.translate_batch([tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts], max_decoding_length=8, **GREEDY)
    ours = Engine(model).generate(prompts, Decoding(max_new_tokens=8))
    exact = [result.hypotheses[0] == tokenizer.convert_ids_to_tokens(list(answer.tokens)) for answer, result in zip(ours, theirs, strict=True)]
    if numbers is Numbers.F32:
        assert all(exact)
        assert [result.scores[0] for result in theirs] == pytest.approx([answer.logprob_sum for answer in ours], rel=1e-3)
    sizes = [path.stat().st_size for path in (tmp_path / "out" / "model.bin", tmp_path / "student" / "model.safetensors")]
    assert (sizes[0] < 0.4 * sizes[1]) == (numbers is Numbers.INT8)


@pytest.mark.parametrize(
    "name, message",
    [
        ("llama llama3", "positions are of type 'llama3', and those that come out right are default, linear"),
        ("llama wide heads", "its 4 heads of width 32 do not make up the model width 64: use gguf"),
    ],
)
def test_what_comes_out_otherwise_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        CTranslate2().write(write(random_model(name), tmp_path / "student"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_activations_are_refused(tmp_path: Path) -> None:
    config = random_model("llama").config
    config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="the activation 'gelu'"):
        CTranslate2().write(write(LlamaForCausalLM(config).eval(), tmp_path / "student"), tmp_path / "out")
