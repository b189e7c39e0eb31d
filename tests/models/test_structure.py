"""Law: whatever is replaced and however tensors are shared, what is loaded computes what was saved, bitwise, from data alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmdistill.models import structure
from llmdistill.models.checkpoint import load, save
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.register import register
from llmdistill.models.structure import install, structure_of, ties_of

Build = Callable[[str], PreTrainedModel]
Logits = Callable[[PreTrainedModel], torch.Tensor]
Factorise = Callable[..., list[str]]


class Int8Linear(nn.Module):
    """A kind with tensors whose dtypes are its format: int8 weights as a buffer, float32 scales as a parameter."""

    kind: ClassVar[str] = "int8 of this test"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().float()
        scale_O = weight_OI.abs().amax(1) / 127 if not weight_OI.is_meta else torch.empty(len(weight_OI), device="meta")
        self.register_buffer("int8_OI", (weight_OI / scale_O[:, None]).round().to(torch.int8))
        self.scale_O = nn.Parameter(scale_O.float())
        self.weight = linear.weight.detach()[:0]  # T5 asks `wo` for its dtype

    @classmethod
    def from_settings(cls, settings: Any, replaced: nn.Module) -> Int8Linear:
        assert isinstance(replaced, nn.Linear)
        return cls(replaced)

    def settings(self) -> dict[str, int]:
        return {}

    def forward(self, hidden_BLI: torch.Tensor) -> torch.Tensor:
        int8_OI: Any = self.int8_OI
        return (hidden_BLI.float() @ (int8_OI.float() * self.scale_O[:, None]).T).to(hidden_BLI.dtype)


@pytest.fixture(autouse=True)
def _int8_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.setattr(structure, "KINDS", (*structure.KINDS, Int8Linear))


def auto_load(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    auto_class: Any = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_pretrained(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaced_linears_load_bitwise_through_the_auto_classes(
    model: Any, dtype: torch.dtype, factorise: Factorise, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    plain = logits(model)
    paths = factorise(model)
    model = model.to(dtype)
    save(model, tokenizer, tmp_path, lineage=[], card="")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["structure"] == {path: {"kind": "low_rank", "rank": 3} for path in paths}
    assert config["model_type"] == f"llmdistill_{model.config.model_type}"
    assert "auto_map" not in config
    for loaded in (load(tmp_path)[0], auto_load(tmp_path, model)):
        assert isinstance(loaded, type(model))
        assert structure_of(loaded) == config["structure"]
        assert ties_of(loaded) == ties_of(model)
        assert torch.equal(logits(loaded), logits(model))
        assert not torch.equal(logits(loaded), plain)
    assert AutoTokenizer.from_pretrained(str(tmp_path))("hello").input_ids == tokenizer("hello").input_ids


def test_a_loaded_one_is_saved_again_by_us_and_by_transformers(
    model: PreTrainedModel, factorise: Factorise, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    factorise(model, lambda path: "0" in path)
    save(model, tokenizer, tmp_path / "first", lineage=[], card="")
    loaded, _ = load(tmp_path / "first")
    factorise(loaded, lambda path: "1" in path and "lm_head" not in path)  # the structure grows after loading
    save(loaded, tokenizer, tmp_path / "ours", lineage=[], card="")
    loaded.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        assert torch.equal(logits(auto_load(tmp_path / name, model)), logits(loaded))


def test_a_structure_that_is_undone_is_a_stock_folder_again(
    build_model: Build, factorise: Factorise, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = build_model("t5 v1.1")
    factorise(model)
    save(model, tokenizer, tmp_path / "structured", lineage=[], card="")
    loaded: Any = load(tmp_path / "structured")[0]
    for path in structure_of(loaded):
        factors: Any = loaded.get_submodule(path)
        dense = nn.Linear(factors.in_features, factors.out_features, bias=False)
        dense.weight = nn.Parameter((factors.up.weight @ factors.down.weight).detach())
        loaded.set_submodule(path, dense)
    save(loaded, tokenizer, tmp_path / "dense", lineage=[], card="")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "t5"
    dense_again, _ = load(tmp_path / "dense")
    assert torch.equal(logits(dense_again), logits(loaded))
    torch.testing.assert_close(logits(dense_again), logits(model), rtol=1e-4, atol=1e-4)


def test_the_head_can_be_replaced_tied_or_not(
    model: PreTrainedModel, factorise: Factorise, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    factorise(model, lambda path: path == "lm_head")
    save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded = auto_load(tmp_path, model)
    loaded.tie_weights()
    assert isinstance(loaded.get_output_embeddings(), LowRankLinear)
    assert torch.equal(logits(loaded), logits(model))


def test_kinds_nest_and_keep_the_dtypes_of_their_format(
    model: Any, factorise: Factorise, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = model.to(torch.bfloat16)
    for path in factorise(model):
        for factor in ("down", "up"):
            inner: Any = model.get_submodule(f"{path}.{factor}")
            if inner.bias is None:
                model.set_submodule(f"{path}.{factor}", Int8Linear(inner))
    save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded = auto_load(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.int8, torch.float32}
    assert all(torch.equal(loaded.state_dict()[name], tensor) and loaded.state_dict()[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert torch.equal(logits(loaded), logits(model))


def test_shared_tensors_are_stored_once_and_stay_shared(
    model: PreTrainedModel, factorise: Factorise, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """As a joint factorisation of query, key and value does, and as whole layers can."""
    paths = [path for path in factorise(model) if path.endswith(("q", "k", "v", "q_proj", "k_proj", "v_proj"))]
    attention = paths[0].rpartition(".")[0]
    shared = [path for path in paths if path.startswith(attention)]
    first, *others = [model.get_submodule(path) for path in shared]
    for other in others:
        other.down = first.down
    save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded = auto_load(tmp_path, model)
    loaded.tie_weights()
    assert load_file(tmp_path / "model.safetensors").keys() & {f"{path}.down.weight" for path in shared} == {f"{shared[0]}.down.weight"}
    assert ties_of(loaded) == ties_of(model)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    assert torch.equal(logits(loaded), logits(model))


def test_layers_shared_without_any_replacement_are_structure_too(
    build_model: Build, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model: Any = build_model("llama untied")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    save(model, tokenizer, tmp_path, lineage=[], card="")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["structure"]) == ("llmdistill_llama", {})
    loaded: Any = auto_load(tmp_path, model)
    assert loaded.model.layers[1].mlp.up_proj.weight is loaded.model.layers[0].mlp.up_proj.weight
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_generates_with_one_and_its_weights_learn(
    model: PreTrainedModel, factorise: Factorise, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    factorise(model)
    save(model, tokenizer, tmp_path, lineage=[], card="")
    ids_BL = torch.tensor([[5, 6, 7]])
    # No cache: transformers' generate makes one of num_layers layers, too short where the decoder is deeper than the encoder.
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    loaded: Any = auto_load(tmp_path, model)
    assert torch.equal(loaded.generate(ids_BL, generation_config=settings), model.generate(ids_BL, generation_config=settings))  # pyright: ignore
    loaded(input_ids=ids_BL, labels=ids_BL).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


@pytest.mark.parametrize("damage", ["missing", "left over"])
def test_the_auto_classes_refuse_tensors_that_do_not_fit(
    damage: str, model: PreTrainedModel, factorise: Factorise, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = factorise(model)[0]
    save(model, tokenizer, tmp_path, lineage=[], card="")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{path}.weight"] = tensors.pop(f"{path}.up.weight") if damage == "missing" else torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config\.json"):
        auto_load(tmp_path, model)


@pytest.mark.parametrize(
    "path, settings, message",
    [
        ("encoder.block.0", {"kind": "butterfly"}, "kind 'butterfly' at 'encoder.block.0'.*upgrade"),
        ("encoder.block.9", {"kind": "low_rank", "rank": 2}, "no such module"),
        ("encoder.block.0", {"kind": "low_rank", "rank": 2}, "does not fit at 'encoder.block.0': .*T5Block"),
        ("lm_head", {"kind": "low_rank", "rank": 17}, "does not fit at 'lm_head': rank is 17"),
    ],
)
def test_a_structure_that_does_not_fit_says_where(build_model: Build, path: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        install(build_model("t5 v1.0"), {path: settings})
