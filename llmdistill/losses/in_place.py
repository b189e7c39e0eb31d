"""The loss of an elastic student: the whole model learns the rows, and its sub-networks learn the rows and what the whole model says of them.

    L = sum over parts p of weight_p * (CE_p(whole) + number of sub-networks * (hard_weight * CE_p(sub) + kl_weight * KL_p(whole || sub)))

with CE and KL of sub-networks as means over all of them, so that each counts as much as the whole. The whole model's logits are the teacher at no further cost:
in-place distillation (Yu & Huang 2019, "Universally Slimmable Networks and Improved Training Techniques", section 3.3), with KL as in losses/recover.py and
no gradient to the teacher. Which sub-networks, and how the model becomes one, comes from outside (`guises`): elastic/strategy.py says it by the step.

Parts, beside those of the multitask loss: subnets_label, kl_label, and so on. In evaluation the sub-networks are always the same ones, so that the loss falls
when they get better and not when easier ones were drawn.

Shapes: N target tokens without padding, V vocabulary, P parts of this loss, Q parts of the multitask loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmdistill.batches import Batch
from llmdistill.losses.loss import cross_entropy_P, target_logits_NV
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.losses.recover import KL_OF, token_kl_N

SUBNETS = "subnets_"

Guise: TypeAlias = "Callable[[nn.Module], AbstractContextManager[None]]"
"""Makes the model one of its sub-networks within."""


@dataclass(frozen=True, kw_only=True)
class InPlaceLoss:
    """The multitask loss of the whole model, and the losses of its sub-networks."""

    multitask: Multitask | LabelOnly | RationaleOnly
    guises: Callable[[int], Sequence[Guise]]
    """The sub-networks of a step of training; as many at every step."""
    watched: Sequence[Guise]
    """The sub-networks of every evaluation."""
    num_subnets: int
    """At a step of training."""
    hard_weight: float = 0.0
    kl_weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if min(self.hard_weight, self.kl_weight) < 0 or not 0 < self.hard_weight + self.kl_weight < math.inf:
            raise ValueError(f"hard_weight is {self.hard_weight} and kl_weight {self.kl_weight}; give 0 or more, and one of them more than 0")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; give more than 0, such as 1 or 2")
        if self.num_subnets < 1 or not self.watched:
            raise ValueError(f"num_subnets is {self.num_subnets} and {len(self.watched)} are watched; give 1 or more of each")

    @property
    def parts(self) -> tuple[str, ...]:
        """The multitask loss's for the whole model, and cross-entropy and KL of the sub-networks."""
        own = self.multitask.parts
        return (*own, *(SUBNETS + part for part in own), *(KL_OF + part for part in own))

    @property
    def weights(self) -> tuple[float, ...]:
        """What each part's mean counts."""
        own, number = self.multitask.weights, self.num_subnets
        return (*own, *(number * self.hard_weight * weight for weight in own), *(number * self.kl_weight * weight for weight in own))

    def counts_P(self, batch: Batch) -> Int[Tensor, " P"]:
        """Target tokens of each part, once for each sub-network. Evaluation has its own number of these, and every mean stays one."""
        counts_Q = self.multitask.counts_P(batch)
        return torch.cat([counts_Q, counts_Q.repeat(2) * self.num_subnets])

    def sums_P(self, model: nn.Module, batch: Batch) -> Float[Tensor, " P"]:
        """Summed losses of each part. The whole model runs once, and each sub-network once."""
        num_parts = len(self.multitask.parts)
        smoothing = self.multitask.label_smoothing if model.training else 0.0
        part_NQ = F.one_hot(batch.part_N, num_parts)
        whole_NV = target_logits_NV(model, batch)
        whole_Q = cross_entropy_P(whole_NV, batch, num_parts=num_parts, label_smoothing=smoothing)
        guises = self.guises(batch.step) if model.training else self.watched
        hard_Q, kl_Q = torch.zeros_like(whole_Q), torch.zeros_like(whole_Q)
        for guise in guises:
            with guise(model):
                logits_NV = target_logits_NV(model, batch)
            hard_Q = hard_Q + cross_entropy_P(logits_NV, batch, num_parts=num_parts, label_smoothing=smoothing)
            kl_N = token_kl_N(logits_NV, whole_NV, self.temperature)
            kl_Q = kl_Q + kl_N @ part_NQ.to(kl_N.dtype)
        per_subnet = self.num_subnets / len(guises)
        return torch.cat([whole_Q, hard_Q * per_subnet, kl_Q * per_subnet])
