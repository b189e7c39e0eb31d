"""A GGUF holds the student: transformers reads the same logits out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from dense_models import MODELS, logits, random_model, tokenizer, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdistill.export.formats import GGUF, Blocks
from llmdistill.export.gguf_file import interleaved
from llmdistill.models import checkpoint
from llmdistill.models.exit_settings import ExitSettings
from llmdistill.models.exits import add_exits

CAUSAL = [name for name in MODELS if not name.startswith("t5")]
READ_ALONE = {"llama", "llama tied", "llama wide heads", "qwen2", "qwen2 tied"}
"""Of the others transformers reads the tensors, but not the settings: it takes no biases and no scaled positions from a GGUF."""


def read(path: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **settings)


@pytest.mark.parametrize("name", CAUSAL)
def test_what_is_read_back_has_the_same_logits(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    GGUF().write(write(model, tmp_path / "student"), tmp_path / "out" / "student.gguf")
    again = read(tmp_path / "out" / "student.gguf", **({} if name in READ_ALONE else {"config": model.config}))
    assert torch.equal(logits(again), logits(model))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["student.gguf"]


@pytest.mark.parametrize("numbers", [Blocks.F16, Blocks.BF16, Blocks.Q8_0])
def test_matrices_are_rounded_once_and_nothing_else_is(numbers: Blocks, tmp_path: Path) -> None:
    model = random_model("llama")
    GGUF(numbers=numbers).write(write(model, tmp_path / "student"), tmp_path / "student.gguf")
    kind = gguf.GGMLQuantizationType[numbers.name]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], 0)
                rounded = gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), kind), kind)  # rows are rounded one by one, in whatever order
                assert heads == 0 or not np.array_equal(interleaved(rounded, heads), rounded)
                parameter.copy_(torch.from_numpy(rounded.astype(np.float32)))
    assert torch.equal(logits(read(tmp_path / "student.gguf")), logits(model))


def test_the_rotary_factors_are_by_how_much_slower_channels_turn(tmp_path: Path) -> None:
    model = random_model("llama llama3")
    GGUF().write(write(model, tmp_path / "student"), tmp_path / "student.gguf")
    factors = next(tensor.data for tensor in gguf.GGUFReader(tmp_path / "student.gguf").tensors if tensor.name == "rope_freqs.weight")
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(8)
    assert (np.diff(factors) > -1e-5).all()
    exponents = np.arange(8) / 8
    np.testing.assert_allclose(1e4**-exponents / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)


def test_settings_and_stop_tokens_are_said(tmp_path: Path) -> None:
    model = random_model("llama linear")
    model.generation_config.eos_token_id = [1, 5]
    GGUF(numbers=Blocks.F16).write(write(model, tmp_path / "student"), tmp_path / "student.gguf")
    fields = gguf.GGUFReader(tmp_path / "student.gguf").fields
    said = {name: field.contents() for name, field in fields.items() if len(field.data) == 1}
    assert said["general.name"] == "student"
    assert (said["llama.rope.scaling.type"], said["llama.rope.scaling.factor"], said["llama.rope.freq_base"]) == ("linear", 2.0, 1000.0)
    assert (said["tokenizer.ggml.eos_token_id"], said["tokenizer.ggml.eot_token_id"], said["tokenizer.ggml.padding_token_id"]) == (1, 5, 0)
    assert "tokenizer.ggml.bos_token_id" not in said
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16


def test_a_model_of_our_class_is_written_where_all_it_has_is_ties(tmp_path: Path) -> None:
    model = random_model("llama tied")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    write(model, tmp_path / "student")
    assert type(checkpoint.load(tmp_path / "student")[0]).__name__ == "StructuredLlamaForCausalLM"
    GGUF().write(tmp_path / "student", tmp_path / "student.gguf")
    assert torch.equal(logits(read(tmp_path / "student.gguf")), logits(model))


@pytest.mark.parametrize("name", ["llama", "qwen2 tied"])
def test_exits_stay_behind_where_that_is_asked_for(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    add_exits(model, ExitSettings(layers=(1,), adapter_rank=4, num_vocabulary=3, has_gates=True), (5, 9, 7))
    write(model, tmp_path / "student")
    with pytest.raises(ValueError, match="early exits, which would stay behind"):
        GGUF().write(tmp_path / "student", tmp_path / "student.gguf")
    GGUF(leave_exits=True).write(tmp_path / "student", tmp_path / "student.gguf")
    assert torch.equal(logits(read(tmp_path / "student.gguf")), logits(model))


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    model = random_model("llama")
    folder = write(model, tmp_path / "student")
    with pytest.raises(ValueError, match=r"end its name in \.gguf"):
        GGUF().write(folder, tmp_path / "student.bin")
    model.config.intermediate_size = 40
    small = random_model("llama with biases")
    with torch.no_grad():
        small.model.norm.weight[0] = 1e5  # which stays float32
        small.lm_head.weight[3, 4] = 1e5
    with pytest.raises(ValueError, match=r"output.weight has numbers up to 100000, and F16 ends at 65504: use gguf:BF16"):
        GGUF(numbers=Blocks.F16).write(write(small, tmp_path / "large"), tmp_path / "large.gguf")
    assert not (tmp_path / "large.gguf").exists()
    GGUF(numbers=Blocks.BF16).write(tmp_path / "large", tmp_path / "large.gguf")
    many = random_model("qwen2")
    many.generation_config.eos_token_id = [1, 5, 6, 7]
    with pytest.raises(ValueError, match=r"stops at the tokens \[1, 5, 6, 7\].*room for 3"):
        GGUF().write(write(many, tmp_path / "many"), tmp_path / "many.gguf")


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    GGUF().write(write(random_model("qwen2"), tmp_path / "student"), tmp_path / "student.gguf")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path, gguf_file="student.gguf"), tokenizer()
    for text in ("some cat sat", "ünï 東京 🙂 a  b\n\n c", "that mat isn't mine"):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert (theirs.eos_token, theirs.pad_token) == ("</s>", "<pad>")
