"""The mathematics that losses share: the student's logits where a target token is predicted, and cross-entropy summed by part.

Logits are computed for real target tokens only. With a vocabulary of 32,000 the head is a third of a small T5, and in a padded batch of labels and rationales
half of its rows would be thrown away.

Losses give sums and counts, never means: the loop divides by the counts of the whole step (train.py), so neither accumulation nor the number of processes can
change the gradient.

Shapes: B rows, L tokens, D model width, N target tokens without padding, V vocabulary, P parts of the loss.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmdistill.batches import Batch
from llmdistill.losses.t5_forward import decode_states, encode


def target_hidden_ND(model: nn.Module, batch: Batch) -> Float[Tensor, "N D"]:
    """The last hidden state at each position that predicts a target token, before the head."""
    return target_states_ND(model, batch)[0]


def target_states_ND(
    model: nn.Module, batch: Batch, after: Sequence[int] = (), skipped: Sequence[int] = ()
) -> tuple[Float[Tensor, "N D"], list[Float[Tensor, "N D"]]]:
    """The last hidden state at each position that predicts a target token, before the head, and the states there after so many decoder layers each.

    Layers whose index is in `skipped` are left out."""
    if batch.decoded:
        return decoded_states_ND(model, batch, encode(model, batch.input_EL, batch.mask_EL), after, skipped)
    return _at_targets(batch, *_causal_states(model, batch, after, skipped))


def target_logits_NV(model: nn.Module, batch: Batch) -> Float[Tensor, "N V"]:
    """The student's logits for each target token."""
    return head_NV(model, target_hidden_ND(model, batch))


def head_NV(model: nn.Module, hidden_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
    """What the head says of normed states."""
    student: Any = model
    if student.config.is_encoder_decoder and student.config.scale_decoder_outputs:
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


def _causal_states(model: Any, batch: Batch, after: Sequence[int], skipped: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Rows are padded on the right: causal attention alone keeps real tokens from padding."""
    inner = model.model
    with _without_layers(inner, skipped):
        output = inner(input_ids=batch.input_EL, use_cache=False, output_hidden_states=bool(after))
    places = [depth - sum(index < depth for index in skipped) for depth in after]
    return output.last_hidden_state.flatten(0, 1), [output.hidden_states[place].flatten(0, 1) for place in places]


@contextmanager
def _without_layers(inner: Any, skipped: Sequence[int]) -> Iterator[None]:
    """A causal model's layers but these. An attribute of the object itself comes before a registered module of that name, so nothing is unregistered."""
    if not skipped:
        yield
        return
    assert "layers" not in vars(inner), "no layers are left out of a sub-network"
    vars(inner)["layers"] = nn.ModuleList(layer for index, layer in enumerate(inner.layers) if index not in skipped)
    try:
        yield
    finally:
        del vars(inner)["layers"]


def decoded_states_ND(
    model: Any, batch: Batch, encoded_ELD: Float[Tensor, "E L D"], after: Sequence[int] = (), skipped: Sequence[int] = ()
) -> tuple[Float[Tensor, "N D"], list[Float[Tensor, "N D"]]]:
    """As `target_states_ND`, for an encoder's output that is given; the decoder runs once for each part."""
    last: list[Tensor] = []
    states: list[list[Tensor]] = [[] for _ in after]
    for decoded in batch.decoded:
        rows_G = decoded.rows_G
        encoded, mask = encoded_ELD.index_select(0, rows_G), batch.mask_EL.index_select(0, rows_G)
        hidden, of_depths = decode_states(model, decoded.input_GT, encoded, mask, after, skipped)
        last.append(hidden.flatten(0, 1))
        for of_depth, state in zip(states, of_depths, strict=True):
            of_depth.append(state.flatten(0, 1))
    return _at_targets(batch, torch.cat(last), [torch.cat(of_depth) for of_depth in states])


def _at_targets(batch: Batch, last: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return last.index_select(0, batch.position_N), [state.index_select(0, batch.position_N) for state in states]
