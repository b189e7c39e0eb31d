"""How sure an exit is of its token: five measures with one interface, each from 0 to 1.

    top1        the largest probability
    gap         the largest minus the second largest probability (Schuster et al. 2022, "Confident Adaptive Language Modeling", section 3.5)
    entropy     1 - entropy / log K of the distribution over K tokens (Teerapittayanon et al. 2016, "BranchyNet", section III, turned round and scaled)
    saturation  the cosine of the states before and after the last layer (CALM, section 3.5), negative ones as 0
    gate        the sigmoid of the exit's gate: how likely it is to say what the last layer would say

The first three need the exit's logits, so the head runs at every exit that a token passes; the other two need none until a token leaves. The threshold that a
measure is held against may fall along the answer (CALM, equation 5), because an error late in it does less harm.

Shapes: N tokens, D model width, K tokens of the exits' vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch.nn.functional as F

from llmdistill.models.exit_settings import NEVER, Confidence

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What there is to judge by at an exit; what a measure does not need may be missing."""

    state_ND: Tensor
    before_ND: Tensor | None = None
    """The state before the exit's last layer."""
    normed_ND: Tensor | None = None
    """What the exit's gate and head read."""
    logits_NK: Tensor | None = None
    gate: Callable[[Tensor], Tensor] | None = None


def top1_N(seen: Seen) -> Float[Tensor, " N"]:
    return _given(seen.logits_NK, "logits").float().softmax(-1).amax(-1)


def gap_N(seen: Seen) -> Float[Tensor, " N"]:
    two_N2 = _given(seen.logits_NK, "logits").float().softmax(-1).topk(2).values
    return two_N2[:, 0] - two_N2[:, 1]


def entropy_N(seen: Seen) -> Float[Tensor, " N"]:
    logs_NK = _given(seen.logits_NK, "logits").float().log_softmax(-1)
    entropy_N = -(logs_NK.exp() * logs_NK).nan_to_num(0.0).sum(-1)  # 0 * -inf, where a probability is 0
    return (1 - entropy_N / math.log(logs_NK.shape[-1])).clamp(0, 1)


def saturation_N(seen: Seen) -> Float[Tensor, " N"]:
    return F.cosine_similarity(seen.state_ND.float(), _given(seen.before_ND, "states").float(), dim=-1).clamp(0, 1)


def gate_N(seen: Seen) -> Float[Tensor, " N"]:
    return _given(seen.gate, "a gate")(_given(seen.normed_ND, "normed states"))[:, 0].float().sigmoid()


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One of them, and what it needs."""

    confidence_N: Callable[[Seen], Tensor]
    needs_logits: bool = False
    needs_before: bool = False


MEASURES = {
    Confidence.TOP1: Measure(confidence_N=top1_N, needs_logits=True),
    Confidence.GAP: Measure(confidence_N=gap_N, needs_logits=True),
    Confidence.ENTROPY: Measure(confidence_N=entropy_N, needs_logits=True),
    Confidence.SATURATION: Measure(confidence_N=saturation_N, needs_before=True),
    Confidence.GATE: Measure(confidence_N=gate_N),
}


def decayed(threshold: float, decay: float, num_tokens: int, max_tokens: int) -> float:
    """The threshold of the token after so many of at most max_tokens: 0.9 threshold + 0.1 exp(-decay * share), at most 1 (CALM, equation 5).

    NEVER stays what it is, and so does any threshold where the decay is 0."""
    if threshold >= NEVER or decay == 0:
        return threshold
    return min(1.0, 0.9 * threshold + 0.1 * math.exp(-decay * num_tokens / max_tokens))


def _given(value: T | None, what: str) -> T:
    assert value is not None, f"this confidence needs {what}"
    return value
