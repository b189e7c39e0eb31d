"""The loss of recovery: a compressed student learns the rows again, and beside them what the uncompressed student would say at each token.

    L = sum over parts p of   weight_p * (hard_weight * CE_p + kl_weight * KL_p)
    KL_p = T^2 * mean over target tokens n of p of   sum_v q_nv * (log q_nv - log s_nv),   q = softmax(teacher / T), s = softmax(student / T)

Source: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", section 2. T^2 keeps the size of the gradient as T grows; as it goes to
infinity, T^2 KL goes to half the mean of the squared differences of the logits, both without their means (equation 4). CE is that of the multitask loss
(multitask.py), whose parts and weights these are. Each part comes twice in the sums, so that the log shows cross-entropy and KL apart: label, rationale,
kl_label, kl_rationale.

The teacher's logits are computed as they are needed, for the same rows and the real target tokens only, and its derivative is known in closed form: softmax in
float32 is taken in chunks of tokens, and nothing of the size (N V) is kept but the gradient.

Shapes: N target tokens without padding, V vocabulary, P parts of this loss, Q parts of the multitask loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmdistill.batches import Batch
from llmdistill.losses.loss import cross_entropy_P, target_logits_NV
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly

KL_OF = "kl_"
CHUNK_NUMBERS = 2**22  # of logits at a time: 16 MB in float32


class FrozenTeacher:
    """What a model says that is frozen and put to evaluation.

    It is held here and nowhere else: this is no module, so that the loop (train.Objective) neither trains it, nor saves it, nor shards it, and its dropout
    stays off. It follows the batches to their device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, student: nn.Module, batch: Batch) -> Float[Tensor, "N V"]:
        """Its logits for each target token."""
        if student is self.model:
            raise ValueError("the student is its teacher too, which is frozen; give the loss a model of its own")
        if next(self.model.parameters()).device != batch.target_N.device:
            self.model.to(batch.target_N.device)
        return target_logits_NV(self.model, batch)


class RecoveryLoss:
    """The multitask loss beside KL(teacher || student)."""

    def __init__(
        self,
        teacher: nn.Module,
        multitask: Multitask | LabelOnly | RationaleOnly,
        *,
        hard_weight: float = 1.0,
        kl_weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        if min(hard_weight, kl_weight) < 0 or not hard_weight + kl_weight > 0:
            raise ValueError(f"hard_weight is {hard_weight} and kl_weight {kl_weight}; give 0 or more, and one of them more than 0")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; give more than 0, such as 1 or 2")
        self.teacher = FrozenTeacher(teacher)
        self.multitask, self.hard_weight, self.kl_weight, self.temperature = multitask, hard_weight, kl_weight, temperature

    @property
    def parts(self) -> tuple[str, ...]:
        """The multitask loss's, and the KL of each."""
        return (*self.multitask.parts, *(KL_OF + part for part in self.multitask.parts))

    @property
    def weights(self) -> tuple[float, ...]:
        """What each part's mean counts."""
        own = self.multitask.weights
        return (*(self.hard_weight * weight for weight in own), *(self.kl_weight * weight for weight in own))

    def counts_P(self, batch: Batch) -> Int[Tensor, " P"]:
        """Target tokens of each part; cross-entropy and KL are of the same ones."""
        return self.multitask.counts_P(batch).repeat(2)

    def sums_P(self, model: nn.Module, batch: Batch) -> Float[Tensor, " P"]:
        """Summed losses of each part. Both models run once."""
        teacher_NV = self.teacher(model, batch)
        student_NV = target_logits_NV(model, batch)
        if teacher_NV.shape != student_NV.shape:
            raise ValueError(
                f"the teacher of a recovery has {teacher_NV.shape[1]} tokens and the student {student_NV.shape[1]}: take the student as it was before"
            )
        num_parts = len(self.multitask.parts)
        smoothing = self.multitask.label_smoothing if model.training else 0.0
        hard_Q = cross_entropy_P(student_NV, batch, num_parts=num_parts, label_smoothing=smoothing)
        kl_N = token_kl_N(student_NV, teacher_NV, self.temperature)
        kl_Q = kl_N @ F.one_hot(batch.part_N, num_parts).to(kl_N.dtype)
        return torch.cat([hard_Q, kl_Q])


def token_kl_N(student_NV: Float[Tensor, "N V"], teacher_NV: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, " N"]:
    """T^2 KL(teacher || student) of each token, in float32 or above. The gradient is the student's alone."""
    result: Any = _TokenKL.apply(student_NV, teacher_NV.detach(), temperature)
    return result


class _TokenKL(torch.autograd.Function):
    """d(T^2 KL)/d student_v = T * (s_v - q_v), found beside the value: so every softmax is taken once."""

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
        wide = torch.promote_types(student_NV.dtype, torch.float32)
        gradient_NV = torch.empty_like(student_NV) if ctx.needs_input_grad[0] else None
        kl_N = student_NV.new_empty(len(student_NV), dtype=wide)
        num_rows = max(1, CHUNK_NUMBERS // student_NV.shape[1])
        for first in range(0, len(student_NV), num_rows):
            rows = slice(first, first + num_rows)
            log_s_MV = (student_NV[rows].to(wide) / temperature).log_softmax(-1)
            log_q_MV = (teacher_NV[rows].to(wide) / temperature).log_softmax(-1)
            q_MV = log_q_MV.exp()
            kl_N[rows] = log_q_MV.sub_(log_s_MV).mul_(q_MV).sum(-1) * temperature**2
            if gradient_NV is not None:
                gradient_NV[rows] = log_s_MV.exp_().sub_(q_MV).mul_(temperature)
        if gradient_NV is not None:
            ctx.save_for_backward(gradient_NV)
        return kl_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * gradients[0][:, None].to(gradient_NV.dtype), None, None
