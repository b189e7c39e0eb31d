"""What rows lose at each threshold: the student's answers with tokens that leave early, against its answers at full depth.

    CORRECT      1 where the full student is right and this answer is wrong, so that the accuracy falls by no more than the mean of it
    SAME         1 where this answer is another than the full student's; needs no known answers

Both are 0 or 1 a row; what is gained by leaving early (a wrong answer that becomes right) does not count.

Shapes: T thresholds, n rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmdistill.exits.quality import Quality

if TYPE_CHECKING:
    from jaxtyping import Float

    from llmdistill.decode.decoding import Generated


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Every threshold's losses, and what it cost."""

    thresholds: Sequence[float]
    losses_Tn: Float[np.ndarray, "T n"]
    mean_layers_T: Sequence[float]
    """Decoder layers a token."""
    mean_encoder_layers_T: Sequence[float]
    """Encoder layers a row; 0 where none can leave early."""
    accuracy_T: Sequence[float | None]
    """None where no answers are known."""
    full_accuracy: float | None
    full_mean_layers: float
    """At full depth: all of them."""


def curve(
    decode: Callable[[float], Sequence[Generated]],
    read: Callable[[Generated], str | None],
    same: Callable[[str, str], bool],
    gold: Sequence[str | None],
    quality: Quality,
    thresholds: Sequence[float],
) -> Curve:
    """`decode` gives the rows' answers at a threshold, `read` what the task reads in one, `same` compares two of these; `gold` are the known ones."""
    if quality is Quality.CORRECT and any(one is None for one in gold):
        raise ValueError(f"{sum(one is None for one in gold)} of {len(gold)} rows have no known answer to be right by: calibrate with quality=SAME")

    def right_n(answers: Sequence[str | None]) -> Float[np.ndarray, " n"]:
        return np.array([answer is not None and known is not None and same(answer, known) for answer, known in zip(answers, gold, strict=True)], dtype=float)

    knows = all(one is not None for one in gold)
    at_full_depth = decode(1.0)
    full = [read(row) for row in at_full_depth]
    losses, mean_layers, mean_encoder_layers, accuracies = [], [], [], []
    for threshold in thresholds:
        rows = decode(threshold)
        answers = [read(row) for row in rows]
        mean_layers.append(_mean_layers(rows))
        mean_encoder_layers.append(sum(row.encoder_layers for row in rows) / len(rows))
        accuracies.append(float(right_n(answers).mean()) if knows else None)
        if quality is Quality.CORRECT:
            losses.append(np.maximum(0.0, right_n(full) - right_n(answers)))
        else:
            losses.append(np.array([not _alike(one, other, same) for one, other in zip(full, answers, strict=True)], dtype=float))
    return Curve(
        thresholds=tuple(thresholds),
        losses_Tn=np.array(losses),
        mean_layers_T=mean_layers,
        mean_encoder_layers_T=mean_encoder_layers,
        accuracy_T=accuracies,
        full_accuracy=float(right_n(full).mean()) if knows else None,
        full_mean_layers=_mean_layers(at_full_depth),
    )


def _mean_layers(rows: Sequence[Generated]) -> float:
    layers = [depth for row in rows for depth in row.layers]
    return sum(layers) / max(1, len(layers))


def _alike(one: str | None, other: str | None, same: Callable[[str, str], bool]) -> bool:
    """Two answers that cannot be read are alike."""
    return one is None and other is None if one is None or other is None else same(one, other)
