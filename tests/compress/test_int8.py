"""Laws: bitwise when loaded again, tied what was tied, as small on disk as it says, decoded as transformers decodes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_models import MODELS, VOCABULARY_SIZE, calibration, drift, logits, tiny
from safetensors.torch import load_file
from transformers import GenerationConfig

from llmdistill.compress.int8 import Int8
from llmdistill.compress.slots import leaves
from llmdistill.compress.svd import SVD, Scope
from llmdistill.core.spec import parse, write
from llmdistill.decode.engine import Decoding, Engine
from llmdistill.models import checkpoint
from llmdistill.models.int8_embedding import Int8Embedding
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.tokenizer import train_tokenizer

ANY_RISE = 1e6
PATHS_OF_TABLE = ("shared.table", "encoder.embed_tokens.table", "decoder.embed_tokens.table")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["hello world"], 300, lower_case=False, ends_every_text=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_is_saved_and_loaded_bitwise_and_its_bytes_are_those_on_disk(name: str, dtype: torch.dtype, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(name, dtype)
    dense = logits(model)
    applied = Int8(max_loss_rise=ANY_RISE).apply(model, calibration())
    assert {layer.kind for layer in applied.layers} == {"int8", "int8_embedding"}
    assert 0 < (logits(model) - dense).norm() < 0.1 * dense.norm()
    checkpoint.save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded, _ = checkpoint.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.dtype == dtype
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == sum(parameter.nbytes for parameter in model.parameters())
    weights = [tensor for tensor in tensors.values() if tensor.ndim == 2]
    assert all(tensor.dtype == torch.int8 for tensor in weights if tensor.shape[0] > 32), "all but T5's table of relative positions"
    is_tied = "tied" in name or name in ("t5 v1.0", "qwen2")
    assert sum(tensor.shape[0] == VOCABULARY_SIZE and tensor.ndim == 2 for tensor in tensors.values()) == (1 if is_tied else 2)


@pytest.mark.parametrize("name", ["t5 v1.0", "qwen2"])
def test_in_another_dtype_integers_and_scales_are_the_same(name: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(name)
    Int8(max_loss_rise=ANY_RISE).apply(model, calibration())
    checkpoint.save(model, tokenizer, tmp_path, lineage=[], card="")
    other = checkpoint.load(tmp_path, dtype=torch.bfloat16)[0]
    assert logits(other).dtype == torch.bfloat16
    state = model.state_dict()
    for tensor_name, tensor in other.state_dict().items():
        if tensor_name.endswith("scale_O") or tensor.dtype == torch.int8:
            assert torch.equal(tensor, state[tensor_name])


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_writes_the_tokens_of_transformers(name: str) -> None:
    model = tiny(name)
    Int8(max_loss_rise=ANY_RISE).apply(model, calibration())
    model.generation_config = GenerationConfig(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    prompts = torch.randint(3, VOCABULARY_SIZE, (5, 8), generator=torch.Generator().manual_seed(2))
    theirs = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False)
    theirs = theirs[:, 1:] if model.config.is_encoder_decoder else theirs[:, prompts.shape[1] :]
    for generated, row in zip(Engine(model).generate(prompts.tolist(), Decoding(max_new_tokens=8)), theirs.tolist(), strict=True):
        until_end = row[: row.index(1)] if 1 in row else row
        assert list(generated.tokens) == until_end


@pytest.mark.parametrize("name", ["t5 v1.0", "llama"])
def test_quantizes_the_factors_of_low_rank_linears_and_a_shared_one_once(name: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(name)
    q, k = [path for path, _, _ in leaves(model)][:2]
    for path in (q, k):
        linear: Any = model.get_submodule(path)
        bias_O = None if linear.bias is None else linear.bias.detach()
        model.set_submodule(path, LowRankLinear.from_factors(torch.randn(linear.out_features, 8), torch.randn(8, linear.in_features) / 8, bias_O))
    model.get_submodule(k).down.weight = model.get_submodule(q).down.weight
    Int8(max_loss_rise=ANY_RISE).apply(model, calibration())
    assert type(model.get_submodule(f"{q}.up")) is Int8Linear
    assert model.get_submodule(k).down.weight is model.get_submodule(q).down.weight
    checkpoint.save(model, tokenizer, tmp_path, lineage=[], card="")
    assert torch.equal(logits(checkpoint.load(tmp_path)[0]), logits(model))


@pytest.mark.parametrize("name", ["t5 v1.0", "t5 v1.1", "llama tied", "llama"])
def test_a_low_rank_embedding_becomes_int8_with_the_head_that_is_tied_to_it(name: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(name)
    SVD(keep=0.5, scope=(Scope.EMBEDDINGS,)).apply(model, calibration())
    before = logits(model)
    applied = Int8(max_loss_rise=ANY_RISE).apply(model, calibration())
    table = model.get_input_embeddings().table
    assert type(table) is Int8Embedding
    assert (model.lm_head.up.weight is table.weight) == (model.lm_head.up.scale_O is table.scale_O) == (name in ("t5 v1.0", "llama tied"))
    assert 0 < (logits(model) - before).norm() < 0.1 * before.norm()
    checkpoint.save(model, tokenizer, tmp_path, lineage=[], card="")
    assert torch.equal(logits(checkpoint.load(tmp_path)[0]), logits(model))
    dense = {layer.path for layer in applied.layers if layer.kind == "kept"}
    assert dense == ({"lm_head.down"} if name in ("t5 v1.0", "llama tied") else set()), "the projection is the embedding's as well"


def test_what_is_int8_already_is_not_quantized_again() -> None:
    model = tiny("t5 v1.1")
    Int8(max_loss_rise=ANY_RISE).apply(model, calibration())
    with pytest.raises(ValueError, match="int8 replaces plain linears, and this model has none left"):
        Int8().apply(model, calibration())


def test_parts_can_be_left_alone() -> None:
    model = tiny("t5 v1.1")
    applied = Int8(head=False, embedding=False, keep=("*wo",), max_loss_rise=ANY_RISE).apply(model, calibration())
    kept = {layer.path for layer in applied.layers if layer.kind == "kept"}
    assert kept == {path for path, _, _ in leaves(tiny("t5 v1.1")) if path.endswith("wo") or path == "lm_head"}
    assert type(model.get_input_embeddings()) is torch.nn.Embedding


def test_is_written_as_one_word() -> None:
    method = Int8(keep=("*wo",), max_loss_rise=0.5)
    assert parse(write(method), (Int8,)) == method
    with pytest.raises(ValueError, match=r"Int8.max_loss_rise is -1"):
        Int8(max_loss_rise=-1)


def test_a_sensitive_low_rank_embedding_stays_as_it_was_in_all_its_places() -> None:
    model = tiny("t5 v1.0")
    SVD(keep=0.5, scope=(Scope.EMBEDDINGS,)).apply(model, calibration())
    applied = Int8(max_loss_rise=0.0).apply(model, drift(model))
    assert {path for path in PATHS_OF_TABLE if type(model.get_submodule(path)) is torch.nn.Embedding} == set(PATHS_OF_TABLE)
    assert set(PATHS_OF_TABLE) <= {layer.path for layer in applied.layers if layer.kind == "kept"}
