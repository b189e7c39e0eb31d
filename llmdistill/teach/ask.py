"""Ask a teacher for what the cache lacks, each answer on disk before it counts as done, within a budget.

A budget is kept by asking in portions whose estimated cost fits into what is left: a teacher that answers many requests at once would otherwise overshoot
by all that are under way. Estimates are on the high side (every completion as long as it may be), so each portion leaves something for a smaller one, until
not one more request fits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmdistill.core.run import Stopped
from llmdistill.teach.cache import CompletionCache, Question
from llmdistill.teach.teacher import Completion, Request, Sampling, Teacher, dollars

CHARACTERS_PER_TOKEN = 3.0  # fewer than in most text, so that costs are estimated too high until the teacher has counted


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one run may spend; infinite for no limit."""

    cost_dollars: float = math.inf
    tokens: float = math.inf

    @property
    def is_unlimited(self) -> bool:
        return math.isinf(self.cost_dollars) and math.isinf(self.tokens)


@dataclass(kw_only=True)
class Spent:
    """What a run has spent so far."""

    num_completions: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    characters_in: int = 0
    cost_dollars: float = 0.0

    def add(self, completion: Completion, prompt: str, teacher: Teacher) -> None:
        self.num_completions += 1
        self.tokens_in += completion.tokens_in
        self.tokens_out += completion.tokens_out
        self.characters_in += len(prompt)
        self.cost_dollars = dollars(teacher, self.tokens_in, self.tokens_out)


def ask(
    teacher: Teacher,
    cache: CompletionCache,
    missing: Mapping[Question, Request],
    sampling: Sampling,
    budget: Budget,
    progress: Callable[[Spent], None],
) -> Spent:
    """Ask every request, in order, and record each answer; raises Stopped when the budget does not reach for all of them."""
    if not math.isinf(budget.cost_dollars) and missing and not (teacher.dollars_per_million_tokens_in or teacher.dollars_per_million_tokens_out):
        raise ValueError(
            f"the budget is {budget.cost_dollars} dollars, but the teacher {teacher.model} has no prices: set its dollars_per_million_tokens_in and "
            "dollars_per_million_tokens_out, or limit the tokens instead"
        )
    questions, spent = list(missing), Spent()
    start = time.monotonic()
    position = 0
    while position < len(questions):
        size = _num_affordable(questions[position:], teacher, sampling, budget, spent)
        if size == 0:
            raise _stopped(budget, spent, len(questions) - position, teacher, time.monotonic() - start)
        portion = questions[position : position + size]

        def done(index: int, completion: Completion, portion: Sequence[Question] = portion) -> None:
            cache.record(portion[index], completion)
            spent.add(completion, portion[index].prompt, teacher)
            progress(spent)
            is_over = spent.cost_dollars > budget.cost_dollars or spent.tokens_in + spent.tokens_out > budget.tokens
            if is_over and spent.num_completions < len(questions):
                raise _stopped(budget, spent, len(questions) - spent.num_completions, teacher, time.monotonic() - start)

        teacher.complete([missing[question] for question in portion], sampling, done)
        position += size
        if spent.num_completions != position:
            raise RuntimeError(f"the teacher {teacher.model} handed over {spent.num_completions} completions for {position} requests: this is a mistake in it")
    return spent


def _num_affordable(questions: Sequence[Question], teacher: Teacher, sampling: Sampling, budget: Budget, spent: Spent) -> int:
    """How many of the next requests surely fit into the budget."""
    if budget.is_unlimited:
        return len(questions)
    tokens_in_per_character = max(spent.tokens_in / spent.characters_in if spent.characters_in else 0.0, 1 / CHARACTERS_PER_TOKEN)
    tokens_in, tokens_out = spent.tokens_in, spent.tokens_out
    for number, question in enumerate(questions):
        tokens_in += math.ceil(len(question.prompt) * tokens_in_per_character)
        tokens_out += sampling.max_tokens
        if dollars(teacher, tokens_in, tokens_out) > budget.cost_dollars or tokens_in + tokens_out > budget.tokens:
            return number
    return len(questions)


def _stopped(budget: Budget, spent: Spent, num_left: int, teacher: Teacher, seconds: float) -> Stopped:
    limits = [f"{budget.cost_dollars:g} dollars"] * (not math.isinf(budget.cost_dollars)) + [f"{budget.tokens:g} tokens"] * (not math.isinf(budget.tokens))
    return Stopped(
        f"the budget of {' and '.join(limits)} does not reach for all completions: {spent.num_completions} were asked in this run "
        f"({spent.tokens_in} tokens in, {spent.tokens_out} out, {spent.cost_dollars:.4f} dollars, {seconds:.0f} s) and are kept, "
        f"{num_left} are still to be asked. The same command goes on from there, with as large a budget again"
    )
