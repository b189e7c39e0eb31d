"""Attention through a shared prefix is ordinary attention: the logits of the stock model, whatever is shared, moved or fed in pieces."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llmdistill.teach.shared_prefix import SharedPrefixCache, prefill_prefix, shared_length, with_cache

NUM_TOKENS = 50
SHAPE: dict[str, Any] = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
}
HEADS_ALONE: dict[str, Any] = SHAPE | {"num_key_value_heads": 6}
WINDOWED: dict[str, Any] = SHAPE | {"head_dim": 4, "sliding_window": 64}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama, heads alone": lambda: LlamaForCausalLM(LlamaConfig(**HEADS_ALONE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "mistral, in its window": lambda: MistralForCausalLM(MistralConfig(**WINDOWED)),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # Qwen2's start at zero, which would hide a lost one
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def random_tokens(*shape: int, seed: int) -> Any:
    return torch.randint(NUM_TOKENS, shape, generator=torch.Generator().manual_seed(seed)).tolist()


def feed(model: Any, cache: SharedPrefixCache, first_slot: int, new: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The logits after each row's new tokens (L V); rows are padded with a token that must not matter."""
    longest = max(map(len, new))
    slots = slice(first_slot, first_slot + len(new))
    position_ids, mask = cache.begin(slots, longest)
    ids_BL = torch.tensor([[*row, *[7] * (longest - len(row))] for row in new])
    logits_BLV = model(input_ids=ids_BL, position_ids=position_ids, attention_mask=mask, **with_cache(model, cache)).logits
    cache.lengths_S[slots] += torch.tensor([len(row) for row in new])
    return [logits_BLV[index, : len(row)] for index, row in enumerate(new)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_shared", [0, 1, 11])
def test_the_logits_are_the_stock_models(name: str, num_shared: int) -> None:
    prefix = random_tokens(num_shared, seed=1)
    rows = [random_tokens(length, seed=length) for length in (9, 3, 6)]
    stock, model = build(name), build(name)
    with torch.inference_mode():
        expected = [stock(torch.tensor([prefix + row])).logits[0, num_shared:] for row in rows]
        cache = prefill_prefix(model, prefix, 3, 9)
        at_once = feed(model, cache, 0, [row[:-2] for row in rows])
        for given_logits, wanted in zip(at_once, expected, strict=True):
            torch.testing.assert_close(given_logits, wanted[:-2], rtol=1e-9, atol=1e-9)
        for position in (-2, -1):
            one_more = feed(model, cache, 0, [[row[position]] for row in rows])
            for given_logits, wanted in zip(one_more, expected, strict=True):
                torch.testing.assert_close(given_logits[0], wanted[position], rtol=1e-9, atol=1e-9)


def test_a_row_goes_on_in_another_slot_and_a_slot_is_used_again() -> None:
    prefix, long, short, new = (random_tokens(length, seed=length) for length in (5, 8, 2, 4))
    stock, model = build("llama"), build("llama")
    with torch.inference_mode():
        cache = prefill_prefix(model, prefix, 2, 10)
        feed(model, cache, 0, [long, short[:1]])
        cache.move(1, 0)
        cache.lengths_S[1] = 0
        (moved,) = feed(model, cache, 0, [short[1:]])
        (fresh,) = feed(model, cache, 1, [new])
        torch.testing.assert_close(moved, stock(torch.tensor([prefix + short])).logits[0, -1:], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fresh, stock(torch.tensor([prefix + new])).logits[0, -4:], rtol=1e-9, atol=1e-9)
    assert cache.lengths_S.tolist() == [2, 4]
    assert cache.get_seq_length() == 9


@given(
    common=st.lists(st.integers(0, 3), max_size=4),
    rests=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=5),
)
def test_the_shared_length_is_the_longest_that_leaves_each_row_a_token(common: list[int], rests: list[list[int]]) -> None:
    prompts = [common + rest for rest in rests]
    length = shared_length(prompts)
    assert len(common) <= length < min(map(len, prompts))
    assert all(prompt[:length] == prompts[0][:length] for prompt in prompts)
    one_more = {tuple(prompt[: length + 1]) for prompt in prompts}
    assert len(one_more) > 1 or length + 1 == min(map(len, prompts))


def test_a_window_shorter_than_the_rows_is_refused() -> None:
    model = build("mistral, in its window")
    with pytest.raises(ValueError, match="MistralForCausalLM sees 64 tokens back and the longest prompt with its completion has 65"):
        prefill_prefix(model, [1] * 5, 1, 60)


def test_layers_that_do_not_attend_are_refused() -> None:
    model = build("llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="layers of type full_attention, linear_attention"):
        prefill_prefix(model, [1, 2], 1, 4)


def test_attention_that_does_more_is_refused() -> None:
    config = Gemma2Config(**SHAPE | {"sliding_window": 64, "head_dim": 4, "attn_logit_softcapping": 5.0})
    model: Any = Gemma2ForCausalLM(config).eval()
    with torch.inference_mode():
        cache = prefill_prefix(model, [1, 2], 1, 4)
        with pytest.raises(ValueError, match="softcap"):
            feed(model, cache, 0, [[3]])


def test_attention_that_cannot_be_replaced_is_refused() -> None:
    model = FalconForCausalLM(FalconConfig(vocab_size=NUM_TOKENS, hidden_size=24, num_hidden_layers=1, num_attention_heads=4)).eval()
    with torch.inference_mode(), pytest.raises(ValueError, match="FalconForCausalLM has an attention of its own"):
        prefill_prefix(model, [1, 2], 1, 4)
