"""The loss of skipping: a student with gates learns the rows, what it said when nothing was skipped, and to do little.

    L = sum over parts p of weight_p * (hard_weight * CE_p + kl_weight * KL_p(teacher || student)) + compute_weight * share of multiplications done

Source: Wang et al. 2018, "SkipNet", section 3.2: gates are hard forward and soft backward (models/skipping.py), and the reward of section 3.3 for
what is skipped, here as a penalty, whose gradient goes through the sigmoid likewise. KL is losses/recover.py's, and the teacher the student as it was; without
one CE counts alone. What the penalty counts is in losses/gates.py: what may be skipped is 1, however little of the model they are.

Shapes: N target tokens, V vocabulary, P parts of this loss, Q parts of the multitask loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmdistill.batches import Batch
from llmdistill.losses.gates import count, deciding_by, hard
from llmdistill.losses.loss import cross_entropy_P, target_logits_NV
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.losses.recover import KL_OF, FrozenTeacher, token_kl_N

COMPUTE = "compute"


@dataclass(frozen=True, kw_only=True)
class SkipLoss:
    """The multitask loss, KL from a teacher, and the share of multiplications done."""

    multitask: Multitask | LabelOnly | RationaleOnly
    costs: Mapping[str, int]
    """Multiplications behind each gate (losses.gates.gate_costs)."""
    compute_weight: float
    teacher: FrozenTeacher | None = None
    hard_weight: float = 0.5
    kl_weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if min(self.hard_weight, self.kl_weight) < 0 or not 0 < self.hard_weight + self.kl_weight < math.inf:
            raise ValueError(f"hard_weight is {self.hard_weight} and kl_weight {self.kl_weight}; give 0 or more, and one of them more than 0")
        if not 0 <= self.compute_weight < math.inf:
            raise ValueError(f"compute_weight is {self.compute_weight}; give 0 or more")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; give more than 0, such as 1 or 2")

    @property
    def parts(self) -> tuple[str, ...]:
        """The multitask loss's, the KL of each where there is a teacher, and compute."""
        own = self.multitask.parts
        return (*own, *((KL_OF + part for part in own) if self.teacher else ()), COMPUTE)

    @property
    def weights(self) -> tuple[float, ...]:
        """What each part's mean counts."""
        own = self.multitask.weights
        factors = (self.hard_weight, self.kl_weight) if self.teacher else (1.0,)
        return (*(factor * weight for factor in factors for weight in own), self.compute_weight)

    def counts_P(self, batch: Batch) -> Int[Tensor, " P"]:
        """Target tokens of each part, and multiplications."""
        counts_Q = self.multitask.counts_P(batch)
        return torch.cat([counts_Q.repeat(2 if self.teacher else 1), count(batch, self.costs)[None]])

    def sums_P(self, model: nn.Module, batch: Batch) -> Float[Tensor, " P"]:
        """Summed losses of each part, and multiplications done. The student and the teacher run once."""
        teacher_NV = self.teacher(model, batch) if self.teacher else None
        with deciding_by(model, self.costs, hard) as decided:
            student_NV = target_logits_NV(model, batch)
        return torch.cat([self.token_sums(student_NV, teacher_NV, batch, smooth=model.training), decided.cost(batch)[None]])

    def token_sums(self, student_NV: Tensor, teacher_NV: Tensor | None, batch: Batch, *, smooth: bool) -> Tensor:
        """CE, and KL where there is a teacher, of each part."""
        num_parts = len(self.multitask.parts)
        smoothing = self.multitask.label_smoothing if smooth else 0.0
        sums = [cross_entropy_P(student_NV, batch, num_parts=num_parts, label_smoothing=smoothing)]
        if teacher_NV is not None:
            kl_N = token_kl_N(student_NV, teacher_NV, self.temperature)
            sums.append(kl_N @ F.one_hot(batch.part_N, num_parts).to(kl_N.dtype))
        return torch.cat(sums)
