"""Prompts that leave a T5's encoder at layers of their own: each goes on until the gate of an exit is sure enough, and the decoder reads what it left with.

Rows that stay are compacted, as in the decoder (exiting.py). Nothing has to be made up for later: a prompt is encoded once.

Shapes: R rows, E encoder columns, M model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llmdistill.models.exit_settings import NEVER
from llmdistill.models.exits import exits_of

if TYPE_CHECKING:
    from torch import Tensor

    from llmdistill.decode.t5_encoder import T5Encoder


class EncoderExits:
    """The exits of a model's encoder."""

    def __init__(self, layers: Sequence[int], exits: Any) -> None:
        self.layers, self._exits = layers, exits

    @classmethod
    def of(cls, model: Any) -> EncoderExits | None:
        """Those of a model; None where its encoder has none."""
        found = exits_of(model)
        return cls(found[0].encoder_layers, found[1]) if found is not None and found[0].encoder_layers else None

    def __call__(
        self,
        encoder: T5Encoder,
        hidden_REM: Tensor,
        lengths: Sequence[int],
        hidden_R1E: Tensor | None,
        clamp: Callable[[Tensor], Tensor],
        thresholds: Sequence[float],
    ) -> tuple[Tensor, list[int]]:
        """What the decoder reads of every row, and how many layers each went through."""
        num_layers = len(encoder.blocks)
        encoded_REM, depths = torch.empty_like(hidden_REM), [num_layers] * len(lengths)
        rows, first = list(range(len(lengths))), 0
        for place, last in enumerate([*self.layers, num_layers]):
            hidden_REM = encoder.layers(range(first, last), hidden_REM, hidden_R1E, clamp)
            if last == num_layers:
                encoded_REM[rows] = encoder.norm(hidden_REM)
                break
            if all(thresholds[row] >= NEVER for row in rows):
                first = last
                continue
            read_REM = self._exits.encoded(place, hidden_REM)
            columns = torch.arange(read_REM.shape[1], device=read_REM.device)
            mask_RE = columns < torch.tensor([lengths[row] for row in rows], device=read_REM.device)[:, None]
            confidences = self._exits.encoder_gate(place, read_REM, mask_RE).float().sigmoid().tolist()
            leaves = [confidence > thresholds[row] for row, confidence in zip(rows, confidences, strict=True)]
            for number, (row, leave) in enumerate(zip(rows, leaves, strict=True)):
                if leave:
                    encoded_REM[row], depths[row] = read_REM[number], last
            if all(leaves):
                break
            if any(leaves):
                stays = torch.tensor([number for number, leave in enumerate(leaves) if not leave], device=read_REM.device)
                rows = [rows[number] for number in stays.tolist()]
                hidden_REM, hidden_R1E = hidden_REM[stays], None if hidden_R1E is None else hidden_R1E[stays]
            first = last
        return encoded_REM, depths
