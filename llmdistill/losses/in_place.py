"""The loss of an elastic student: the whole model and its sub-networks learn the rows, and the sub-networks what the whole model says of them.

    L = sum over parts p of weight_p * (CE_p(whole) + number of sub-networks * (hard_weight * CE_p(sub) + kl_weight * KL_p(whole || sub)))

with CE and KL of sub-networks as means over all of them, so that each counts as much as the whole. The whole model's logits are the teacher at no further cost:
in-place distillation (Yu & Huang 2019, "Universally Slimmable Networks and Improved Training Techniques", section 3.3), with KL as in losses/recover.py and
no gradient to the teacher.

With a frozen teacher, the student as it was before, it is what all of them learn from, as in Once-for-All (Cai et al. 2020, section 3.3):

    L = sum over p of weight_p * (hard_weight * CE_p(whole) + kl_weight * KL_p(teacher || whole) + number * (... KL_p(teacher || sub)))

Which sub-networks, and how the model becomes one, comes from outside (`guises`): elastic/strategy.py says it by the step. In evaluation the sub-networks are
always the same ones, so that the loss falls when they get better and not when easier ones were drawn.

Parts, beside those of the multitask loss: whole_kl_label where there is a frozen teacher, subnets_label, kl_label, and so on.

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
from llmdistill.losses.recover import KL_OF, FrozenTeacher, token_kl_N

WHOLE, SUBNETS = "whole_", "subnets_"

Guise: TypeAlias = "Callable[[nn.Module], AbstractContextManager[None]]"
"""Makes the model one of its sub-networks within."""


@dataclass(frozen=True, kw_only=True)
class InPlaceLoss:
    """The losses of the whole model and of its sub-networks."""

    multitask: Multitask | LabelOnly | RationaleOnly
    guises: Callable[[int], Sequence[Guise]]
    """The sub-networks of a step of training; as many at every step."""
    watched: Sequence[Guise]
    """The sub-networks of every evaluation."""
    num_subnets: int
    """At a step of training."""
    teacher: FrozenTeacher | None = None
    """None for the whole model itself."""
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
        """The multitask loss's for the whole model, with KL where it has a teacher, and cross-entropy and KL of the sub-networks."""
        own, kinds = self.multitask.parts, ("", *((WHOLE + KL_OF,) if self.teacher else ()), SUBNETS, KL_OF)
        return tuple(kind + part for kind in kinds for part in own)

    @property
    def weights(self) -> tuple[float, ...]:
        """What each part's mean counts."""
        whole = (self.hard_weight, self.kl_weight) if self.teacher else (1.0,)
        factors = (*whole, self.num_subnets * self.hard_weight, self.num_subnets * self.kl_weight)
        return tuple(factor * weight for factor in factors for weight in self.multitask.weights)

    def counts_P(self, batch: Batch) -> Int[Tensor, " P"]:
        """Target tokens of each part, once for each sub-network. Evaluation has its own number of these, and every mean stays one."""
        counts_Q = self.multitask.counts_P(batch)
        return torch.cat([counts_Q.repeat(2 if self.teacher else 1), counts_Q.repeat(2) * self.num_subnets])

    def sums_P(self, model: nn.Module, batch: Batch) -> Float[Tensor, " P"]:
        """Summed losses of each part. The whole model runs once, and each sub-network and the teacher once."""
        num_parts = len(self.multitask.parts)
        smoothing = self.multitask.label_smoothing if model.training else 0.0
        part_NQ = F.one_hot(batch.part_N, num_parts)

        def hard_Q(logits_NV: Tensor) -> Tensor:
            return cross_entropy_P(logits_NV, batch, num_parts=num_parts, label_smoothing=smoothing)

        def soft_Q(logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
            kl_N = token_kl_N(logits_NV, teacher_NV, self.temperature)
            return kl_N @ part_NQ.to(kl_N.dtype)

        whole_NV = target_logits_NV(model, batch)
        sums = [hard_Q(whole_NV)]
        teacher_NV = whole_NV
        if self.teacher:
            teacher_NV = self.teacher(model, batch)
            sums.append(soft_Q(whole_NV, teacher_NV))
        guises = self.guises(batch.step) if model.training else self.watched
        subnets_Q, kl_Q = torch.zeros_like(sums[0]), torch.zeros_like(sums[0])
        for guise in guises:
            with guise(model):
                logits_NV = target_logits_NV(model, batch)
            subnets_Q, kl_Q = subnets_Q + hard_Q(logits_NV), kl_Q + soft_Q(logits_NV, teacher_NV)
        per_subnet = self.num_subnets / len(guises)
        return torch.cat([*sums, subnets_Q * per_subnet, kl_Q * per_subnet])
