"""T5 v1.0 and v1.1: the encoder once a row, then one decoder token of every row a step.

The arithmetic is that of transformers' T5ForConditionalGeneration. What is done once instead of at every step: cross-attention's keys and values
(contiguous, one copy for all beams of a row), the relative position bias (one table by distance), the masks.

Shapes: R rows, W slots a row (beams), S = R*W slots, N tokens of a part (part.py), Q tokens of its longest row, H heads, D head width, M model width, E encoder
columns, L decoder columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention, T5Block, T5LayerCrossAttention, T5LayerSelfAttention, T5Stack

from llmdistill.decode import modules
from llmdistill.decode.cache import COLUMN_BLOCK, KVCache, SlotStore, Window, prefill_chunks
from llmdistill.decode.encoder_exits import EncoderExits
from llmdistill.decode.exit_heads import ExitHeads, state_width
from llmdistill.decode.latent_cross import CrossCache, LatentStore, joint_latent, keeps_latent
from llmdistill.decode.part import Part
from llmdistill.decode.skipped import layer_gate, of_open, open_tokens, put_back
from llmdistill.decode.t5_encoder import T5Encoder, clamp_float16, feed_forward, keep
from llmdistill.models.exit_settings import NEVER

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class DecoderBlock:
    """The callables of one decoder block."""

    gate: Callable[[Tensor], Tensor] | None  # whether a token goes through
    self_qkv: Callable[[Tensor], Tensor]  # of the norm
    add_self_output: Callable[[Tensor, Tensor], Tensor]
    cross_q: Callable[[Tensor], Tensor]  # of the norm
    cross_kv: Callable[[Tensor], Sequence[Tensor]]
    add_cross_output: Callable[[Tensor, Tensor], Tensor]
    feed_forward: Callable[[Tensor], Tensor]
    num_heads: int
    head_width: int


@dataclass(frozen=True, kw_only=True)
class View:
    """What the layers of one step see."""

    window: Window
    bias: Tensor  # (R*H, Q, L)
    cross: Sequence[tuple[Tensor, Tensor, Tensor | None]]  # of each layer: see T5Batch._cross


class T5Decoder:
    """What is the same for all batches of one model."""

    def __init__(self, model: T5ForConditionalGeneration, cross_cache: CrossCache = CrossCache.BY_RULE) -> None:
        config = model.config
        decoder_blocks: Any = modules.opened(model.decoder, T5Stack).block
        self.device = model.device
        self.vocabulary_size = config.vocab_size
        self.max_positions: int | None = None  # relative positions have no end
        self.start_token = _start_token(model)
        self.model_width = model.model_dim
        self.embed_encoder, self.embed = model.encoder.embed_tokens, model.decoder.embed_tokens
        self.dtype = self.embed(torch.tensor([self.start_token], device=self.device)).dtype
        self.encoder = T5Encoder(model.encoder)
        self.encoder_exits = EncoderExits.of(model)
        cross_attentions = [_cross_attention(block) for block in decoder_blocks]
        self.latent = joint_latent(cross_attentions)
        self.blocks = [_decoder_block(block, reads_latent=self.latent is not None) for block in decoder_blocks]
        self.cross_cache = CrossCache.LATENT if keeps_latent(self.latent, cross_cache, cross_attentions) else CrossCache.EXPANDED
        if self.latent is not None and self.cross_cache is CrossCache.LATENT:
            self.latent.absorb(self.dtype)
        self.relative_bias: Any = decoder_blocks[0].layer[0].SelfAttention
        scales_output = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        scale = model.model_dim**-0.5 if scales_output else 1.0
        self.head = modules.normed_head(model.decoder.final_layer_norm, model.lm_head, scale)
        self.exits = ExitHeads.of(model, scale)
        self.num_layers = len(self.blocks)
        self.clamp = clamp_float16 if self.dtype == torch.float16 else keep
        # Encoding a few prompts at a time keeps the feed-forward's activations in a CPU's cache.
        self.max_prefill_tokens = 512 if self.device.type == "cpu" else 32768
        self._bias_HL = torch.zeros(0, 0)

    def new_batch(self, width: int) -> T5Batch:
        return T5Batch(self, width)

    def bias(self, num_columns: int) -> Float[Tensor, "H L"]:
        """The bias of the newest token on the last so many columns, itself included."""
        if self._bias_HL.shape[-1] < num_columns:
            num_all = -(-num_columns // COLUMN_BLOCK) * COLUMN_BLOCK
            self._bias_HL = self.relative_bias.compute_bias(1, num_all, device=self.device, past_seen_tokens=num_all - 1)[0, :, 0]
        return self._bias_HL[:, self._bias_HL.shape[-1] - num_columns :]


class T5Batch:
    """The rows that decode together."""

    def __init__(self, decoder: T5Decoder, width: int) -> None:
        self.decoder = decoder
        self.width = width
        shapes = [(block.num_heads, block.head_width) for block in decoder.blocks]
        self.cache = KVCache(shapes, width=width, num_state=state_width(decoder, width), dtype=decoder.dtype, device=decoder.device)
        self.latent = decoder.latent if decoder.cross_cache is CrossCache.LATENT else None
        where: Any = {"dtype": decoder.dtype, "device": decoder.device}
        self.cross = SlotStore(shapes, **where) if self.latent is None else LatentStore(self.latent.rank, **where)
        self.lengths: list[int] = []  # of the prompts
        self.encoder_depths: list[int] = []  # how many layers of the encoder each went through
        self._cross_views: list[tuple[Tensor, Tensor, Tensor | None]] | None = None

    @property
    def num_rows(self) -> int:
        return self.cache.num_rows

    def admit(self, prompts: Sequence[Sequence[int]], thresholds: Sequence[float] = ()) -> list[int]:
        """Encodes the prompts into new rows after the present ones; each row's first decoder token.

        `thresholds`: above which confidence a prompt may leave the encoder, one for each; none are given where none may."""
        num_before = self.num_rows
        self.cache.admit([0] * len(prompts))
        num_slots = self.cache.store.num_slots // self.width
        self.cross.reserve(num_slots, max(map(len, prompts)), used_slots=num_before, used_columns=max(self.lengths, default=0))
        for chunk in prefill_chunks([len(prompt) for prompt in prompts], self.decoder.max_prefill_tokens):
            self._encode(prompts[chunk], num_before + chunk.start, thresholds[chunk])
        self.lengths += [len(prompt) for prompt in prompts]
        self._cross_views = None
        return [self.decoder.start_token] * len(prompts)

    def rearrange(self, order: Sequence[int]) -> None:
        """Keeps the rows `order`, in that order."""
        self.cross.rearrange(order, width=1, num_columns=max(self.lengths, default=0))
        self.lengths = [self.lengths[row] for row in order]
        self.encoder_depths = [self.encoder_depths[row] for row in order]
        self.cache.rearrange(order)
        self._cross_views = None

    def reorder_slots(self, sources: Sequence[int], num_steps: int) -> None:
        """Slot i continues slot sources[i], which is one of the same row; the rows have made so many steps."""
        self.cache.reorder_slots(torch.tensor(sources, device=self.decoder.device), self.cache.column - num_steps)

    def step(self, tokens: Sequence[int]) -> Float[Tensor, "S V"]:
        """The logits after each slot's newest token."""
        hidden_SM, view = self.embed(tokens), self.look()
        for index in range(len(self.decoder.blocks)):
            hidden_SM = self.layer(index, hidden_SM, view)
        self.cache.advance()
        return self.decoder.head(hidden_SM)

    def embed(self, tokens: Sequence[int]) -> Float[Tensor, "S M"]:
        """The states of each slot's newest token before the first layer."""
        return self.decoder.embed(torch.tensor(tokens, device=self.decoder.device))

    def look(self) -> View:
        """What the layers of a step see for the newest token of every slot."""
        window = self.cache.window()
        return View(window=window, bias=self._self_biases(window), cross=self._cross())

    def layer(self, index: int, hidden_SM: Tensor, view: View) -> Tensor:
        """Layer `index` for the newest token of every slot. The states may be overwritten."""
        block = self.decoder.blocks[index]
        num_slots, num_heads = hidden_SM.shape[0], block.num_heads
        qkv_S3HD = block.self_qkv(hidden_SM).view(num_slots, 3, num_heads, block.head_width)
        view.window.written[index].copy_(qkv_S3HD[:, 1:].transpose(0, 1))
        open_O = open_tokens(block.gate, hidden_SM)
        if open_O is not None and not len(open_O):
            return hidden_SM
        queries = qkv_S3HD[:, 0].reshape(num_slots * num_heads, 1, block.head_width)
        attended = modules.attend(queries, view.window.keys[index], view.window.values[index], view.bias, 1.0).view(num_slots, -1)
        through_OM = self.decoder.clamp(block.add_self_output(of_open(hidden_SM, open_O), of_open(attended, open_O)))
        return put_back(hidden_SM, self._across(index, through_OM, view, self.width, open_O, num_slots), open_O)

    def _across(self, index: int, hidden_OM: Tensor, view: View, num_queries: int, open_O: Tensor | None, num_slots: int) -> Tensor:
        """Layer `index` after self-attention, for the open ones of so many slots."""
        block = self.decoder.blocks[index]
        queries = block.cross_q(hidden_OM)
        if open_O is not None:
            queries = queries.new_zeros(num_slots, queries.shape[1]).index_copy_(0, open_O, queries)
        attended = of_open(self._attend_cross(index, queries, view.cross[index], num_queries), open_O)
        hidden_OM = self.decoder.clamp(block.add_cross_output(hidden_OM, attended))
        return self.decoder.clamp(block.feed_forward(hidden_OM))

    def look_at(self, part: Part, view: View) -> View:
        """What the layers see for a part; of batches with one slot a row."""
        rows, num_rows, num_queries = part.rows_R, len(part.rows), part.num_queries
        bias_HL = self.decoder.bias(view.window.num_columns)
        num_heads, num_columns = bias_HL.shape
        # Counted from a token that is older by n, each column is nearer by n.
        longer_HL = F.pad(bias_HL, (0, num_queries - 1), value=-torch.inf)
        bias = longer_HL.unfold(1, num_columns, 1).flip(1).expand(num_rows, -1, -1, -1)
        if view.window.hidden is not None:
            bias = bias + view.window.hidden[rows][:, None]
        cross = [tuple(None if x is None else _of_rows(x, part) for x in of_layer) for of_layer in view.cross]
        return View(window=view.window, bias=bias.reshape(num_rows * num_heads, num_queries, num_columns), cross=cross)  # pyright: ignore[reportArgumentType]

    def look_for_keys(self, part: Part, view: View) -> View:
        """What is enough for `write`."""
        return view

    def write(self, index: int, hidden_NM: Tensor, part: Part, view: View) -> Tensor:
        """Layer `index` begins for a part: its keys and values are kept, its queries are the result."""
        block = self.decoder.blocks[index]
        qkv_N3HD = block.self_qkv(hidden_NM).view(len(hidden_NM), 3, block.num_heads, block.head_width)
        self.cache.store.layers[index][:, part.rows_N, :, part.columns_N] = qkv_N3HD[:, 1:]
        return qkv_N3HD[:, 0]

    def read(self, index: int, hidden_NM: Tensor, queries_NHD: Tensor, part: Part, view: View) -> Tensor:
        """Layer `index` goes on from the queries. The states may be overwritten."""
        block, num_queries = self.decoder.blocks[index], part.num_queries
        open_O = open_tokens(block.gate, hidden_NM)
        if open_O is not None and not len(open_O):
            return hidden_NM
        keys, values = self.cache.of_rows(index, part, view.window)
        padded = part.padded(queries_NHD).view(-1, num_queries, block.num_heads, block.head_width).transpose(1, 2).reshape(-1, num_queries, block.head_width)
        attended = modules.attend(padded, keys, values, view.bias, 1.0)
        attended = attended.view(-1, block.num_heads, num_queries, block.head_width).transpose(1, 2).reshape(len(part.rows) * num_queries, -1)
        before_NM = None if open_O is None else hidden_NM.clone()
        hidden_NM = self.decoder.clamp(block.add_self_output(hidden_NM, part.unpadded(attended)))
        attended = self._attend_cross(index, part.padded(block.cross_q(hidden_NM)), view.cross[index], num_queries)
        hidden_NM = self.decoder.clamp(block.add_cross_output(hidden_NM, part.unpadded(attended)))
        if before_NM is None:
            return self.decoder.clamp(block.feed_forward(hidden_NM))
        return put_back(before_NM, self.decoder.clamp(block.feed_forward(of_open(hidden_NM, open_O))), open_O)

    def _attend_cross(self, index: int, queries: Tensor, cross: tuple[Tensor, Tensor, Tensor | None], num_queries: int) -> Tensor:
        """Cross-attention of layer `index` for so many queries a row, which are beams or tokens: they go to one copy of its keys."""
        block, num_slots = self.decoder.blocks[index], len(queries)
        if self.latent is not None:
            queries = self.latent.queries(index, queries, num_queries)
        elif num_queries == 1:
            queries = queries.view(num_slots * block.num_heads, 1, block.head_width)
        else:
            queries = queries.view(-1, num_queries, block.num_heads, block.head_width).transpose(1, 2).reshape(-1, num_queries, block.head_width)
        attended = modules.attend(queries, *cross, 1.0)
        if self.latent is not None:
            attended = self.latent.outputs(index, attended)
        elif num_queries > 1:
            attended = attended.view(-1, block.num_heads, num_queries, block.head_width).transpose(1, 2)
        return attended.reshape(num_slots, -1)

    def _self_biases(self, window: Window) -> Float[Tensor, "S*H 1 L"]:
        bias_HL = self.decoder.bias(window.num_columns)
        num_heads, num_columns = bias_HL.shape
        if window.hidden is None:
            bias = bias_HL.expand(self.num_rows * self.width, num_heads, num_columns)
        else:
            bias = (bias_HL + window.hidden)[:, None].expand(-1, self.width, -1, -1)
        return bias.reshape(-1, 1, num_columns)

    def _cross(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Keys (R*H, D, E), values (R*H, E, D) and mask (R*H, 1, E) of every layer; of latents (R, C, E), (R, E, C) and (R, 1, E)."""
        if self._cross_views is None:
            num_columns, hidden_R1E = max(self.lengths), _hidden_after(self.lengths, self.decoder)
            if isinstance(self.cross, LatentStore):
                latents_REC = self.cross.latents_REC[: self.num_rows, :num_columns]
                self._cross_views = [(latents_REC.transpose(1, 2), latents_REC, hidden_R1E)] * len(self.decoder.blocks)
                return self._cross_views
            self._cross_views = []
            for layer in self.cross.layers:
                num_heads = layer.shape[2]
                keys, values = layer.flatten(1, 2)[:, : self.num_rows * num_heads, :num_columns].unbind(0)
                hidden = None if hidden_R1E is None else hidden_R1E.expand(-1, num_heads, -1).reshape(-1, 1, num_columns)
                self._cross_views.append((keys.transpose(1, 2), values, hidden))
        return self._cross_views

    def _encode(self, prompts: Sequence[Sequence[int]], first_row: int, thresholds: Sequence[float]) -> None:
        decoder, lengths = self.decoder, [len(prompt) for prompt in prompts]
        num_rows, num_columns = len(prompts), max(lengths)
        tokens_RE = torch.tensor([[*prompt, *[0] * (num_columns - len(prompt))] for prompt in prompts], device=decoder.device)
        hidden_REM, hidden_R1E = decoder.embed_encoder(tokens_RE), _hidden_after(lengths, decoder)
        if decoder.encoder_exits is not None and any(threshold < NEVER for threshold in thresholds):
            encoded_REM, depths = decoder.encoder_exits(decoder.encoder, hidden_REM, lengths, hidden_R1E, decoder.clamp, thresholds)
        else:
            encoded_REM, depths = decoder.encoder(hidden_REM, hidden_R1E, decoder.clamp), [len(decoder.encoder.blocks)] * num_rows
        self.encoder_depths += depths
        if decoder.latent is not None:
            encoded_REM = decoder.latent.project(encoded_REM)
        if isinstance(self.cross, LatentStore):
            self.cross.latents_REC[first_row : first_row + num_rows, :num_columns] = encoded_REM
            return
        for block, layer in zip(decoder.blocks, self.cross.layers, strict=True):
            for place, states in enumerate(block.cross_kv(encoded_REM)):
                states_RHED = states.view(num_rows, num_columns, block.num_heads, block.head_width).transpose(1, 2)
                layer[place, first_row : first_row + num_rows, :, :num_columns] = states_RHED


def _decoder_block(block: Any, *, reads_latent: bool) -> DecoderBlock:
    own, cross, last = modules.opened(block, T5Block).layer
    attention = modules.opened(modules.opened(own, T5LayerSelfAttention).SelfAttention, T5Attention)
    cross_attention = _cross_attention(block)
    cross_kv = [cross_attention.k, cross_attention.v]
    return DecoderBlock(
        gate=layer_gate(block),
        self_qkv=modules.normed_joint(own.layer_norm, [attention.q, attention.k, attention.v]),
        add_self_output=modules.residual_linear(attention.o),
        cross_q=modules.normed_joint(cross.layer_norm, [cross_attention.q]),
        cross_kv=modules.separate_linears([linear.up for linear in cross_kv] if reads_latent else cross_kv),
        add_cross_output=modules.residual_linear(cross_attention.o),
        feed_forward=feed_forward(last),
        num_heads=attention.n_heads,
        head_width=attention.key_value_proj_dim,
    )


def _cross_attention(block: Any) -> Any:
    return modules.opened(modules.opened(modules.opened(block, T5Block).layer[1], T5LayerCrossAttention).EncDecAttention, T5Attention)


def _of_rows(x: Tensor, part: Part) -> Tensor:
    """Of (all rows * n, ...), what belongs to a part's."""
    return x if part.has_all_rows else x.unflatten(0, (part.num_all_rows, -1))[part.rows_R].flatten(0, 1)


def _hidden_after(lengths: Sequence[int], decoder: T5Decoder) -> Int[Tensor, "R 1 E"] | None:
    """Minus infinity after each row's end, 0 before; None where all rows are equally long."""
    num_columns = max(lengths)
    if min(lengths) == num_columns:
        return None
    lengths_R1 = torch.tensor(lengths, device=decoder.device)[:, None]
    after_RE = torch.arange(num_columns, device=decoder.device) >= lengths_R1
    return torch.zeros(after_RE.shape, dtype=decoder.dtype, device=decoder.device).masked_fill_(after_RE, -torch.inf)[:, None]


def _start_token(model: T5ForConditionalGeneration) -> int:
    for config in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(config, name, None)
            if token is not None:
                return int(token)
    raise ValueError("the model's configuration has no decoder_start_token_id; set it (T5 uses the padding token's id)")
