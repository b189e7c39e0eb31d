"""Tiny random models of every architecture, with rows to calibrate on."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, T5Config

from llmdistill.batches import Batch, Example, Pair
from llmdistill.compress.calibration import Calibration
from llmdistill.losses.loss import counts_P, target_logits_NV
from llmdistill.losses.multitask import Multitask
from llmdistill.models.t5 import new_t5

VOCABULARY_SIZE = 60
IDS: dict[str, Any] = {"vocab_size": VOCABULARY_SIZE, "pad_token_id": 0, "eos_token_id": 1}
T5_SHAPE: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0, **IDS}
CAUSAL_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **IDS,
    "bos_token_id": None,
}

MODELS = {
    "t5 v1.0": lambda: new_t5(T5Config(**T5_SHAPE | {"feed_forward_proj": "relu", "tie_word_embeddings": True})),
    "t5 v1.1": lambda: new_t5(T5Config(**T5_SHAPE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL_SHAPE, tie_word_embeddings=False)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL_SHAPE, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**CAUSAL_SHAPE, tie_word_embeddings=True)),
}


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model by name, every layer of which matters; norms and biases are random as well, so that none of them can be forgotten unseen."""
    torch.manual_seed(0)
    model: Any = MODELS[name]()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter_name.endswith("proj.weight") or (name, parameter_name) == ("t5 v1.1", "lm_head.weight"):
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)  # as drawn they are so small that they would hardly matter
        parameter.data = parameter.data.to(dtype)  # and not the rotary embedding's buffers, which loading leaves in float32 as well
    return model.eval()


def rows(num: int, *, seed: int = 0) -> list[Example]:
    """Random tokens: a label and a rationale each."""
    rng = np.random.default_rng(seed)

    def tokens(number: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY_SIZE, number).astype(np.int32)

    return [(Pair(part=0, input=tokens(9), target=tokens(3)), Pair(part=1, input=tokens(7), target=tokens(6))) for _ in range(num)]


def calibration(num: int = 6) -> Calibration:
    return Calibration(examples=rows(num), held_out=rows(2, seed=1), loss=Multitask())


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


def drift(model: Any) -> Calibration:
    """Rows on which a change of the model is measured."""
    return Calibration(examples=rows(6), held_out=rows(2, seed=1), loss=Drift(model))


def logits(model: PreTrainedModel) -> torch.Tensor:
    """The model's logits on some rows."""
    ids_BL = torch.randint(3, VOCABULARY_SIZE, (3, 7), generator=torch.Generator().manual_seed(1))
    inputs: Any = {"input_ids": ids_BL} | ({"decoder_input_ids": ids_BL[:, :5]} if model.config.is_encoder_decoder else {})
    with torch.inference_mode():
        return model(**inputs).logits
