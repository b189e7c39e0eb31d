"""The loss of a student with exits: every exit learns the rows, and what the last layer says of them; the gates learn where an exit is right.

    L = sum over parts p of weight_p * (w_last CE_p(last) + sum over exits i of w_i * (CE_p(i) + kl_weight * KL_p(last || i))) + gate_weight * BCE(gates)

with w_i = depth_i / sum of all depths, so that later exits count more (Schuster et al. 2022, "Confident Adaptive Language Modeling", section 3.3, equation 6).
KL is that of losses/recover.py, without a gradient to the last layer: self-distillation (Zhang et al. 2019, "Be Your Own Teacher"). A gate learns by binary
cross-entropy whether the exit's likeliest token is the last layer's, and teaches nothing below it.

While the whole student is trained, layers may be left out: layer l of L (from 0) at a rate of p (2^(l/(L-1)) - 1), so that the first is always there and the
last is left out at rate p (Elhoushi et al. 2024, "LayerSkip", section 4.1.1, equation 1). Where we differ: which ones is drawn for a step and not for a row,
as a function of seed and step, so that neither accumulation nor the number of processes changes it.

Exits of an encoder learn in the same way, from what the whole decoder makes of their states: they are weighted among themselves, and their sums are added to
those of the decoder's exits. Their gates learn whether all target tokens of a row are then the same as after the whole encoder.

Exits whose vocabulary is a part of the whole learn from the target tokens in it.

Parts, beside those of the multitask loss: exits_label, kl_exits_label, and so on, and gates. Each is a weighted sum over the exits, per target token.

Shapes: N target tokens without padding, V vocabulary, K tokens of the exits' vocabulary, P parts of this loss, Q parts of the multitask loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmdistill.batches import Batch
from llmdistill.losses.input_noise import with_noise
from llmdistill.losses.loss import cross_entropy_P, decoded_states_ND, head_NV, target_states_ND
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.losses.recover import KL_OF, token_kl_N
from llmdistill.losses.t5_forward import encode_states
from llmdistill.models.anatomy import stacks
from llmdistill.models.exits import exits_of

EXITS, GATES = "exits_", "gates"


@dataclass(frozen=True, kw_only=True)
class ExitLoss:
    """The losses of the last layer and of the exits."""

    multitask: Multitask | LabelOnly | RationaleOnly
    has_gates: bool
    trains_whole: bool
    """Else the exits alone learn, from states that stay as they are."""
    kl_weight: float = 1.0
    gate_weight: float = 1.0
    temperature: float = 1.0
    layer_dropout: float = 0.0
    input_noise: float = 0.0
    """The most of a row's input tokens that may be others while the exits are trained (losses/input_noise.py)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.kl_weight < math.inf or not 0 <= self.gate_weight < math.inf:
            raise ValueError(f"kl_weight is {self.kl_weight} and gate_weight {self.gate_weight}; give 0 or more")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; give more than 0, such as 1 or 2")
        if not 0 <= self.layer_dropout < 1:
            raise ValueError(f"layer_dropout is {self.layer_dropout}; give 0 or more and less than 1")
        if not 0 <= self.input_noise < 1:
            raise ValueError(f"input_noise is {self.input_noise}; give 0 or more and less than 1")
        if self.layer_dropout and not self.trains_whole:
            raise ValueError(f"layer_dropout is {self.layer_dropout}, and the layers are not trained: train the whole, or set layer_dropout=0")

    @property
    def parts(self) -> tuple[str, ...]:
        """The multitask loss's for the last layer, and cross-entropy and KL of the exits; the gates'."""
        own = self.multitask.parts
        return (*own, *(EXITS + part for part in own), *(KL_OF + EXITS + part for part in own), *((GATES,) if self.has_gates else ()))

    @property
    def weights(self) -> tuple[float, ...]:
        """What each part's mean counts."""
        own = self.multitask.weights
        return (*own, *own, *(self.kl_weight * weight for weight in own), *((self.gate_weight,) if self.has_gates else ()))

    def counts_P(self, batch: Batch) -> Int[Tensor, " P"]:
        """Target tokens of each part."""
        counts_Q = self.multitask.counts_P(batch)
        return torch.cat([counts_Q.repeat(3), counts_Q.sum()[None]] if self.has_gates else [counts_Q.repeat(3)])

    def sums_P(self, model: nn.Module, batch: Batch) -> Float[Tensor, " P"]:
        """Summed losses of each part. The decoder runs once, the head once for each exit."""
        found = exits_of(model)
        assert found is not None, "the student has exits before it is trained"
        settings, exits = found
        if self.input_noise and model.training:
            batch = with_noise(batch, self.input_noise, model.config.vocab_size, self.seed)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        num_parts, num_layers = len(self.multitask.parts), len(stacks(model)[-1].layers)  # pyright: ignore[reportArgumentType]
        shares, encoder_states = _shares(settings.layers, num_layers), []
        with torch.set_grad_enabled(self.trains_whole and torch.is_grad_enabled()):
            skipped = self.skipped(num_layers, batch.step) if model.training else ()
            if settings.encoder_layers:
                encoded_ELD, encoder_states = encode_states(model, batch.input_EL, batch.mask_EL, settings.encoder_layers)
                last_ND, states = decoded_states_ND(model, batch, encoded_ELD, settings.layers, skipped)
            else:
                last_ND, states = target_states_ND(model, batch, settings.layers, skipped)
            last_NV = head_NV(model, last_ND)
        vocabulary_K = exits.vocabulary_K if settings.num_vocabulary else None
        said_N, targets_N, teacher_NK = _within(vocabulary_K, last_NV, batch.target_N)
        part_NQ = F.one_hot(batch.part_N, num_parts) * (targets_N >= 0)[:, None]
        smoothing = self.multitask.label_smoothing if model.training else 0.0
        hard_Q, soft_Q, gates = 0.0, 0.0, last_ND.new_zeros(())
        for place, (state_ND, share) in enumerate(zip(states, shares, strict=False)):
            normed_ND = exits.read(place, state_ND)
            logits_NK = _head_NK(model, normed_ND, vocabulary_K)
            wide_NK = logits_NK.to(torch.promote_types(logits_NK.dtype, torch.float32))
            loss_N = F.cross_entropy(wide_NK, targets_N.clamp(min=0), reduction="none", label_smoothing=smoothing)
            hard_Q = hard_Q + share * (loss_N @ part_NQ.to(loss_N.dtype))
            kl_N = token_kl_N(logits_NK, teacher_NK, self.temperature)
            soft_Q = soft_Q + share * (kl_N @ part_NQ.to(kl_N.dtype))
            if exits.gates:
                is_right_N = logits_NK.argmax(-1) == said_N
                gates = gates + share * F.binary_cross_entropy_with_logits(
                    exits.gates[place](normed_ND.detach())[:, 0], is_right_N.to(normed_ND.dtype), reduction="sum"
                )
        for place, share in enumerate(_shares(settings.encoder_layers, len(stacks(model)[0].layers))[:-1]):  # pyright: ignore[reportArgumentType]
            encoded_ELD = exits.encoded(place, encoder_states[place])
            logits_NV = head_NV(model, decoded_states_ND(model, batch, encoded_ELD)[0])
            hard_Q = hard_Q + share * cross_entropy_P(logits_NV, batch, num_parts=num_parts, label_smoothing=smoothing)
            kl_N = token_kl_N(logits_NV, last_NV, self.temperature)
            soft_Q = soft_Q + share * (kl_N @ F.one_hot(batch.part_N, num_parts).to(kl_N.dtype))
            logit_E = exits.encoder_gate(place, encoded_ELD.detach(), batch.mask_EL)
            row_N = _row_N(batch)
            is_right_E = torch.ones_like(logit_E).scatter_reduce_(0, row_N, (logits_NV.argmax(-1) == last_NV.argmax(-1)).to(logit_E.dtype), "amin")
            gates = gates + share * F.binary_cross_entropy_with_logits(logit_E[row_N], is_right_E[row_N], reduction="sum")
        own_Q = shares[-1] * cross_entropy_P(last_NV, batch, num_parts=num_parts, label_smoothing=smoothing)
        return torch.cat([own_Q, hard_Q, soft_Q, *([gates[None].to(own_Q.dtype)] if self.has_gates else [])])  # pyright: ignore[reportArgumentType, reportCallIssue]

    def skipped(self, num_layers: int, step: int) -> list[int]:
        """The layers that are left out at a step of training."""
        if not self.layer_dropout:
            return []
        draws = np.random.default_rng([self.seed, step]).random(num_layers)
        return [layer for layer, draw in enumerate(draws) if draw < self.layer_dropout * (2 ** (layer / max(1, num_layers - 1)) - 1)]


def _shares(layers: Sequence[int], num_layers: int) -> list[float]:
    """What each exit counts, and the last layer."""
    return [depth / (sum(layers) + num_layers) for depth in (*layers, num_layers)]


def _row_N(batch: Batch) -> Tensor:
    """The row of the encoder that each target token belongs to."""
    rows = torch.cat([decoded.rows_G.repeat_interleave(decoded.input_GT.shape[1]) for decoded in batch.decoded])
    return rows.index_select(0, batch.position_N)


def _within(vocabulary_K: Tensor | None, last_NV: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the exits' vocabulary: what the last layer says, the targets (-1 for one that is not in it), the last layer's logits."""
    last_NV = last_NV.detach()
    said_N = last_NV.argmax(-1)
    if vocabulary_K is None:
        return said_N, target_N, last_NV
    place_V = torch.full((last_NV.shape[1],), -1, dtype=torch.long, device=last_NV.device)
    place_V[vocabulary_K] = torch.arange(len(vocabulary_K), device=last_NV.device)
    return place_V[said_N], place_V[target_N], last_NV[:, vocabulary_K]


def _head_NK(model: Any, normed_ND: Tensor, vocabulary_K: Tensor | None) -> Tensor:
    """What the head says in the exits' vocabulary, from the rows of its weight where it is a plain linear."""
    head = model.lm_head
    if vocabulary_K is None or type(head) is not nn.Linear:
        logits_NV = head_NV(model, normed_ND)
        return logits_NV if vocabulary_K is None else logits_NV[:, vocabulary_K]
    scale = model.model_dim**-0.5 if model.config.is_encoder_decoder and model.config.scale_decoder_outputs else 1.0
    return F.linear(normed_ND * scale, head.weight[vocabulary_K], None if head.bias is None else head.bias[vocabulary_K])
