"""Batched decoding of many prompts that begin alike, with the common beginning computed and stored once.

A few-shot prompt is some hundred tokens that every row shares and a few dozen of its own. The keys and values of the shared part are kept once, not once
a row: a query attends to them in one matrix product over all rows, and to its own row's tokens in a batched one; both score blocks go through one softmax,
so the result is exactly ordinary attention (the same idea as cascade attention in FlashInfer, Ye et al. 2024, without its merging of partial softmaxes).
Works for causal models of transformers whose attention goes through its `AttentionInterface` with full attention in all layers (Llama, Qwen2, ...).

Shapes: B rows, L new tokens a row, H query heads, K key/value heads, G query heads a key/value head, P prefix tokens, T own tokens held, C head channels,
S slots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

ATTENTION = "llmdistill_shared_prefix"


class SharedPrefixCache:
    """Keys and values of one prefix, and of what each slot holds after it; passed to the model as its ``past_key_values``."""

    def __init__(self, prefix: DynamicCache, prefix_length: int, num_slots: int, capacity: int) -> None:
        self.prefix_length = prefix_length
        self.prefix_keys = [layer.keys[0, :, :prefix_length] for layer in prefix.layers]  # each K P C
        self.prefix_values = [layer.values[0, :, :prefix_length] for layer in prefix.layers]
        num_heads, _, num_channels = self.prefix_keys[0].shape
        like = self.prefix_keys[0]
        self.keys = [like.new_zeros(num_slots, num_heads, capacity, num_channels) for _ in prefix.layers]
        self.values = [like.new_zeros(num_slots, num_heads, capacity, num_channels) for _ in prefix.layers]
        self.lengths_S = torch.zeros(num_slots, dtype=torch.long, device=like.device)
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

    def update(self, keys_BKLC: Tensor, values_BKLC: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of one layer and give all that the rows hold after the prefix (called by the model's attention)."""
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
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of new tokens to the shared prefix and to their own row; the form that transformers' `AttentionInterface` calls."""
    cache: SharedPrefixCache = module.shared_prefix  # type: ignore[assignment]  # set by `prefill_prefix`
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    num_rows, num_heads, num_new, num_channels = query_BHLC.shape
    num_kv_heads = key_BKTC.shape[1]
    queries = query_BHLC.reshape(num_rows, num_kv_heads, -1, num_channels) * scaling  # B K GL C
    flat = queries.transpose(0, 1).reshape(num_kv_heads, -1, num_channels)  # K BGL C
    prefix_scores = (flat @ cache.prefix_keys[layer].transpose(1, 2)).view(num_kv_heads, num_rows, -1, cache.prefix_length).transpose(0, 1)
    own_scores = (queries @ key_BKTC.transpose(2, 3)).view(num_rows, num_kv_heads, -1, num_new, key_BKTC.shape[2])
    own_scores = own_scores.masked_fill(~attention_mask[:, :, None], float("-inf")).flatten(2, 3)
    weights = torch.cat([prefix_scores, own_scores], dim=-1).softmax(-1, dtype=torch.float32 if queries.dtype != torch.float64 else None).to(queries.dtype)
    prefix_weights, own_weights = weights.split([cache.prefix_length, key_BKTC.shape[2]], dim=-1)
    flat_weights = prefix_weights.transpose(0, 1).reshape(num_kv_heads, -1, cache.prefix_length)
    from_prefix = (flat_weights @ cache.prefix_values[layer]).view(num_kv_heads, num_rows, -1, num_channels).transpose(0, 1)
    mixed = from_prefix + own_weights @ value_BKTC
    return mixed.reshape(num_rows, num_heads, num_new, num_channels).transpose(1, 2), None


def prefill_prefix(model: PreTrainedModel, prefix: Sequence[int], num_slots: int, capacity: int) -> SharedPrefixCache:
    """Run the shared prefix (it may be empty) once and set the model to attend through it; a row may hold ``capacity`` tokens after it."""
    layer_types = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise ValueError(
            f"{type(model).__name__} has layers of type {', '.join(sorted(layer_types))}; a shared prefix needs full attention in all: "
            "use the vllm teacher or an OpenAI-compatible endpoint for this model"
        )
    model.set_attn_implementation("sdpa")
    held = DynamicCache(config=model.config)
    model.get_decoder()(torch.tensor([list(prefix) or [0]], device=model.device), past_key_values=held, use_cache=True)
    cache = SharedPrefixCache(held, len(prefix), num_slots, capacity)
    AttentionInterface.register(ATTENTION, attend)
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.shared_prefix = cache  # type: ignore[assignment]
    return cache
