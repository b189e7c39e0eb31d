"""Parity: what the engine decodes with int8 modules is what transformers makes of the same modules.

A number near the middle between two codes may get the one or the other, which changes logits by a hundredth or so. So every token is put before the stock
forward, which must find it as likely as the engine did: to within rounding nearly always, and never far off.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from random_models import KINDS, random_model, random_prompts
from torch import nn
from transformers_reference import padded

from llmdistill.decode.decoding import Decoding
from llmdistill.decode.engine import Engine
from llmdistill.models import int8_product
from llmdistill.models.int8_embedding import Int8Embedding
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.low_rank_linear import LowRankLinear

A_CODE = 0.1  # nats that a code of the other side of the middle may cost


def quantized(model: Any) -> Any:
    """The model with every linear, the embedding and the head in int8; what was tied stays so."""
    embedding: Any = model.get_input_embeddings()
    is_tied = model.get_output_embeddings().weight is embedding.weight
    int8 = Int8Embedding.from_embedding(embedding)
    made: dict[int, Int8Linear] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is nn.Embedding and module.weight is embedding.weight:
            model.set_submodule(path, int8)
        elif type(module) is nn.Linear and path == "lm_head" and is_tied:
            model.set_submodule(path, int8.head())
        elif type(module) is nn.Linear:
            linear = Int8Linear.from_linear(module)
            first = made.setdefault(id(module.weight), linear)
            linear.weight, linear.scale_O = first.weight, first.scale_O
            model.set_submodule(path, linear)
    return model


def factorised(model: Any, *, shared: bool) -> Any:
    """The model with low-rank linears in its blocks; those of a group that read one input share the first factor."""
    generator = torch.Generator().manual_seed(0)
    for path, module in list(model.named_modules()):
        names = [name for name, child in module.named_children() if type(child) is nn.Linear and "lm_head" not in path and path]
        downs: dict[int, Any] = {}
        for name in names:
            linear = getattr(module, name)
            bias_O = None if linear.bias is None else linear.bias.detach()
            rank = min(5, linear.in_features)
            down_RI = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
            low = LowRankLinear.from_factors(torch.randn(linear.out_features, rank, generator=generator) / rank**0.5, down_RI, bias_O)
            if shared and name[0] in "qkv":
                low.down.weight = downs.setdefault(linear.in_features, low.down.weight)
            model.set_submodule(f"{path}.{name}", low)
    return model


def assert_parity(model: Any, prompts: list[list[int]], *, max_batch_rows: int = 8, tolerance: float = 1e-4) -> None:
    engine = Engine(model, max_batch_rows=max_batch_rows)
    tokens: dict[int, list[int]] = {}
    logprobs: dict[int, list[float]] = {}
    ids = {}
    waiting = list(prompts)
    while waiting or engine.num_active:
        while waiting and engine.num_active < max_batch_rows:
            prompt = waiting.pop()
            ids[engine.add(prompt, Decoding(max_new_tokens=9, stop_token_ids=()))] = prompt
        for token in engine.step():
            tokens.setdefault(token.row, []).append(token.token)
            logprobs.setdefault(token.row, []).append(token.logprob)
    off, lacking = [], []
    for row, prompt in ids.items():
        stock_TV = stock_logprobs(model, prompt, tokens[row])
        chosen_T = stock_TV[torch.arange(len(tokens[row])), torch.tensor(tokens[row])]
        lacking += (stock_TV.amax(-1) - chosen_T).tolist()
        off += (chosen_T - torch.tensor(logprobs[row])).abs().tolist()
    assert max(lacking) <= A_CODE + tolerance
    assert max(off) <= A_CODE + tolerance
    assert statistics.median(off) <= tolerance


def stock_logprobs(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        inputs = padded(model, [prompt]) | {"decoder_input_ids": torch.tensor([[model.config.decoder_start_token_id, *tokens[:-1]]])}
    else:
        inputs = padded(model, [[*prompt, *tokens[:-1]]])
    with torch.inference_mode():
        return model(**inputs).logits[0, -len(tokens) :].float().log_softmax(-1)


@pytest.mark.parametrize("max_batch_rows", [1, 8])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_int8_everywhere(kind: str, seed: int, max_batch_rows: int) -> None:
    model = quantized(random_model(kind, seed, dtype=torch.float32))
    assert_parity(model, random_prompts(seed, 6, 9, model.config.vocab_size), max_batch_rows=max_batch_rows)


@pytest.mark.parametrize("feed_forward", ["relu", "gelu", "gated-relu", "gated-gelu", "gated-silu"])
def test_every_feed_forward_of_t5(feed_forward: str) -> None:
    model = quantized(random_model("t5 v1.1", 1, dtype=torch.float32, feed_forward_proj=feed_forward))
    for max_batch_rows in (1, 8):
        assert_parity(model, random_prompts(1, 5, 9, model.config.vocab_size), max_batch_rows=max_batch_rows)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_and_int8(kind: str, shared: bool) -> None:
    model = quantized(factorised(random_model(kind, 2, dtype=torch.float32), shared=shared))
    for max_batch_rows in (1, 8):
        assert_parity(model, random_prompts(2, 5, 9, model.config.vocab_size), max_batch_rows=max_batch_rows)


@pytest.mark.parametrize("kind", ["t5 v1.0", "qwen2"])
def test_low_rank_in_float32_with_a_shared_factor(kind: str) -> None:
    model = factorised(random_model(kind, 2, dtype=torch.float32), shared=True)
    assert_parity(model, random_prompts(2, 5, 9, model.config.vocab_size))


@pytest.mark.parametrize("kind", ["t5 v1.0", "t5 v1.1", "llama"])
def test_some_layers_are_kept_in_float32(kind: str) -> None:
    model = random_model(kind, 0, dtype=torch.float32)
    floats = {path: module for path, module in model.named_modules() if path.endswith((".v", ".wo", ".v_proj", ".gate_proj"))}
    quantized(model)
    for path, module in floats.items():
        model.set_submodule(path, module)
    assert_parity(model, random_prompts(0, 5, 9, model.config.vocab_size))


@pytest.mark.parametrize("kind", ["t5 v1.0", "qwen2"])
def test_without_the_products_of_unsigned_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_product, "unsigned_is_exact", lambda: False)
    model = quantized(random_model(kind, 1, dtype=torch.float32))
    for max_batch_rows in (1, 8):
        assert_parity(model, random_prompts(1, 5, 9, model.config.vocab_size), max_batch_rows=max_batch_rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_in_bfloat16(kind: str) -> None:
    model = quantized(random_model(kind, 1, dtype=torch.bfloat16))
    assert_parity(model, random_prompts(1, 5, 9, model.config.vocab_size), tolerance=40 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("kind", ["t5 v1.0", "llama"])
def test_beams_are_as_likely_as_the_engine_says(kind: str) -> None:
    model = quantized(random_model(kind, 3, dtype=torch.float32))
    prompts = random_prompts(3, 3, 9, model.config.vocab_size)
    decoding = Decoding(max_new_tokens=6, num_beams=3, stop_token_ids=())
    for prompt, hypotheses in zip(prompts, Engine(model).beams(prompts, decoding), strict=True):
        for hypothesis in hypotheses:
            tokens = list(hypothesis.tokens)
            stock_T = stock_logprobs(model, prompt, tokens)[torch.arange(len(tokens)), torch.tensor(tokens)]
            assert hypothesis.logprob_sum == pytest.approx(float(stock_T.sum()), abs=A_CODE)


def test_somebody_who_listens_is_called() -> None:
    model = quantized(random_model("t5 v1.0", 0, dtype=torch.float32))
    calls = []
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.register_forward_hook(lambda module, inputs, output: calls.append(module))
    assert_parity(model, [[5, 6, 7]])
    assert set(calls) == {module for module in model.modules() if isinstance(module, Int8Linear)}
