"""The mathematics that losses share: the student's logits where a target token is predicted, and cross-entropy summed by part.

Logits are computed for real target tokens only. With a vocabulary of 32,000 the head is a third of a small T5, and in a padded batch of labels and rationales
half of its rows would be thrown away.

Losses give sums and counts, never means: the loop divides by the counts of the whole step (train.py), so neither accumulation nor the number of processes can
change the gradient.

Shapes: B rows, L tokens, D model width, N target tokens without padding, V vocabulary, P parts of the loss.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmdistill.batches import Batch
from llmdistill.losses.t5_forward import decode, encode


def target_hidden_ND(model: nn.Module, batch: Batch) -> Float[Tensor, "N D"]:
    """The last hidden state at each position that predicts a target token, before the head."""
    hidden_ND = _causal_hidden(model, batch) if not batch.decoded else _decoder_hidden(model, batch)
    return hidden_ND.index_select(0, batch.position_N)


def target_logits_NV(model: nn.Module, batch: Batch) -> Float[Tensor, "N V"]:
    """The student's logits for each target token."""
    student: Any = model
    hidden_ND = target_hidden_ND(model, batch)
    if batch.decoded and student.config.scale_decoder_outputs:
        hidden_ND = hidden_ND * student.model_dim**-0.5
    return student.lm_head(hidden_ND)


def cross_entropy_P(logits_NV: Float[Tensor, "N V"], batch: Batch, *, num_parts: int, label_smoothing: float = 0.0) -> Float[Tensor, " P"]:
    """Cross-entropy in float32 or above, summed over the target tokens of each part."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    loss_N = F.cross_entropy(logits_NV, batch.target_N, reduction="none", label_smoothing=label_smoothing)
    return loss_N @ F.one_hot(batch.part_N, num_parts).to(loss_N.dtype)


def counts_P(batch: Batch, *, num_parts: int) -> Int[Tensor, " P"]:
    """Target tokens of each part."""
    return torch.bincount(batch.part_N, minlength=num_parts)


def _causal_hidden(model: Any, batch: Batch) -> Tensor:
    """Rows are padded on the right: causal attention alone keeps real tokens from padding."""
    hidden_BLD = model.model(input_ids=batch.input_EL, use_cache=False).last_hidden_state
    return hidden_BLD.flatten(0, 1)


def _decoder_hidden(model: Any, batch: Batch) -> Tensor:
    """The encoder runs once over all rows, the decoder once for each part."""
    encoded_ELD = encode(model, batch.input_EL, batch.mask_EL)
    hidden = []
    for decoded in batch.decoded:
        rows_G = decoded.rows_G
        hidden.append(decode(model, decoded.input_GT, encoded_ELD.index_select(0, rows_G), batch.mask_EL.index_select(0, rows_G)).flatten(0, 1))
    return torch.cat(hidden)
