"""Law: what is loaded computes what was saved, bitwise; what could not be loaded is not written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BertConfig, BertForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from llmdistill.core.artifacts import Checkpoint
from llmdistill.models.checkpoint import load, save
from llmdistill.models.t5 import head_is_tied

Build = Callable[[str], PreTrainedModel]
Logits = Callable[[PreTrainedModel], torch.Tensor]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_bitwise(model: Any, dtype: torch.dtype, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = model.to(dtype)
    save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded, loaded_tokenizer = load(tmp_path)
    assert type(loaded) is type(model)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert head_is_tied(loaded) == head_is_tied(model)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert loaded_tokenizer("hello").input_ids == tokenizer("hello").input_ids


def test_a_plain_model_is_a_stock_folder(model: PreTrainedModel, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    save(model, tokenizer, tmp_path / "ours", lineage=[], card="")
    model.save_pretrained(tmp_path / "stock")
    ours, stock = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "stock"))
    assert ours["model_type"] in ("t5", "llama", "qwen2")
    assert ours == stock
    ours, stock = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "stock"))
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], stock[name]) for name in ours)
    auto_class: Any = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    assert torch.equal(logits(auto_class.from_pretrained(str(tmp_path / "ours"))), logits(model))


def test_an_untied_t5_stays_untied_whatever_happens_to_it(build_model: Build, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = build_model("t5 v1.1")
    expected = logits(model)
    for generation in ("first", "second"):
        model.tie_weights()
        save(model, tokenizer, tmp_path / generation, lineage=[], card="")
        model, _ = load(tmp_path / generation)
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["scale_decoder_outputs"]) == (False, False)  # what other tools read
    assert torch.equal(logits(model), expected)
    head: Any = model.get_output_embeddings()
    assert head.weight is not model.get_input_embeddings().weight


def test_a_causal_model_whose_head_was_untied_is_saved_as_untied(
    build_model: Build, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model: Any = build_model("llama tied")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded, _ = load(tmp_path)
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(logits(loaded), logits(model))


def test_the_folder_is_plain_files_and_the_artifact_reads_them(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    lineage = [{"technique": "distil", "rationale_weight": 0.5}, {"technique": "svd", "note": "préservé"}]
    save(model, tokenizer, tmp_path, lineage=lineage, card="# A student\n")
    names = {file.name for file in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md", "lineage.json"} <= names
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".md"}
    assert Checkpoint(tmp_path).lineage() == lineage
    assert Checkpoint(tmp_path).model_card() == "# A student\n"
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_another_dtype_can_be_asked_for(build_model: Build, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    save(build_model("t5 v1.0"), tokenizer, tmp_path, lineage=[], card="")
    loaded, _ = load(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_view_of_a_larger_tensor_is_saved_alone(build_model: Build, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model: Any = build_model("llama untied")
    larger = torch.cat([model.lm_head.weight.detach(), torch.zeros(1000, 16)])
    model.lm_head.weight = torch.nn.Parameter(larger[:96])
    save(model, tokenizer, tmp_path, lineage=[], card="")
    assert (tmp_path / "model.safetensors").stat().st_size < larger.nbytes
    assert torch.equal(logits(load(tmp_path)[0]), logits(model))


PEFT_READS_A_DEPRECATED_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def _with_lora(model: PreTrainedModel) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q", "v"]))


@PEFT_READS_A_DEPRECATED_NAME
def test_refuses_what_could_not_be_loaded_again_and_writes_nothing(build_model: Build, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    narrowed: Any = build_model("llama tied")
    narrowed.model.layers[0].mlp.up_proj = torch.nn.Linear(16, 20, bias=False)
    mixed: Any = build_model("t5 v1.0")
    mixed.encoder.final_layer_norm.bfloat16()
    adapted = _with_lora(build_model("t5 v1.0"))
    for model, message in (
        (BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)), "BertForMaskedLM cannot"),
        (adapted, "merge adapters"),
        (adapted.base_model.model, "merge adapters"),
        (narrowed, r"up_proj.weight has shape \(20, 16\)"),
        (mixed, "cast the whole model to one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            save(model, tokenizer, tmp_path / "out", lineage=[], card="")
    assert not (tmp_path / "out").exists()


@PEFT_READS_A_DEPRECATED_NAME
def test_a_merged_adapter_saves_as_a_plain_model(build_model: Build, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    adapted = _with_lora(build_model("t5 v1.1"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    merged: Any = adapted.merge_and_unload()
    save(merged, tokenizer, tmp_path, lineage=[], card="")
    assert torch.equal(logits(load(tmp_path)[0]), logits(merged))


@pytest.mark.parametrize("damage", ["missing", "left over"])
def test_refuses_tensors_that_do_not_fit(damage: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    save(model, tokenizer, tmp_path, lineage=[], card="")
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if "layer_norm" in name or "layernorm" in name)
    if damage == "missing":
        del tensors[name]
    else:
        tensors["another.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing keys" if damage == "missing" else "1 unexpected keys such as another.weight"):
        load(tmp_path)


def test_refuses_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load(tmp_path)
