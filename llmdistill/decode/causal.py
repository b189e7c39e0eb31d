"""Llama and Qwen2 class models: prompts are prefilled up to their last token, then one token of every row a step.

The arithmetic is that of transformers' LlamaForCausalLM and Qwen2ForCausalLM: grouped-query attention without copies of the keys (the queries of a group go
together), rotary positions from the model's own module, tabulated once. The prompt's last token is the first step's input, so that rows that join need no
step of their own; and the last layer of a prefill only has to leave its keys and values.

Shapes: R rows, W slots a row (beams), S = R*W slots, N tokens of a part (part.py), Q tokens of its longest row, H key/value heads, G query heads a key/value
head, D head width, M model width, P prefix columns, L columns in use, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP, Qwen2Model

from llmdistill.decode import modules
from llmdistill.decode.cache import COLUMN_BLOCK, KVCache, Window, prefill_chunks
from llmdistill.decode.exit_heads import ExitHeads, state_width
from llmdistill.decode.part import Part
from llmdistill.decode.skipped import SkippedResidual, layer_gate, of_open, open_tokens, put_back
from llmdistill.models.skipped_feed_forward import SkippedFeedForward

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

# Rotary frequencies that change with the length of the longest row would make a row depend on its neighbours.
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def feed_forward(norm_module: nn.Module, mlp: Any) -> Callable[[Tensor], Tensor]:
    """hidden -> hidden + down(act(gate(norm(hidden))) * up(norm(hidden)))."""
    if modules.is_stock(mlp, SkippedFeedForward):
        return SkippedResidual(norm_module, mlp)
    if not modules.is_stock(mlp, LlamaMLP, Qwen2MLP):
        norm = modules.norm(norm_module)
        return lambda hidden: hidden + mlp(norm(hidden))
    linears = [mlp.gate_proj, mlp.up_proj]
    return modules.normed_feed_forward(norm_module, linears, mlp.act_fn, mlp.down_proj) or StockFeedForward(norm_module, mlp)


class StockFeedForward:
    """The arithmetic of LlamaMLP and its residual, with any linears."""

    def __init__(self, norm: nn.Module, mlp: Any) -> None:
        self.gate_and_up = modules.normed_separate(norm, [mlp.gate_proj, mlp.up_proj])
        self.activation = modules.activation(mlp.act_fn, mlp.gate_proj)
        self.add_output = modules.residual_linear(mlp.down_proj)

    def __call__(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_and_up(hidden)
        return self.add_output(hidden, self.activation(gate) * up)


@dataclass(frozen=True)
class Layer:
    """The callables of one layer."""

    gate: Callable[[Tensor], Tensor] | None  # whether a token goes through
    qkv: Callable[[Tensor], Tensor]  # of the norm
    add_output: Callable[[Tensor, Tensor], Tensor]
    feed_forward: Callable[[Tensor], Tensor]
    num_heads: int  # of keys and values
    num_groups: int  # query heads for each of them
    head_width: int
    scale: float

    def finish(self, hidden_NM: Tensor, attended: Tensor, open_O: Tensor | None) -> Tensor:
        """What comes after attention, for the open tokens; the states of the others stay."""
        return put_back(hidden_NM, self.feed_forward(self.add_output(of_open(hidden_NM, open_O), of_open(attended, open_O))), open_O)


@dataclass(frozen=True, kw_only=True)
class View:
    """What the layers of one step see."""

    window: Window
    rotation: tuple[Tensor, Tensor]  # of each token
    hidden: Tensor | None  # (S, Q, L): minus infinity where a token does not look


class CausalDecoder:
    """What is the same for all batches of one model."""

    def __init__(self, model: LlamaForCausalLM | Qwen2ForCausalLM) -> None:
        config: Any = model.config
        inner = modules.opened(model.model, LlamaModel, Qwen2Model)
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            raise ValueError(
                f"the decode engine does not run sliding-window attention (layer_types: {sorted(set(config.layer_types))}); set use_sliding_window=False"
            )
        if inner.rotary_emb.rope_type not in FIXED_ROPE_TYPES:
            raise ValueError(f"the decode engine does not run rotary positions of type {inner.rotary_emb.rope_type!r}; it runs {', '.join(FIXED_ROPE_TYPES)}")
        self.device = model.device
        self.vocabulary_size = config.vocab_size
        self.max_positions: int | None = config.max_position_embeddings
        self.embed = inner.embed_tokens
        self.dtype = self.embed(torch.tensor([0], device=self.device)).dtype
        self.layers = [_layer(layer) for layer in inner.layers[: config.num_hidden_layers]]
        self.rotary = inner.rotary_emb
        self.head = modules.normed_head(inner.norm, model.lm_head)
        self.exits = ExitHeads.of(model, 1.0)
        self.num_layers, self.model_width = len(self.layers), len(inner.norm.weight)
        # A few prompts at a time keep the feed-forward's activations in a CPU's cache.
        self.max_prefill_tokens = 512 if self.device.type == "cpu" else 32768
        self._cosine_sine: tuple[Tensor, Tensor] | None = None

    def new_batch(self, width: int) -> CausalBatch:
        return CausalBatch(self, width)

    def rotation(self, positions: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine of the positions, all below `num_positions`: x -> x * cosine + (x with its halves swapped) * sine."""
        if self._cosine_sine is None or len(self._cosine_sine[0]) < num_positions:
            all_positions = torch.arange(-(-num_positions // COLUMN_BLOCK) * COLUMN_BLOCK, device=self.device)
            cosine_1PD, sine_1PD = self.rotary(torch.empty(0, dtype=self.dtype, device=self.device), all_positions[None])
            sine_PD = sine_1PD[0].clone()
            sine_PD[:, : sine_PD.shape[1] // 2].neg_()
            self._cosine_sine = cosine_1PD[0], sine_PD
        cosine, sine = self._cosine_sine
        return cosine[positions], sine[positions]


class CausalBatch:
    """The rows that decode together."""

    def __init__(self, decoder: CausalDecoder, width: int) -> None:
        self.decoder = decoder
        self.width = width
        shapes = [(layer.num_heads, layer.head_width) for layer in decoder.layers]
        self.cache = KVCache(shapes, width=width, num_state=state_width(decoder, width), dtype=decoder.dtype, device=decoder.device)

    @property
    def num_rows(self) -> int:
        return self.cache.num_rows

    def admit(self, prompts: Sequence[Sequence[int]], thresholds: Sequence[float] = ()) -> list[int]:
        """Prefills new rows after the present ones; the token that each row's first step begins with. Prompts go the whole depth, whatever the thresholds."""
        prefixes = [prompt[:-1] for prompt in prompts]
        lengths = [len(prefix) for prefix in prefixes]
        first_slot = self.cache.admit(lengths).start
        for chunk in prefill_chunks(lengths, self.decoder.max_prefill_tokens):
            if max(lengths[chunk]):
                self._prefill(prefixes[chunk], first_slot + chunk.start * self.width)
        return [prompt[-1] for prompt in prompts]

    def rearrange(self, order: Sequence[int]) -> None:
        """Keeps the rows `order`, in that order."""
        self.cache.rearrange(order)

    def reorder_slots(self, sources: Sequence[int], num_steps: int) -> None:
        """Slot i continues slot sources[i], which is one of the same row; the rows have made so many steps."""
        self.cache.reorder_slots(torch.tensor(sources, device=self.decoder.device), self.cache.column - num_steps)

    def step(self, tokens: Sequence[int]) -> Float[Tensor, "S V"]:
        """The logits after each slot's newest token."""
        hidden_SM, view = self.embed(tokens), self.look()
        for index in range(len(self.decoder.layers)):
            hidden_SM = self.layer(index, hidden_SM, view)
        self.cache.advance()
        return self.decoder.head(hidden_SM)

    def embed(self, tokens: Sequence[int]) -> Float[Tensor, "S M"]:
        """The states of each slot's newest token before the first layer."""
        return self.decoder.embed(torch.tensor(tokens, device=self.decoder.device))

    def look(self) -> View:
        """What the layers of a step see for the newest token of every slot."""
        decoder, cache = self.decoder, self.cache
        window = cache.window()
        positions = [cache.column - start for start in cache.starts for _ in range(self.width)]
        rotation = decoder.rotation(torch.tensor(positions, device=decoder.device)[:, None], max(positions) + 1)
        hidden_R1L = window.hidden
        if hidden_R1L is not None and self.width > 1:
            hidden_R1L = hidden_R1L.repeat_interleave(self.width, 0)
        return View(window=window, rotation=rotation, hidden=hidden_R1L)

    def layer(self, index: int, hidden_SM: Tensor, view: View) -> Tensor:
        """Layer `index` for the newest token of every slot. The states may be overwritten."""
        layer = self.decoder.layers[index]
        num_slots = len(hidden_SM)
        queries, keys_values = self._rotated(layer, hidden_SM, view)
        view.window.written[index][0].copy_(keys_values[0])
        view.window.written[index][1].copy_(keys_values[1])
        open_O = open_tokens(layer.gate, hidden_SM)
        if open_O is not None and not len(open_O):
            return hidden_SM
        queries = queries.reshape(num_slots * layer.num_heads, layer.num_groups, layer.head_width)
        attended = modules.attend(queries, view.window.keys[index], view.window.values[index], _bias(view, layer), layer.scale)
        return layer.finish(hidden_SM, attended.view(num_slots, -1), open_O)

    def look_at(self, part: Part, view: View) -> View:
        """What the layers see for a part; of batches with one slot a row."""
        hidden = None if view.hidden is None else view.hidden[part.rows_R]
        later_QL = part.later_QL(view.window.num_columns, self.decoder.dtype)
        if later_QL is not None:
            hidden = later_QL.expand(len(part.rows), -1, -1) if hidden is None else hidden + later_QL
        return View(window=view.window, rotation=self._rotation(part), hidden=hidden)

    def look_for_keys(self, part: Part, view: View) -> View:
        """What is enough for `write`."""
        return View(window=view.window, rotation=self._rotation(part), hidden=None)

    def _rotation(self, part: Part) -> tuple[Tensor, Tensor]:
        starts_N = torch.tensor(self.cache.starts, device=self.decoder.device)[part.rows_N]
        return self.decoder.rotation((part.columns_N - starts_N)[:, None], self.cache.column - min(self.cache.starts) + 1)

    def write(self, index: int, hidden_NM: Tensor, part: Part, view: View) -> Tensor:
        """Layer `index` begins for a part: its keys and values are kept, its queries are the result."""
        queries, keys_values = self._rotated(self.decoder.layers[index], hidden_NM, view)
        self.cache.store.layers[index][:, part.rows_N, :, part.columns_N] = torch.stack(keys_values, 1)
        return queries

    def read(self, index: int, hidden_NM: Tensor, queries_NQD: Tensor, part: Part, view: View) -> Tensor:
        """Layer `index` goes on from the queries. The states may be overwritten."""
        layer, num_queries = self.decoder.layers[index], part.num_queries
        open_O = open_tokens(layer.gate, hidden_NM)
        if open_O is not None and not len(open_O):
            return hidden_NM
        keys, values = self.cache.of_rows(index, part, view.window)
        by_head = (len(part.rows), num_queries, layer.num_heads, layer.num_groups, layer.head_width)
        padded = part.padded(queries_NQD).reshape(by_head).transpose(1, 2).reshape(-1, num_queries * layer.num_groups, layer.head_width)
        bias = _bias(view, layer)
        if bias is not None and num_queries > 1 and layer.num_groups > 1:
            bias = bias.repeat_interleave(layer.num_groups, 1)
        attended = modules.attend(padded, keys, values, bias, layer.scale)
        attended = attended.view(len(part.rows), layer.num_heads, num_queries, -1).transpose(1, 2).reshape(len(part.rows) * num_queries, -1)
        return layer.finish(hidden_NM, part.unpadded(attended), open_O)

    def _rotated(self, layer: Layer, hidden_NM: Tensor, view: View) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Queries, and keys and values, of any tokens."""
        num_queries = layer.num_heads * layer.num_groups
        qkv = layer.qkv(hidden_NM).view(len(hidden_NM), -1, layer.head_width)
        qk = _rotate(qkv[:, : num_queries + layer.num_heads], view.rotation)
        return qk[:, :num_queries], (qk[:, num_queries:], qkv[:, num_queries + layer.num_heads :])

    def _prefill(self, prefixes: Sequence[Sequence[int]], first_slot: int) -> None:
        """Prefixes flush right in the columns before the cache's present one."""
        decoder, cache = self.decoder, self.cache
        num_rows, num_columns = len(prefixes), max(map(len, prefixes))
        pads = [num_columns - len(prefix) for prefix in prefixes]
        tokens_RP = torch.tensor([[*[0] * pad, *prefix] for pad, prefix in zip(pads, prefixes, strict=True)], device=decoder.device)
        pads_R1 = torch.tensor(pads, device=decoder.device)[:, None]
        columns_P = torch.arange(num_columns, device=decoder.device)
        cosine, sine = decoder.rotation((columns_P - pads_R1).clamp(min=0), num_columns)
        rotation = cosine[:, :, None], sine[:, :, None]
        mask = None
        if any(pads):
            # A padding column sees itself, so that its attention is not 0/0.
            seen_RPP = (columns_P[None, None] <= columns_P[None, :, None]) & (columns_P >= pads_R1)[:, None]
            mask = (seen_RPP | torch.eye(num_columns, dtype=torch.bool, device=decoder.device))[:, None]
        slots, columns = slice(first_slot, first_slot + num_rows * self.width), slice(cache.column - num_columns, cache.column)
        hidden = decoder.embed(tokens_RP)
        for layer, stored in zip(decoder.layers, cache.store.layers, strict=False):
            num_queries, num_heads, width = layer.num_heads * layer.num_groups, layer.num_heads, layer.head_width
            qkv = layer.qkv(hidden).view(num_rows, num_columns, -1, width)
            qk = _rotate(qkv[:, :, : num_queries + num_heads], rotation)
            queries, keys, values = (x.transpose(1, 2) for x in (qk[:, :, :num_queries], qk[:, :, num_queries:], qkv[:, :, num_queries + num_heads :]))
            for place, states in enumerate((keys, values)):
                stored[place, slots, :, columns] = states if self.width == 1 else states.repeat_interleave(self.width, 0)
            if layer is decoder.layers[-1]:
                break
            open_O = open_tokens(layer.gate, hidden.view(-1, hidden.shape[-1]))
            if open_O is not None and not len(open_O):
                continue
            if layer.num_groups > 1:
                keys, values = (x.repeat_interleave(layer.num_groups, 1) for x in (keys, values))
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=layer.scale)
            attended = attended.transpose(1, 2).reshape(num_rows * num_columns, -1)
            hidden = layer.finish(hidden.view(len(attended), -1), attended, open_O).view(hidden.shape)


def _bias(view: View, layer: Layer) -> Tensor | None:
    """(S*H, Q, L)."""
    if view.hidden is None:
        return None
    return view.hidden[:, None].expand(-1, layer.num_heads, -1, -1).flatten(0, 1)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotation
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)


def _layer(layer: Any) -> Layer:
    attention = modules.opened(modules.opened(layer, LlamaDecoderLayer, Qwen2DecoderLayer).self_attn, LlamaAttention, Qwen2Attention)
    return Layer(
        gate=layer_gate(layer),
        qkv=modules.normed_joint(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        add_output=modules.residual_linear(attention.o_proj),
        feed_forward=feed_forward(layer.post_attention_layernorm, layer.mlp),
        num_heads=attention.k_proj.out_features // attention.head_dim,  # a layer's own: layers may differ (models/resized.py)
        num_groups=attention.num_key_value_groups,
        head_width=attention.head_dim,
        scale=attention.scaling,
    )
