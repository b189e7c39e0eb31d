"""Tiny random models of every architecture, made elastic, and rows for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, T5Config

from llmdistill.batches import Batch, Example, Pair
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.kept import keep
from llmdistill.elastic.measure import shape_of
from llmdistill.elastic.space import Space
from llmdistill.losses.loss import counts_P, target_logits_NV
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.t5 import new_t5

VOCABULARY_SIZE = 60
IDS: dict[str, Any] = {"vocab_size": VOCABULARY_SIZE, "pad_token_id": 0, "eos_token_id": 1}
T5_SHAPE: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 4, "num_layers": 3, "dropout_rate": 0.0, **IDS}
T5_SHAPE |= {"decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
CAUSAL_SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **IDS, "bos_token_id": None}

MODELS = {
    "t5 v1.0": lambda: new_t5(T5Config(**T5_SHAPE | {"feed_forward_proj": "relu", "tie_word_embeddings": True})),
    "t5 v1.1": lambda: new_t5(T5Config(**T5_SHAPE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})),
    "t5 low rank": lambda: low_rank(new_t5(T5Config(**T5_SHAPE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}))),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL_SHAPE, num_key_value_heads=4, attention_bias=True, mlp_bias=True)),
    "llama grouped": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL_SHAPE, num_key_value_heads=2, tie_word_embeddings=True)),
    "llama low rank": lambda: low_rank(LlamaForCausalLM(LlamaConfig(**CAUSAL_SHAPE, num_key_value_heads=2))),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**CAUSAL_SHAPE, num_key_value_heads=2, tie_word_embeddings=True)),
}
DENSE = tuple(name for name in MODELS if "low rank" not in name)

AXES = Axes(ffn=(0.25, 0.5), heads=(0.5,), depth=(0.5,), width=(0.5, 0.75), rank=(0.5,))
"""Every axis, with widths that registers like."""


def random_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model by name, every part of which matters: norms, biases and tables are random as well."""
    torch.manual_seed(0)
    model: Any = MODELS[name]()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
        elif "norm" in parameter_name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif (
            parameter.dim() == 2 and "proj" in parameter_name
        ):  # transformers draws them with standard deviation 0.02, which hardly says anything at this width
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif "relative" in parameter_name:
            nn.init.normal_(parameter)
    model = model.to(dtype).eval()
    if not model.config.is_encoder_decoder:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # loading keeps its frequencies in float32, `to` does not
    return model


def elastic_model(name: str, axes: Axes = AXES, dtype: torch.dtype = torch.float32, **orders: Sequence[int]) -> tuple[Any, Space]:
    """Such a model with a space."""
    model = random_model(name, dtype)
    space = axes.space(shape_of(model), orders)
    keep(model, space)
    return model, space


def low_rank(model: Any) -> Any:
    """Some linears factorised: in T5 two share their first factor, in both a feed-forward is low-rank throughout."""
    attention, feed_forward = "decoder.block.1.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    paths = [f"{attention}.q", f"{attention}.k", f"{feed_forward}.wi_1", f"{feed_forward}.wo"]
    if not model.config.is_encoder_decoder:
        names = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
        paths = [f"model.layers.{layer}.{name}" for layer in (0, 2) for name in names]
    for path in paths:
        linear = model.get_submodule(path)
        module = LowRankLinear(linear.in_features, linear.out_features, 12, bias=linear.bias is not None)
        model.set_submodule(path, module)
    if model.config.is_encoder_decoder:
        module = model.get_submodule(attention)
        module.k.down.weight = module.q.down.weight
    return model


def rows(num: int, *, seed: int = 0) -> list[Example]:
    """Random tokens: a label and a rationale each."""
    rng = np.random.default_rng(seed)

    def tokens(number: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY_SIZE, number).astype(np.int32)

    return [(Pair(part=0, input=tokens(9), target=tokens(3)), Pair(part=1, input=tokens(7), target=tokens(6))) for _ in range(num)]


def logits(model: Any) -> torch.Tensor:
    """On some rows, two of them padded."""
    ids_BL = torch.randint(3, VOCABULARY_SIZE, (3, 7), generator=torch.Generator().manual_seed(1))
    mask_BL = (torch.arange(7) < torch.tensor([7, 5, 3])[:, None]).long()
    inputs: Any = {"input_ids": ids_BL, "attention_mask": mask_BL}
    with torch.inference_mode():
        return model(**inputs | ({"decoder_input_ids": ids_BL[:, :5]} if model.config.is_encoder_decoder else {})).logits


def exact_logits(model: Any) -> torch.Tensor:
    """In float64 throughout: the stock norms take their mean square in float32."""
    norms: list[Any] = [module for module in model.modules() if type(module).__name__ in ("T5LayerNorm", "LlamaRMSNorm", "Qwen2RMSNorm")]
    for norm in norms:
        norm.forward = lambda hidden, norm=norm: F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
    found = logits(model)
    for norm in norms:
        del norm.forward
    return found


class Drift:
    """How far a model has gone from what it was: the cross-entropy of its next token to its own former one, which rises with any change."""

    parts, weights = ("drift",), (1.0,)

    def __init__(self, model: Any) -> None:
        self.before = copy.deepcopy(model)

    def counts_P(self, batch: Batch) -> torch.Tensor:
        return counts_P(batch, num_parts=2).sum()[None]

    def sums_P(self, model: Any, batch: Batch) -> torch.Tensor:
        before, now = (target_logits_NV(which, batch).double() for which in (self.before, model))
        return F.cross_entropy(now, before.softmax(-1), reduction="sum")[None]


PROMPTS = [[5, 9, 31, 7, 8, 22], [40, 3], [17, 4, 33, 2, 11, 10, 9, 8, 50]]
