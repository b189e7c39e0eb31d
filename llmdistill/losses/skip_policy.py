"""The refinement of gates by reinforcement: each token draws whether it skips, and what made its row cheaper becomes more likely.

For a row r and the actions a that its gates drew, with probabilities sigmoid(logit) of being open,

    cost_r(a) = sum over its parts p of weight_p * mean over its tokens of (hard_weight * CE + kl_weight * KL) + compute_weight * share of multiplications done
    gradient of the gates = mean over rows and samples k of (cost_r(a_k) - mean of the other samples' costs) * gradient of log P(a_k)

Source: Wang et al. 2018, "SkipNet", section 3.3: hybrid reinforcement learning. The rest of the student learns beside the gates, from the supervised loss
of the same sampled runs. Where we differ: the reward of a gate is that of its whole row (SkipNet leaves out what earlier gates cost); the baseline is the mean
of the row's other samples, which leaves the gradient unbiased (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"); and the gates' gradient
stops at their inputs, so that a reward moves the gates alone. Which tokens open is drawn by losses/token_noise.py, so that a step's gradient is one however it
is split into micro-batches.

Parts are SkipLoss's and `policy`: the mean cost of a row, whose gradient is the one above. In evaluation gates are as in inference, and nothing is drawn.

Shapes: N target tokens, V vocabulary, R rows, P parts of this loss, K samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmdistill.batches import Batch
from llmdistill.losses.gates import Decided, Rule, deciding_by, hard, stack_of, target_rows_N
from llmdistill.losses.loss import target_logits_NV
from llmdistill.losses.recover import token_kl_N
from llmdistill.losses.skip import SkipLoss
from llmdistill.losses.token_noise import TokenNoise
from llmdistill.models.skipping import Skipping

POLICY = "policy"


@dataclass(frozen=True, kw_only=True)
class SkipPolicyLoss:
    """SkipLoss of sampled runs, and REINFORCE for the gates."""

    supervised: SkipLoss
    num_samples: int = 2
    policy_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise ValueError(f"num_samples is {self.num_samples}; give 2 or more, each of which is measured against the others")
        if not self.policy_weight > 0:
            raise ValueError(f"policy_weight is {self.policy_weight}; give more than 0, or use SkipLoss")

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.supervised.parts, POLICY)

    @property
    def weights(self) -> tuple[float, ...]:
        """Compute is in the policy's cost; by itself it is only reported."""
        return (*self.supervised.weights[:-1], 0.0, self.policy_weight)

    def counts_P(self, batch: Batch) -> Int[Tensor, " P"]:
        """SkipLoss's, and rows."""
        return torch.cat([self.supervised.counts_P(batch), batch.target_N.new_tensor([len(batch.input_EL)])])

    def sums_P(self, model: nn.Module, batch: Batch) -> Float[Tensor, " P"]:
        """Means over the samples, each of which runs the student once. The teacher runs once for all."""
        teacher_NV = self.supervised.teacher(model, batch) if self.supervised.teacher else None
        rules = self._drawing(batch) if model.training else [hard]
        sums, costs, log_probabilities = [], [], []
        for rule in rules:
            with deciding_by(model, self.supervised.costs, rule) as decided:
                student_NV = target_logits_NV(model, batch)
            token_sums = self.supervised.token_sums(student_NV, teacher_NV, batch, smooth=model.training)
            sums.append(torch.cat([token_sums, decided.cost(batch).detach()[None]]))
            costs.append(self._costs_R(student_NV, teacher_NV, decided, batch))
            if model.training:
                log_probabilities.append(decided.log_probabilities_R(batch))
        cost_KR = torch.stack(costs)
        policy = cost_KR.mean(0).sum()
        if log_probabilities:
            log_p_KR = torch.stack(log_probabilities)
            baseline_KR = (cost_KR.sum(0) - cost_KR) / (self.num_samples - 1)
            policy = policy + ((cost_KR - baseline_KR) * (log_p_KR - log_p_KR.detach())).mean(0).sum()
        return torch.cat([torch.stack(sums).mean(0), policy[None]])

    @torch.no_grad()
    def _costs_R(self, student_NV: Tensor, teacher_NV: Tensor | None, decided: Decided, batch: Batch) -> Float[Tensor, " R"]:
        """The cost of each row."""
        loss = self.supervised
        wide_NV = student_NV.to(torch.promote_types(student_NV.dtype, torch.float32))
        cost_N = F.cross_entropy(wide_NV, batch.target_N, reduction="none")
        if teacher_NV is not None:
            cost_N = loss.hard_weight * cost_N + loss.kl_weight * token_kl_N(student_NV, teacher_NV, loss.temperature)
        num_rows, num_parts = len(batch.input_EL), len(loss.multitask.parts)
        place_N = target_rows_N(batch) * num_parts + batch.part_N
        mean_RQ = cost_N.new_zeros(num_rows * num_parts).index_add(0, place_N, cost_N) / place_N.bincount(minlength=num_rows * num_parts).clamp(min=1)
        weights_Q = cost_N.new_tensor(loss.multitask.weights)
        return mean_RQ.view(num_rows, num_parts) @ weights_Q + loss.compute_weight * decided.shares_R(batch).to(cost_N.dtype)

    def _drawing(self, batch: Batch) -> list[Rule]:
        """A rule for each sample."""
        noise = TokenNoise(batch, self.seed)
        number_of = {path: number for number, path in enumerate(self.supervised.costs)}

        def rule_of(sample: int) -> Rule:
            def draw(path: str, call: int, module: Skipping, read_BLD: Tensor) -> tuple[Tensor, Tensor]:
                logits_BL = module.logits(read_BLD.detach())
                is_open_BL = noise.uniform_BL(stack_of(path), call, number_of[path], sample) < torch.sigmoid(logits_BL.detach().double())
                log_probability_BL = F.logsigmoid(torch.where(is_open_BL, logits_BL, -logits_BL))
                return is_open_BL.to(logits_BL.dtype), log_probability_BL

            return draw

        return [rule_of(sample) for sample in range(self.num_samples)]
