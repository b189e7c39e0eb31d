"""Tiny random models of every architecture that students can have, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, T5Config

from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.t5 import new_t5
from llmdistill.models.tokenizer import train_tokenizer

VOCABULARY_SIZE = 96
IDS = {"vocab_size": VOCABULARY_SIZE, "pad_token_id": 0, "eos_token_id": 1}
T5_SHAPE: dict[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0, **IDS}
CAUSAL_SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    **IDS,
}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5 v1.0": lambda: new_t5(T5Config(**T5_SHAPE | {"feed_forward_proj": "relu", "tie_word_embeddings": True})),
    "t5 v1.1": lambda: new_t5(T5Config(**T5_SHAPE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})),
    "t5 gated tied, 1 + 2 layers": lambda: new_t5(
        T5Config(**T5_SHAPE | {"num_layers": 1, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": True})
    ),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL_SHAPE, tie_word_embeddings=True)),
    "llama untied": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL_SHAPE, tie_word_embeddings=False)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**CAUSAL_SHAPE, tie_word_embeddings=True)),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each of the models in turn."""
    return build(request.param)


@pytest.fixture
def build_model() -> Callable[[str], PreTrainedModel]:
    """A model by name."""
    return build


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # Qwen2's start at zero, which would hide a lost one
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def logits() -> Callable[[PreTrainedModel], torch.Tensor]:
    """The model's logits on some rows, one of them padded."""

    def of(model: PreTrainedModel) -> torch.Tensor:
        ids_BL = torch.randint(2, VOCABULARY_SIZE, (3, 7), generator=torch.Generator().manual_seed(1))
        mask_BL = torch.ones_like(ids_BL)
        mask_BL[1, 4:] = 0
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids_BL[:, :5]
        with torch.inference_mode():
            return model(**inputs).logits

    return of


@pytest.fixture
def factorise() -> Callable[..., list[str]]:
    """Puts random low-rank linears in the place of a model's linears (those whose path the argument accepts) and returns their paths."""

    def replace(model: PreTrainedModel, accept: Callable[[str], bool] = lambda path: "lm_head" not in path, rank: int = 3) -> list[str]:
        generator = torch.Generator().manual_seed(2)
        paths = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear) and accept(path)]
        for path in paths:
            linear: Any = model.get_submodule(path)
            up_OR, down_RI = torch.randn(linear.out_features, rank, generator=generator), torch.randn(rank, linear.in_features, generator=generator) / 8
            bias_O = None if linear.bias is None else linear.bias.detach()
            model.set_submodule(path, LowRankLinear.from_factors(up_OR, down_RI, bias_O).to(linear.weight.dtype))
        return paths

    return replace


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["hello world"], 300, lower_case=False, ends_every_text=True)
