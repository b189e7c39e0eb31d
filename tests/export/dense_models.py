"""Tiny random models of stock classes, written as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, T5Config

from llmdistill.models import checkpoint
from llmdistill.models.t5 import new_t5
from llmdistill.models.tokenizer import train_tokenizer

TEXTS = ["some text of a cat that sat on the mat", "it was 7 in the morning"]
VOCABULARY_SIZE = 290
IDS: dict[str, Any] = {"vocab_size": VOCABULARY_SIZE, "pad_token_id": 0, "eos_token_id": 1}
CAUSAL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **IDS}
CAUSAL |= {"bos_token_id": None, "max_position_embeddings": 512, "initializer_range": 0.2}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_heads": 3, "num_layers": 2, "decoder_start_token_id": 0, **IDS}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
LINEAR = {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

MODELS = {
    "t5": lambda: new_t5(T5Config(**T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": True})),
    "t5 gated": lambda: new_t5(T5Config(**T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL, rope_parameters={"rope_type": "default", "rope_theta": 1e3})),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL, tie_word_embeddings=True)),
    "llama wide heads": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL, head_dim=32)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL, attention_bias=True, mlp_bias=True)),
    "llama linear": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL, rope_parameters=LINEAR)),
    "llama llama3": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL, rope_parameters=LLAMA3)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**CAUSAL)),
    "qwen2 tied": lambda: Qwen2ForCausalLM(Qwen2Config(**CAUSAL, tie_word_embeddings=True)),
}


def tokenizer(*, ends_every_text: bool = False, lower_case: bool = False) -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, VOCABULARY_SIZE - 10, lower_case=lower_case, ends_every_text=ends_every_text)


def random_model(name: str) -> Any:
    """A model by name, every part of which matters."""
    torch.manual_seed(0)
    model: Any = MODELS[name]()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
        elif "relative" in parameter_name:
            nn.init.normal_(parameter)
    return model.eval()


def write(model: Any, folder: Path) -> Path:
    checkpoint.save(model, tokenizer(ends_every_text=model.config.is_encoder_decoder), folder, lineage=[], card="")
    return folder


def logits(model: Any) -> torch.Tensor:
    """On some rows, long enough for positions to matter."""
    ids_BL = torch.randint(3, 270, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(ids_BL).logits
