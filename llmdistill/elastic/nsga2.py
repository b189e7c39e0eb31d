"""NSGA-II, by optuna: a genetic search for the whole front of accuracy and cost at once.

Source: Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II", sections III and VI (constraints), as optuna's NSGAIISampler has it:
two parents by tournament, uniform crossover, each decision drawn anew with probability one in their number.

Every decision of the space is one categorical parameter, those of layers that a depth leaves out as well: all trials so have the same parameters, without which
optuna could not cross them, and what is inactive makes no difference. Sub-networks beyond the limits are told to optuna by their excess alone: it compares
them with each other by that and with no other at all, so their accuracy need not be known and they take no evaluation.

It spreads over the whole front, within the limits too. On the synthetic accuracies of evolution.py, 200 evaluations: hypervolume 0.701 (evolution 0.704, random
search 0.682); best within half of the operations 0.867 (0.888, 0.860). For the one best within a limit Evolution is the better choice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from llmdistill.elastic.decisions import Decisions
from llmdistill.elastic.question import Question, excess
from llmdistill.elastic.random_search import tell_end


@dataclass(frozen=True, kw_only=True)
class NSGA2:
    """`max_free_trials`: it ends after so many in a row that took no evaluation, being known already or beyond the limits."""

    kind: ClassVar[str] = "nsga2"
    population_size: int = 16
    crossover_probability: float = 0.9
    max_free_trials: int = 1_000

    def __post_init__(self) -> None:
        if self.population_size < 2 or self.max_free_trials < 1:
            raise ValueError(f"NSGA2 has population_size {self.population_size} and max_free_trials {self.max_free_trials}; give 2 or more, and 1 or more")
        if not 0 <= self.crossover_probability <= 1:
            raise ValueError(f"NSGA2.crossover_probability is {self.crossover_probability}; give 0 up to 1")

    def run(self, question: Question, *, seed: int) -> None:
        """Trial after trial until the budget is spent or nothing new comes."""
        optuna = _optuna()
        decisions = Decisions(question.space)
        with _quiet(optuna):
            sampler = optuna.samplers.NSGAIISampler(population_size=self.population_size, crossover_prob=self.crossover_probability, seed=seed)
            study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
            num_free = 0
            while num_free < self.max_free_trials and len(question.asked) < question.space.num_subnets:
                spent = question.num_spent
                _one_trial(study, question, decisions)
                num_free = num_free + 1 if question.num_spent == spent else 0
        tell_end(question, num_free)


def _one_trial(study: Any, question: Question, decisions: Decisions) -> None:
    trial = study.ask()
    subnet = decisions.subnet([trial.suggest_categorical(one.name, list(range(len(one.values)))) for one in decisions.open])
    costs = question.costs(subnet)
    beyond = excess(costs, question.limits)
    if question.limits:
        trial.set_constraint("limits", beyond)
    study.tell(trial, [0.0 if beyond > 0 else question.ask(subnet).accuracy, costs[question.cost]])


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ValueError(
            "NSGA2 searches with optuna, which is not installed: pip install 'llmdistill[search]', or use Evolution, which needs nothing"
        ) from error
    if not hasattr(optuna.trial.Trial, "set_constraint"):
        raise ValueError(f"NSGA2 needs optuna 5 or later, and this is {optuna.__version__}: pip install --upgrade 'optuna>=5'")
    return optuna


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """No line for each trial; what optuna logs elsewhere stays as it was."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
