"""Search by gradients: a probability for every choice, learned on the validation rows by descent through the relaxed model (relaxed.py).

One vector of logits for each open decision; its softmax is the probabilities p. The weights are those that the elastic model was trained to and stay as they
are, so of the two alternating steps of DARTS and ProxylessNAS there is only the one that learns the architecture. Two forms:

- Paths.MIXED is DARTS (Liu et al. 2019, equation 2): the model computes the mean of all choices.
- Paths.SAMPLED is ProxylessNAS (Cai et al. 2019, section 3.2.1): the model computes one sampled choice of each decision, g, and the gradient is
  dL/dlogit_i = sum_j dL/dg_j p_j (delta_ij - p_i), its equation 4. The forward is so always a sub-network as it will be used, and not a mixture that never will
  be. This is the paper's estimator as it stands: there two paths are sampled at a time, since each further path costs memory; here prefixes give dL/dg_j for
  all j at once. Gumbel noise is not needed, since no gradient passes through the draw; it would only change the estimator's bias.

The loss is L / L_largest + weight E[cost] / cost_largest, with ProxylessNAS's expected cost (section 3.3.1; expected_cost.py), both as shares so that a weight
means the same for every student and cost. A sweep of weights, the least first and each going on from the logits of the one before, gives a front. Where there
are limits, the weight stays at the least and the expected excess over the limits, as a share, is added `excess_weight` times.

After each weight the most probable sub-network is asked about, and then samples of the distribution, flatter where it gives nothing new. With limits, those
that are over them (by true costs, which are free) are made smaller first (repair.py).

The budget: `gradient_share` of it goes into steps (each question.GRADIENT_PASSES times the step's share of the rows), the rest into asking. With little budget
there are fewer weights, fewer rows in a step, and longer steps.

Measured on a tiny T5 of which a known part does nothing (10 decisions, 3 seeds): the front's hypervolume is 0.61 with 20 evaluations in either form; that of
random search is 0.53 with 20, 0.58 with 60 and 0.60 with 150.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, ClassVar

from llmdistill.elastic.decisions import Decisions
from llmdistill.elastic.question import GRADIENT_PASSES, Question, Supernet
from llmdistill.elastic.repair import within_limits

if TYPE_CHECKING:
    from torch import Tensor

    from llmdistill.batches import Example
    from llmdistill.elastic.choice import Subnet

log = logging.getLogger(__name__)

_MOST_LEARNING_RATE = 0.5
_MANY_TRIES = 60  # one after the other that give nothing new; the distribution is 300 times as flat by then


class Paths(enum.Enum):
    """What the relaxed model computes in a step."""

    MIXED = "the mean of all choices (DARTS)"
    SAMPLED = "one choice of each decision, at random (ProxylessNAS)"


@dataclass(frozen=True, kw_only=True)
class Differentiable:
    """The settings.

    least_weight, most_weight: of the cost in the loss; those in between are as far apart in ratio. num_weights: at most so many.
    gradient_share: of the budget, for steps. rows_per_step: at most so many.
    travel: how far a logit can go while one weight holds; Adam's learning rate is that over the number of steps, so that much budget takes smaller steps.
    decay: of the logits towards equal probabilities, added to their gradient as in DARTS (appendix A.1.1), which keeps choices from becoming final.
    excess_weight: of being over the limits.
    """

    kind: ClassVar[str] = "differentiable"

    paths: Paths = Paths.SAMPLED
    least_weight: float = 0.05
    most_weight: float = 5.0
    num_weights: int = 12
    gradient_share: float = 0.5
    rows_per_step: int = 8
    travel: float = 6.0
    decay: float = 1e-3
    excess_weight: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.least_weight <= self.most_weight < math.inf:
            raise ValueError(f"least_weight is {self.least_weight} and most_weight {self.most_weight}: give numbers above 0, the least first")
        if not 0 < self.gradient_share < 1:
            raise ValueError(f"gradient_share is {self.gradient_share}: give more than 0 and less than 1, since both steps and asking need some budget")
        for name in ("num_weights", "rows_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        for name, least in (("travel", 1e-9), ("decay", 0.0), ("excess_weight", 0.0)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number {'above' if least else 'from'} 0")

    def run(self, question: Question, *, seed: int) -> None:
        """Ask until the budget is spent or nothing new is found."""
        if question.supernet is None:
            raise ValueError("a differentiable search takes gradients through the elastic model, and this question has none: give it a Supernet")
        if not question.supernet.examples:
            raise ValueError("a differentiable search learns on validation rows, and there are none: give the Supernet a few dozen")
        decisions = Decisions(question.space)
        if decisions.open:
            _Run(self, question, question.supernet, decisions, seed).run()
        else:
            question.ask(question.space.largest())


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a budget is divided: weights, steps for each, rows in a step, rows for the first look at the largest, and asks in all."""

    num_weights: int
    num_steps: int
    num_rows: int
    num_first_rows: int
    num_asks: int


def schedule(settings: Differentiable, budget: float, num_examples: int) -> Schedule:
    """At least one ask, and about as many weights as asks for each of them."""
    num_asks = max(1, math.floor(budget * (1 - settings.gradient_share)))
    for_steps = max(0.0, budget - num_asks)
    num_weights = max(1, min(settings.num_weights, round(math.sqrt(num_asks))))
    affordable = for_steps * num_examples / (GRADIENT_PASSES * 12 * num_weights)  # rows, if each weight is to have a dozen steps
    num_rows = max(1, min(settings.rows_per_step, num_examples, math.floor(affordable)))
    num_first_rows = min(num_examples, 4 * num_rows)
    num_steps = math.floor((for_steps * num_examples - num_first_rows) / (GRADIENT_PASSES * num_rows * num_weights) + 1e-9)
    return Schedule(num_weights=num_weights, num_steps=max(0, num_steps), num_rows=num_rows, num_first_rows=num_first_rows, num_asks=num_asks)


class _Run:
    """One search under way."""

    def __init__(self, settings: Differentiable, question: Question, supernet: Supernet, decisions: Decisions, seed: int) -> None:
        import torch

        from llmdistill.elastic.expected_cost import ExpectedCost
        from llmdistill.elastic.relaxed import RelaxedModel
        from llmdistill.elastic.rows import part_weights_P

        self.settings, self.question, self.supernet, self.decisions = settings, question, supernet, decisions
        self.random, self.generator = Random(seed), torch.Generator().manual_seed(seed)
        self.relaxed = RelaxedModel(supernet.model, decisions)
        self.cost = ExpectedCost(question.costs, decisions, [question.cost, *(limit.cost for limit in question.limits)])
        self.weights_P = part_weights_P(supernet.model, supernet.examples, supernet.loss)
        self.schedule = schedule(settings, question.left, len(supernet.examples))
        self.logits = [torch.zeros(len(decision.values), dtype=torch.float64, requires_grad=True) for decision in decisions.open]
        self.order = self._endless()

    def run(self) -> None:
        settings, plan, question = self.settings, self.schedule, self.question
        errors = self.cost.errors([question.space.sample(self.random) for _ in range(20)])
        log.info("expected costs are wrong by %s in the mean", ", ".join(f"{error:.1%} ({name})" for name, error in errors.items()))
        largest_loss = self._largest_loss() if plan.num_steps else 1.0
        ratio = (settings.most_weight / settings.least_weight) ** (1 / max(1, plan.num_weights - 1))
        num_before = len(question.asked)
        for number in range(plan.num_weights):
            weight = settings.least_weight if question.limits else settings.least_weight * ratio**number
            if plan.num_weights == 1 and not question.limits:
                weight = math.sqrt(settings.least_weight * settings.most_weight)
            self._learn(weight, largest_loss)
            is_last = number == plan.num_weights - 1
            self._ask(math.inf if is_last else num_before + round(plan.num_asks * (number + 1) / plan.num_weights))

    def _largest_loss(self) -> float:
        """Of the whole model, on some rows."""
        import torch

        from llmdistill.elastic.subnet import whole
        from llmdistill.models.modes import evaluating

        rows = [next(self.order) for _ in range(self.schedule.num_first_rows)]
        self.question.spend(len(rows) / len(self.supernet.examples))
        with torch.inference_mode(), whole(self.supernet.model), evaluating(self.supernet.model):
            found = float(self._loss(rows))
        if not (math.isfinite(found) and found > 0):
            raise ValueError(f"the loss of the whole model is {found} on validation rows: a differentiable search weighs against it, so it must be above 0")
        return found

    def _learn(self, weight: float, largest_loss: float) -> None:
        """The steps of one weight."""
        import torch

        num_steps = self.schedule.num_steps
        learning_rate = min(_MOST_LEARNING_RATE, self.settings.travel / max(1, num_steps))
        optimizer = torch.optim.Adam(self.logits, lr=learning_rate, betas=(0.5, 0.999), weight_decay=self.settings.decay)
        for _ in range(num_steps):
            rows = [next(self.order) for _ in range(self.schedule.num_rows)]
            self.question.spend(GRADIENT_PASSES * len(rows) / len(self.supernet.examples))
            with torch.inference_mode(False), torch.enable_grad():
                p = [logit.softmax(-1) for logit in self.logits]
                with self.relaxed.running(self._paths(p)):
                    loss = self._loss(rows).cpu() / largest_loss
                    gradients = torch.autograd.grad(loss + self._cost_term(p, weight), self.logits)
            for logit, gradient in zip(self.logits, gradients, strict=True):
                logit.grad = gradient
            if not all(bool(gradient.isfinite().all()) for gradient in gradients):
                raise ValueError(
                    f"the relaxed model's loss is {float(loss.detach())} of the whole model's, with gradients that are no numbers: try float32 weights"
                )
            optimizer.step()

    def _paths(self, p: Sequence[Tensor]) -> list[Tensor]:
        """What the model is run with."""
        if self.settings.paths is Paths.MIXED:
            return list(p)
        import torch
        import torch.nn.functional as F

        drawn = [F.one_hot(torch.multinomial(one.detach(), 1, generator=self.generator)[0], len(one)).double() for one in p]
        return [choice + (one - one.detach()) for choice, one in zip(drawn, p, strict=True)]  # the value of the draw, the gradient of the probabilities

    def _cost_term(self, p: Sequence[Tensor], weight: float) -> Tensor:
        cost_C = self.cost(p)
        term = weight * cost_C[0] / self.cost.largest_C[0]
        for limit, cost in zip(self.question.limits, cost_C[1:], strict=True):
            term = term + self.settings.excess_weight * (cost / limit.most - 1).clamp(min=0)
        return term

    def _loss(self, rows: Sequence[Example]) -> Tensor:
        """An estimate of the validation loss from a few rows, in float64."""
        from llmdistill.batches import collate

        model, loss = self.supernet.model, self.supernet.loss
        batch = collate(rows, causal=not model.config.is_encoder_decoder).to(model.device)
        return (self.weights_P * loss.sums_P(model, batch).double()).sum() * (len(self.supernet.examples) / len(rows))

    def _endless(self) -> Iterator[Example]:
        """All rows in random order, and again."""
        while True:
            yield from self.random.sample(self.supernet.examples, len(self.supernet.examples))

    def _ask(self, until: float) -> None:
        """The most probable sub-network, then samples until so many have been asked about."""
        import torch

        asked, temperature, num_tries = self.question.asked, 1.0, 0
        logits = [logit.detach() for logit in self.logits]
        self.question.ask(self._subnet([int(logit.argmax()) for logit in logits]))
        while len(asked) < until and num_tries < _MANY_TRIES:
            subnet = self._subnet([int(torch.multinomial((logit / temperature).softmax(-1), 1, generator=self.generator)) for logit in logits])
            if subnet in asked:
                temperature, num_tries = temperature * 1.1, num_tries + 1
            else:
                self.question.ask(subnet)
                num_tries = 0

    def _subnet(self, choices: Sequence[int]) -> Subnet:
        """The sub-network, or the nearest within the limits."""
        log_probabilities = [logit.detach().log_softmax(-1).tolist() for logit in self.logits]
        return self.decisions.subnet(within_limits(self.question, self.decisions, choices, log_probabilities))
