"""Asking: every answer is recorded before it is reported, and a budget is never overshot by what the estimates can foresee."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llmdistill.core.run import Stopped
from llmdistill.teach.ask import Budget, Spent, ask
from llmdistill.teach.cache import CompletionCache, Question
from llmdistill.teach.teacher import Completion, Request, Sampling, TeacherError

SAMPLING = Sampling(max_tokens=40)


@dataclass
class Fake:
    """Answers with 10 tokens for 20 tokens of prompt."""

    model: str = "fake"
    revision: str = "1"
    dollars_per_million_tokens_in: float = 1e6
    dollars_per_million_tokens_out: float = 2e6
    asked: list[str] = field(default_factory=list)
    fails_at: int = -1

    def render(self, prompt: str) -> str:
        return prompt

    def fingerprint(self) -> dict[str, object]:
        return {"model": self.model, "revision": self.revision}

    def complete(self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Completion], None]) -> None:
        for index in reversed(range(len(requests))):
            if len(self.asked) == self.fails_at:
                raise TeacherError("out of order")
            self.asked.append(requests[index].prompt)
            done(index, Completion(text=requests[index].prompt[:3], tokens_in=20, tokens_out=10, seconds=0.1, finish_reason="stop"))


def questions(num: int) -> dict[Question, Request]:
    prompts = [f"{number:03d}" + "x" * 57 for number in range(num)]
    return {Question(model="fake", revision="1", prompt=prompt, sampling=SAMPLING): Request(prompt=prompt) for prompt in prompts}


def run(folder: Path, teacher: Fake, num: int, budget: Budget) -> tuple[Spent, int]:
    with CompletionCache(folder) as cache:
        wanted = questions(num)
        found = cache.find(wanted)
        missing = {question: request for question, request in wanted.items() if question.fingerprint not in found}
        try:
            return ask(teacher, cache, missing, SAMPLING, budget, lambda spent: None), len(missing)
        finally:
            for question, completion in ((q, cache.find(wanted).get(q.fingerprint)) for q in wanted):
                assert completion is None or completion.text == question.prompt[:3], "an answer was put to another question"


def test_all_are_asked_in_one_go_without_a_budget(tmp_path: Path) -> None:
    teacher = Fake()
    spent, num_missing = run(tmp_path, teacher, 7, Budget())
    assert (spent.num_completions, spent.tokens_in, spent.tokens_out, spent.cost_dollars, num_missing) == (7, 140, 70, 280.0, 7)
    assert run(tmp_path, teacher, 7, Budget())[1] == 0


@pytest.mark.parametrize("budget", [Budget(tokens=400), Budget(cost_dollars=500)])
def test_a_budget_is_used_but_never_exceeded_and_the_next_run_goes_on(tmp_path: Path, budget: Budget) -> None:
    teacher = Fake()
    while len(teacher.asked) < 18:
        before = len(teacher.asked)
        with pytest.raises(Stopped) as stop:
            run(tmp_path, teacher, 30, budget)
        num = len(teacher.asked) - before
        assert f"{num} were asked" in str(stop.value)
        assert f"{30 - len(teacher.asked)} are still to be asked" in str(stop.value)
        assert 30 * num <= budget.tokens
        assert 40 * num <= budget.cost_dollars
        assert num >= 9, "most of the budget is used"
    run(tmp_path, teacher, 30, Budget())
    assert sorted(teacher.asked) == sorted(question.prompt for question in questions(30)), "none twice"


def test_wrong_estimates_stop_at_the_first_completion_beyond_the_budget(tmp_path: Path) -> None:
    class Wordy(Fake):
        def complete(self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Completion], None]) -> None:
            for index in range(len(requests)):
                self.asked.append(requests[index].prompt)
                done(index, Completion(text=requests[index].prompt[:3], tokens_in=500, tokens_out=10, seconds=0.1, finish_reason="stop"))

    teacher = Wordy()
    with pytest.raises(Stopped):
        run(tmp_path, teacher, 30, Budget(tokens=1_000))
    assert len(teacher.asked) == 2


def test_a_failure_keeps_what_was_answered(tmp_path: Path) -> None:
    teacher = Fake(fails_at=4)
    with pytest.raises(TeacherError):
        run(tmp_path, teacher, 7, Budget())
    teacher.fails_at = -1
    assert run(tmp_path, teacher, 7, Budget())[1] == 3
    assert len(set(teacher.asked)) == len(teacher.asked) == 7


def test_dollars_need_prices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no prices"):
        run(tmp_path, Fake(dollars_per_million_tokens_in=0, dollars_per_million_tokens_out=0), 7, Budget(cost_dollars=1))


def test_a_teacher_that_forgets_requests_is_found_out(tmp_path: Path) -> None:
    class Forgetful(Fake):
        def complete(self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Completion], None]) -> None:
            super().complete(requests[:-1], sampling, done)

    with pytest.raises(RuntimeError, match="6 completions for 7 requests"):
        run(tmp_path, Forgetful(), 7, Budget())
