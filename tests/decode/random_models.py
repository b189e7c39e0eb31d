"""Tiny random models of the classes that the engine runs, each a function of one seed: shapes, kinds of head and feed-forward, and weights."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, T5Config, T5ForConditionalGeneration

from llmdistill.models.t5 import new_t5

KINDS = ("t5 v1.0", "t5 v1.1", "llama", "qwen2")
NO_SPECIAL_TOKENS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
FIRST_TOKEN = 2  # the smallest that prompts are made of


def random_model(kind: str, seed: int, *, dtype: torch.dtype = torch.float64, **settings: Any) -> PreTrainedModel:
    """One of KINDS; `settings` take the place of drawn ones."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    model = _t5(kind, draw, settings) if kind.startswith("t5") else _causal(kind, draw, settings)
    # As initialised, a model repeats one token for ever. With random norms (and biases, which are zero at first) it wanders.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    any_model: Any = model  # transformers' annotation of `to` confuses pyright
    return any_model.to(dtype).eval()


def random_prompts(seed: int, num_prompts: int, longest: int, vocabulary_size: int) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens; one of each, if there are two or more."""
    draw = random.Random(seed)
    lengths = [longest, 1, *(draw.randint(1, longest) for _ in range(num_prompts))][:num_prompts]
    draw.shuffle(lengths)
    return [[draw.randrange(FIRST_TOKEN, vocabulary_size) for _ in range(length)] for length in lengths]


def _t5(kind: str, draw: random.Random, settings: dict[str, Any]) -> T5ForConditionalGeneration:
    num_heads, head_width, num_layers = draw.choice([1, 2, 3]), draw.choice([3, 4, 8]), draw.choice([1, 2, 3])
    drawn: dict[str, Any] = {
        "vocab_size": draw.randint(50, 90),
        "d_model": draw.choice([16, 24, 40]),
        "d_kv": head_width,  # not always d_model / num_heads
        "d_ff": draw.choice([24, 48]),
        "num_heads": num_heads,
        "num_layers": num_layers,
        "num_decoder_layers": draw.randint(1, num_layers),  # with more, transformers' own cache fails
        "relative_attention_num_buckets": draw.choice([8, 32]),
        "relative_attention_max_distance": draw.choice([12, 128]),
        "decoder_start_token_id": draw.choice([0, 1]),
        "feed_forward_proj": draw.choice(["relu", "gelu"]) if kind == "t5 v1.0" else draw.choice(["gated-gelu", "gated-silu"]),
        "tie_word_embeddings": kind == "t5 v1.0",
    }
    return new_t5(T5Config(**NO_SPECIAL_TOKENS | drawn | settings))


def _causal(kind: str, draw: random.Random, settings: dict[str, Any]) -> LlamaForCausalLM | Qwen2ForCausalLM:
    num_key_value_heads, num_groups, head_width = draw.choice([1, 2]), draw.choice([1, 2, 3]), draw.choice([2, 4, 6])
    drawn: dict[str, Any] = {
        "vocab_size": draw.randint(50, 90),
        "hidden_size": num_key_value_heads * num_groups * head_width,
        "intermediate_size": draw.choice([12, 20]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": num_key_value_heads * num_groups,
        "num_key_value_heads": num_key_value_heads,
        "max_position_embeddings": 512,
        "initializer_range": 0.5,
        "tie_word_embeddings": draw.choice([False, True]),
    }
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**NO_SPECIAL_TOKENS | drawn | settings))
    rope = draw.choice([{"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0}])
    drawn |= {"head_dim": draw.choice([head_width, 8]), "attention_bias": draw.choice([False, True]), "rope_parameters": rope}
    return LlamaForCausalLM(LlamaConfig(**NO_SPECIAL_TOKENS | drawn | settings))
