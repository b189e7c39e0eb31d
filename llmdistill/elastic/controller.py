"""Search by a controller: a small recurrent network that writes a sub-network decision by decision, trained by REINFORCE on what its sub-networks are worth.

The controller is the LSTM of NASNet (Zoph and Le 2017, section 3.1) and ENAS (Pham et al. 2018, section 2.1): it reads what was chosen last and which decision
comes next, and gives the probabilities of that decision's values. Decisions about layers that the chosen depth leaves out are not made: they have no
probability in the gradient, and the next decision reads that there was none.

The reward is MnasNet's (Tan et al. 2019, section 3.1, equations 2 and 3), accuracy x product over costs of (cost / target)^w, where w is -`under` for a cost
within its target and -`over` above it; 0 and 1 are its hard form, 0.07 and 0.07 its soft one. Targets are the limits. Without limits the target is the cost of
the whole model and the exponent goes through `exponents`, each going on from the controller of the one before, which gives a front.

REINFORCE (Williams 1992): the gradient of log-probability times advantage, with a moving average of rewards as the baseline, and the entropy of the choices
added. Where we differ, because of a budget of tens or hundreds of evaluations and not thousands:

- the advantage is in moving standard deviations of the reward, so that one learning rate and entropy weight do for all exponents and scores;
- what was asked before is rewarded again at no cost, and while nothing new comes the distribution is made flatter;
- a sub-network over the limits cannot be the answer, and costs are free, so it is not asked about: it is rewarded as the worst so far is, times its penalty.

Shapes: B episodes, K decisions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmdistill.elastic.decisions import Decisions
from llmdistill.elastic.question import Question, excess

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmdistill.elastic.choice import Subnet

_FLATTER = 1.2  # for each update that gave nothing new
_MOST_STALE_UPDATES = 40  # the distribution is 1,500 times as flat by then
_MOST_FREE_UPDATES = 300  # one after the other, on what costs no evaluation
_ABSENT = 0  # what the controller reads where there was no choice


@dataclass(frozen=True, kw_only=True)
class Controller:
    """The settings.

    exponents: of the cost, where there are no limits; with little budget some are left out, so that each has `least_asks`.
    under, over: the exponents of costs within their limits and over them.
    baseline_decay: of the moving averages, an update. entropy_weight: of the entropy of a whole sub-network's choices, in nats.
    """

    kind: ClassVar[str] = "controller"

    exponents: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    least_asks: int = 30
    under: float = 0.0
    over: float = 1.0
    width: int = 32
    learning_rate: float = 0.01
    episodes_per_update: int = 5
    entropy_weight: float = 0.05
    baseline_decay: float = 0.8

    def __post_init__(self) -> None:
        if not self.exponents or any(not 0 < exponent < math.inf for exponent in self.exponents):
            raise ValueError(f"exponents are {self.exponents}: give one or more above 0")
        for name in ("least_asks", "width", "episodes_per_update"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        if not (0 <= self.under <= self.over < math.inf and self.over > 0):
            raise ValueError(f"under is {self.under} and over {self.over}: give under from 0, and over above 0 and not below it")
        if not (self.learning_rate > 0 and self.entropy_weight >= 0 and 0 <= self.baseline_decay < 1):
            raise ValueError(
                f"learning_rate is {self.learning_rate}, entropy_weight {self.entropy_weight} and baseline_decay {self.baseline_decay}: "
                "give a rate above 0, a weight from 0, and a decay from 0 and below 1"
            )

    def run(self, question: Question, *, seed: int) -> None:
        """Ask until the budget is spent or nothing new is found."""
        decisions = Decisions(question.space)
        if decisions.open:
            _Run(self, question, decisions, seed).run()
        if not question.asked:  # none keeps the limits: say so by the nearest
            question.ask(question.space.smallest())


class _Run:
    """One search under way."""

    def __init__(self, settings: Controller, question: Question, decisions: Decisions, seed: int) -> None:
        import torch

        self.settings, self.question, self.decisions = settings, question, decisions
        self.generator = torch.Generator().manual_seed(seed)
        self.largest_cost = question.costs(question.space.largest())[question.cost]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = _policy([len(decision.values) for decision in decisions.open], settings.width)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=settings.learning_rate)

    def run(self) -> None:
        """Exponent by exponent, or once with limits."""
        settings, num = self.settings, len(self.settings.exponents)
        if self.question.limits:
            return self._learn(0.0, math.inf)
        num_used = max(1, min(num, math.floor(self.question.left / settings.least_asks)))
        used = [settings.exponents[round((number + 0.5) * num / num_used - 0.5)] for number in range(num_used)]
        asked, for_each = len(self.question.asked), self.question.left / num_used
        for number, exponent in enumerate(used, start=1):
            self._learn(exponent, math.inf if number == num_used else asked + round(for_each * number))
        return None

    def _learn(self, exponent: float, until: float) -> None:
        """Updates until so many sub-networks have been asked about, or none is new for long."""
        import torch

        settings, asked, num_stale, num_free = self.settings, self.question.asked, 0, 0
        mean, square, num_updates = 0.0, 0.0, 0
        while len(asked) < until and num_stale < _MOST_STALE_UPDATES and num_free < _MOST_FREE_UPDATES:
            num_before = len(asked)
            with torch.inference_mode(False), torch.enable_grad():
                episodes, log_p_B, entropy = self._episodes(_FLATTER**num_stale)
                subnets = [self.decisions.subnet(episode) for episode in episodes]
                rewards = [self._reward(subnet, exponent) for subnet in subnets]
                num_updates += 1
                decay = min(settings.baseline_decay, 1 - 1 / num_updates)  # a plain mean at first
                mean = decay * mean + (1 - decay) * sum(rewards) / len(rewards)
                square = decay * square + (1 - decay) * sum(reward**2 for reward in rewards) / len(rewards)
                deviation = max(math.sqrt(max(0.0, square - mean**2)), 1e-8 * (1 + abs(mean)))
                advantages_B = torch.tensor([(reward - mean) / deviation for reward in rewards])
                loss = -(advantages_B * log_p_B).mean() - settings.entropy_weight * entropy
                self.optimizer.zero_grad()
                loss.backward()
            self.optimizer.step()
            is_new = len(asked) > num_before
            num_stale = num_stale + 1 if all(subnet in asked for subnet in subnets) and not is_new else 0  # those over the limits teach something still
            num_free = 0 if is_new else num_free + 1

    def _episodes(self, temperature: float) -> tuple[list[list[int]], Tensor, Tensor]:
        """Sub-networks as choices, their log-probabilities, and the entropy of all decisions that were made, in the mean over episodes."""
        import torch

        num = self.settings.episodes_per_update
        episodes: list[list[int]] = [[] for _ in range(num)]
        log_p_B, entropy, state = torch.zeros(num), torch.zeros(()), None
        read_B = torch.full((num,), _ABSENT)
        for place in range(len(self.decisions.open)):
            logits_BV, state = self.policy(place, read_B, state)
            log_p_BV = (logits_BV / temperature).log_softmax(-1)
            p_BV = log_p_BV.exp()
            drawn_B = torch.multinomial(p_BV.detach(), 1, generator=self.generator)[:, 0]
            for episode, drawn in zip(episodes, drawn_B.tolist(), strict=True):
                episode.append(drawn)
            active_B = torch.tensor([self.decisions.is_active(place, episode) for episode in episodes])
            log_p_B = log_p_B + torch.where(active_B, log_p_BV.gather(1, drawn_B[:, None])[:, 0], 0.0)
            entropy = entropy - torch.where(active_B, (p_BV * log_p_BV).sum(-1), 0.0).mean()
            read_B = torch.where(active_B, drawn_B + 1, _ABSENT)
        return episodes, log_p_B, entropy

    def _reward(self, subnet: Subnet, exponent: float) -> float:
        question = self.question
        costs = question.costs(subnet)
        if not question.limits:
            return self._accuracy(subnet) * (self.largest_cost / costs[question.cost]) ** exponent
        factor = 1.0
        for limit in question.limits:
            factor *= (limit.most / costs[limit.cost]) ** (self.settings.over if costs[limit.cost] > limit.most else self.settings.under)
        if excess(costs, question.limits) > 0:
            return factor * min((one.accuracy for one in question.asked.values()), default=1.0)
        return factor * self._accuracy(subnet)

    def _accuracy(self, subnet: Subnet) -> float:
        accuracy = self.question.ask(subnet).accuracy
        if not 0 <= accuracy < math.inf:
            raise ValueError(f"the accuracy of a sub-network is {accuracy}, and a controller multiplies it with costs: give one from 0 up, such as exp(-loss)")
        return accuracy


def _policy(num_values: Sequence[int], width: int) -> nn.Module:
    """The LSTM. It is called with a decision's place, what was chosen last, and its state; and gives logits of the decision's values, and the next state."""
    import torch
    from torch import nn

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decision = nn.Embedding(len(num_values), width)
            self.choice = nn.Embedding(1 + max(num_values), width)
            self.cell = nn.LSTMCell(width, width)
            self.heads = nn.ModuleList(nn.Linear(width, num) for num in num_values)
            for head in self.heads:
                nn.init.zeros_(head.weight)  # pyright: ignore[reportArgumentType] - all choices equally probable at first
                nn.init.zeros_(head.bias)  # pyright: ignore[reportArgumentType]

        def forward(self, place: int, read_B: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            after: tuple[Tensor, Tensor] = self.cell(self.choice(read_B) + self.decision(torch.tensor(place)), state)
            return self.heads[place](after[0]), after

    return Policy()
