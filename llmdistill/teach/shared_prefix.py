"""Batched decoding of many prompts that begin alike, with the common beginning computed and stored once.

A few-shot prompt is some hundred tokens that every row shares and a few dozen of its own. The keys and values of the shared part are kept once, not once
a row: a query attends to them in one matrix product over all rows, and to its own row's tokens in a batched one; both score blocks go through one softmax,
so the result is exactly ordinary attention (the same idea as cascade attention in FlashInfer, Ye et al. 2024, without its merging of partial softmaxes).
Works for causal models of transformers whose attention goes through its `AttentionInterface` and is full in all layers, or within its window (Llama, Qwen2,
Qwen3, Mistral, ...); others are refused.

Shapes: B rows, L new tokens a row, H query heads, K key/value heads, G query heads a key/value head, P prefix tokens, T own tokens held, C head channels,
S slots.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

ATTENTION = "llmdistill_shared_prefix"
ELSEWHERE = "use the vllm teacher or an OpenAI-compatible endpoint for this model"
WITHOUT_EFFECT = {"position_ids", "use_cache", "cache_position", "sliding_window", "is_causal"}  # arguments of attention that the mask has already answered


def shared_length(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with, at most one less than the shortest has: every row needs one of its own."""
    first, last = min(prompts), max(prompts)  # in dictionary order: what these two share, all share
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def with_cache(model: nn.Module, cache: object) -> dict[str, Any]:
    """The arguments that hand a model of transformers its cache; the name changed in 5.24, and the old one warns since."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


class SharedPrefixCache:
    """Keys and values of one prefix, and of what each slot holds after it; passed to the model as its cache."""

    def __init__(self, prefix: Sequence[tuple[Tensor, Tensor]], num_slots: int, capacity: int) -> None:
        self.prefix_keys = [keys for keys, _ in prefix]  # each K P C
        self.prefix_values = [values for _, values in prefix]
        self.prefix_length = self.prefix_keys[0].shape[1]
        self.keys = [_slots_like(keys, num_slots, capacity) for keys in self.prefix_keys]
        self.values = [_slots_like(values, num_slots, capacity) for values in self.prefix_values]
        self.lengths_S = torch.zeros(num_slots, dtype=torch.long, device=self.keys[0].device)
        self._slots = slice(0, 0)
        self._positions_BL = self.lengths_S.new_zeros(0, 0)
        self._held = 0

    def begin(self, slots: slice, num_new: int) -> tuple[Tensor, Tensor]:
        """Set up a pass of ``num_new`` tokens for the rows in ``slots``; gives position ids (B L) and the mask over own tokens (B 1 L T)."""
        self._slots = slots
        lengths_B = self.lengths_S[slots]
        self._positions_BL = lengths_B[:, None] + torch.arange(num_new, device=lengths_B.device)
        self._held = int(lengths_B.max()) + num_new
        mask_BLT = torch.arange(self._held, device=lengths_B.device) <= self._positions_BL[..., None]
        return self._positions_BL + self.prefix_length, mask_BLT[:, None]

    def update(self, keys_BKLC: Tensor, values_BKLC: Tensor, layer_idx: int, **_: object) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of one layer and give all that the rows hold after the prefix (called by the model's attention).

        Since 5.24 transformers hands over the other arguments of attention as well, for caches of quantized or linear attention.
        """
        rows = torch.arange(self._slots.start, self._slots.stop, device=keys_BKLC.device)[:, None]
        for store, new in ((self.keys[layer_idx], keys_BKLC), (self.values[layer_idx], values_BKLC)):
            store[rows, :, self._positions_BL] = new.transpose(1, 2)
        return self.keys[layer_idx][self._slots, :, : self._held], self.values[layer_idx][self._slots, :, : self._held]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held by the fullest row, the prefix included (transformers asks for it)."""
        return self.prefix_length + self._held

    def move(self, source: int, target: int) -> None:
        """Copy what slot ``source`` holds into slot ``target``."""
        length = int(self.lengths_S[source])
        for store in (*self.keys, *self.values):
            store[target, :, :length] = store[source, :, :length]
        self.lengths_S[target] = length


def attend(
    module: nn.Module,
    query_BHLC: Tensor,
    key_BKTC: Tensor,
    value_BKTC: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention of new tokens to the shared prefix and to their own row; the form that transformers' `AttentionInterface` calls."""
    unknown = [name for name, value in others.items() if value is not None and name not in WITHOUT_EFFECT]
    if unknown:
        raise ValueError(f"{type(module).__name__} asks for {', '.join(unknown)} in its attention, which a shared prefix does not do: {ELSEWHERE}")
    cache: SharedPrefixCache = module.shared_prefix  # type: ignore[assignment]  # set by `prefill_prefix`
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    num_rows, num_heads, num_new, num_channels = query_BHLC.shape
    num_kv_heads, num_held = key_BKTC.shape[1:3]
    num_queries = num_heads // num_kv_heads * num_new  # of a row and key/value head: G L
    queries = query_BHLC.reshape(num_rows, num_kv_heads, num_queries, num_channels) * scaling
    flat = queries.transpose(0, 1).reshape(num_kv_heads, num_rows * num_queries, num_channels)
    prefix_scores = (flat @ cache.prefix_keys[layer].transpose(1, 2)).view(num_kv_heads, num_rows, num_queries, cache.prefix_length).transpose(0, 1)
    own_scores = (queries @ key_BKTC.transpose(2, 3)).view(num_rows, num_kv_heads, -1, num_new, num_held)
    own_scores = own_scores.masked_fill(~attention_mask[:, :, None], float("-inf")).flatten(2, 3)
    weights = torch.cat([prefix_scores, own_scores], dim=-1).softmax(-1, dtype=torch.float32 if queries.dtype != torch.float64 else None).to(queries.dtype)
    prefix_weights, own_weights = weights.split([cache.prefix_length, num_held], dim=-1)
    flat_weights = prefix_weights.transpose(0, 1).reshape(num_kv_heads, num_rows * num_queries, cache.prefix_length)
    from_prefix = (flat_weights @ cache.prefix_values[layer]).view(num_kv_heads, num_rows, num_queries, value_BKTC.shape[3]).transpose(0, 1)
    mixed = from_prefix + own_weights @ value_BKTC
    return mixed.reshape(num_rows, num_heads, num_new, value_BKTC.shape[3]).transpose(1, 2), None


def prefill_prefix(model: PreTrainedModel, prefix: Sequence[int], num_slots: int, capacity: int) -> SharedPrefixCache:
    """Run the shared prefix (it may be empty) once and set the model, for good, to attend through it; a row may hold ``capacity`` tokens after it."""
    assert model.config._attn_implementation != ATTENTION, "a model attends through one cache"
    _check_attention(model, len(prefix) + capacity)
    held = DynamicCache(config=model.config)
    decoder = model.get_decoder()
    decoder(torch.tensor([list(prefix) or [0]], device=model.device), **with_cache(decoder, held))
    layers = [(keys[0, :, : len(prefix)], values[0, :, : len(prefix)]) for keys, values, _ in held if keys is not None and values is not None]
    if len(layers) != model.config.num_hidden_layers:
        raise ValueError(f"{type(model).__name__} has layers without keys and values of their own, which a shared prefix does not do: {ELSEWHERE}")
    cache = SharedPrefixCache(layers, num_slots, capacity)
    AttentionInterface.register(ATTENTION, attend)
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:  # transformers only warns
        raise ValueError(f"{type(model).__name__} has an attention of its own, which a shared prefix cannot replace: {ELSEWHERE}")
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.shared_prefix = cache  # type: ignore[assignment]
    return cache


def _slots_like(prefix: Tensor, num_slots: int, capacity: int) -> Tensor:
    num_heads, _, num_channels = prefix.shape
    return prefix.new_zeros(num_slots, num_heads, capacity, num_channels)


def _check_attention(model: PreTrainedModel, num_tokens: int) -> None:
    """Each layer has to see all tokens: its attention is full, or its window holds them."""
    window = getattr(model.config, "sliding_window", None)
    types = set(getattr(model.config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"])
    if not types <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"{type(model).__name__} has layers of type {', '.join(sorted(types))}; a shared prefix needs attention in all: {ELSEWHERE}")
    if "sliding_attention" in types and window is not None and num_tokens > window:
        raise ValueError(
            f"{type(model).__name__} sees {window} tokens back and the longest prompt with its completion has {num_tokens}; a shared prefix needs all of "
            f"them in sight: shorten the prompt or lower max_tokens, or {ELSEWHERE}"
        )
