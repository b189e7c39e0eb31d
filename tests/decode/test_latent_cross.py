"""Cross-attention from one latent: the tokens of transformers, greedy and by beams, and the logits of keys and values."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from random_models import random_model, random_prompts
from torch import nn
from transformers_reference import assert_same, beams, generate, padded

from llmdistill.decode import latent_cross
from llmdistill.decode.decoding import Decoding
from llmdistill.decode.engine import CrossCache, Engine
from llmdistill.decode.t5 import T5Decoder
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.low_rank_linear import LowRankLinear

KEPT = (CrossCache.EXPANDED, CrossCache.LATENT)


def with_latent(seed: int, *, rank: int | None = None, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A random T5 whose decoder layers' keys and values share a down-projection, as QSVD leaves it."""
    model: Any = random_model("t5 v1.1", seed, dtype=dtype, **settings)
    attentions = [block.layer[1].EncDecAttention for block in model.decoder.block]
    rank = random.Random(seed).choice([1, 5, int(model.config.d_model)]) if rank is None else rank
    shared = nn.Parameter(torch.randn(rank, model.config.d_model, dtype=dtype) / model.config.d_model**0.5)
    for attention in attentions:
        for name in ("k", "v"):
            linear = getattr(attention, name)
            low_rank = LowRankLinear(linear.in_features, linear.out_features, rank, bias=False, dtype=dtype)
            nn.init.normal_(low_rank.up.weight)
            low_rank.down.weight = shared
            setattr(attention, name, low_rank)
    return model.eval()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("seed", range(6))
def test_tokens_are_those_of_generate(seed: int, kept: CrossCache) -> None:
    model, draw = with_latent(seed), random.Random(seed)
    prompts = random_prompts(seed, draw.choice([1, 3, 11]), draw.choice([1, 5, 17]), model.config.vocab_size)
    engine = Engine(model, max_batch_rows=draw.choice([1, 3, 16]), cross_cache=kept)
    assert engine.cross_cache is kept
    assert_same(engine.generate(prompts, Decoding(max_new_tokens=12)), generate(model, prompts, max_new_tokens=12))


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams_are_those_of_generate(num_beams: int, kept: CrossCache) -> None:
    for seed in range(3):
        model = with_latent(seed)
        prompts = random_prompts(seed, 4, 9, model.config.vocab_size)
        engine = Engine(model, cross_cache=kept)
        found = engine.beams(prompts, Decoding(max_new_tokens=8, num_beams=num_beams))
        reference = beams(model, prompts, max_new_tokens=8, num_beams=num_beams)
        assert [[one.tokens for one in row] for row in found] == [[one.tokens for one, _ in row] for row in reference]


@pytest.mark.parametrize("width", [1, 3])
def test_logits_from_the_latent_are_those_from_keys_and_values_and_of_the_stock_forward(width: int) -> None:
    for seed in range(4):
        model = with_latent(seed)
        prompts = random_prompts(seed, 5, 11, model.config.vocab_size)
        logits = [_logits(model, prompts, kept, width) for kept in KEPT]
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-9, atol=1e-9)
        with torch.inference_mode():
            started = torch.full((len(prompts), 3), model.generation_config.decoder_start_token_id)
            stock = model(**padded(model, prompts), decoder_input_ids=started).logits
        torch.testing.assert_close(logits[1], stock.transpose(0, 1).repeat_interleave(width, 1), rtol=1e-5, atol=1e-5)


def _logits(model: Any, prompts: Sequence[Sequence[int]], kept: CrossCache, width: int) -> torch.Tensor:
    """Three steps of the start token."""
    with torch.inference_mode():
        batch = T5Decoder(model, kept).new_batch(width)
        tokens = [token for token in batch.admit(prompts) for _ in range(width)]
        return torch.stack([batch.step(tokens) for _ in range(3)])


@pytest.mark.parametrize("kept", KEPT)
def test_rows_come_and_go(kept: CrossCache) -> None:
    """Rows of other lengths join, some leave, and the storage grows, without a change for those that stay."""
    model = with_latent(2)
    prompts = random_prompts(7, 7, 90, model.config.vocab_size)
    engine = Engine(model, max_batch_rows=8, cross_cache=kept)
    alone = [Engine(model, cross_cache=kept).generate([prompt], Decoding(max_new_tokens=9))[0].tokens for prompt in prompts]
    ids = [engine.add(prompt, Decoding(max_new_tokens=9)) for prompt in prompts[:3]]
    tokens: dict[int, list[int]] = {}

    def step() -> None:
        for token in engine.step():
            tokens.setdefault(token.row, []).append(token.token)

    step()
    ids += [engine.add(prompt, Decoding(max_new_tokens=9)) for prompt in prompts[3:]]
    step()
    engine.drop(ids[0])
    while engine.num_active:
        step()
    assert [tuple(tokens[row]) for row in ids[1:]] == alone[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runs_in_any_dtype(dtype: torch.dtype) -> None:
    model = with_latent(3, dtype=dtype)
    prompts = random_prompts(3, 4, 9, model.config.vocab_size)
    logits = [_logits(model, prompts, kept, 2) for kept in KEPT]
    assert {one.dtype for one in logits} == {dtype}
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(logits[1], logits[0], rtol=tolerance, atol=tolerance * float(logits[0].abs().max()))


def test_what_is_kept_is_one_tensor_of_the_latents_width() -> None:
    model = with_latent(1, rank=5, num_layers=3, num_decoder_layers=3)
    batch = T5Decoder(model, CrossCache.LATENT).new_batch(2)
    with torch.inference_mode():
        batch.admit([[2, 3, 4], [5]])
    assert isinstance(batch.cross, latent_cross.LatentStore)
    assert batch.cross.latents_REC.shape[2] == 5


def test_integers_are_kept_expanded_unless_the_latent_is_asked_for() -> None:
    model = with_latent(4, rank=6, dtype=torch.float32)
    shared: nn.Module | None = None
    for attention in (block.layer[1].EncDecAttention for block in model.decoder.block):
        for linear in (attention.k, attention.v):
            linear.up = Int8Linear.from_linear(linear.up)
            shared = linear.down = Int8Linear.from_linear(linear.down) if shared is None else shared
    prompts = random_prompts(4, 4, 9, model.config.vocab_size)
    engine = Engine(model)
    assert engine.cross_cache is CrossCache.EXPANDED
    assert_same(engine.generate(prompts, Decoding(max_new_tokens=3)), generate(model, prompts, max_new_tokens=3))
    logits = [_logits(model, prompts, kept, 1) for kept in KEPT]
    torch.testing.assert_close(logits[1], logits[0], rtol=0.0, atol=0.05 * float(logits[0].abs().max()))  # the latent is not rounded again


def test_the_latent_is_kept_where_it_is_cheaper() -> None:
    """Narrow latents are, wide ones are not, and the engine says which it is."""
    shape: Any = {"d_model": 64, "d_kv": 4, "num_heads": 3, "num_layers": 2, "num_decoder_layers": 2}
    widest = latent_cross.MAX_CHANNELS_BY_HEAD_WIDTH * 4
    assert Engine(with_latent(0, rank=widest, **shape)).cross_cache is CrossCache.LATENT
    assert Engine(with_latent(0, rank=widest + 1, **shape)).cross_cache is CrossCache.EXPANDED


def test_without_a_common_latent_keys_and_values_are_kept() -> None:
    model: Any = random_model("t5 v1.1", 0)
    assert Engine(model).cross_cache is CrossCache.EXPANDED
    with pytest.raises(ValueError, match=r"cross_cache is LATENT.*QSVD with cross=JOINT"):
        Engine(model, cross_cache=CrossCache.LATENT)
    model = with_latent(0)
    model.decoder.block[0].layer[1].EncDecAttention.k.down.weight = nn.Parameter(torch.randn(1, 1))
    assert Engine(model).cross_cache is CrossCache.EXPANDED


def test_a_causal_model_has_no_such_cache() -> None:
    model = random_model("llama", 0)
    assert Engine(model).cross_cache is None
    with pytest.raises(ValueError, match="has no cross-attention"):
        Engine(model, cross_cache=CrossCache.LATENT)
