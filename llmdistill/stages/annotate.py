"""Annotate: a teacher labels and explains every row of a task (Distilling step-by-step, Hsieh et al. 2023, section 3.1).

Raw completions go into the machine's completion cache one by one as they arrive; what this stage writes is only a reading of them. So a killed or stopped run
loses nothing and asks nothing twice, and a change of parser or verification asks nothing at all. Rows are asked in the order of a hash of their ids: whatever
part is done when a budget ends is a fair sample of all splits. Test rows are annotated too: they measure the teacher.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

from llmdistill.core.artifacts import Rationales
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage, speed
from llmdistill.tasks.task import Row, Task
from llmdistill.teach.ask import Budget, Spent, ask
from llmdistill.teach.cache import CompletionCache, Question, default_folder
from llmdistill.teach.judged import Account, Judged, write_judged
from llmdistill.teach.parse import parse_completion
from llmdistill.teach.prompt import Prompt
from llmdistill.teach.recorded import Recorded, export_recording
from llmdistill.teach.teacher import Completion, Request, Sampling, Teacher, dollars
from llmdistill.teach.verify import Verification, verify

CHARACTERS_PER_TOKEN = 4.0  # of English text; for the plan, before the teacher has counted
STARTED = "cached_at_start.json"


@dataclass(frozen=True, kw_only=True)
class Annotate(Stage[Rationales]):
    """The teacher's rationale and label for the rows of a task.

    sampling: its stop strings come on top of the prompt's.
    num_samples: samples of each row, for self-consistency; more than one needs a temperature.
    splits: which rows are annotated.
    max_rows: annotate only the first so many rows in the order of asking, a fair sample of all of them.
    max_cost_dollars, max_tokens: what this run may spend; it stops before it would spend more, keeps everything, and the same command goes on.
    """

    artifact = Rationales

    task: Task
    teacher: Teacher
    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    num_samples: int = 1
    splits: tuple[str, ...] = ("train", "validation", "test")
    max_rows: float = math.inf
    verification: Verification = field(default_factory=Verification)
    max_cost_dollars: float = speed(math.inf)
    max_tokens: float = speed(math.inf)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"Annotate.num_samples is {self.num_samples}: ask for at least 1 sample of each row")
        if self.num_samples > 1 and self.sampling.temperature == 0:
            raise ValueError(f"Annotate.num_samples is {self.num_samples} at temperature 0, which gives the same each time: set Sampling.temperature, to 0.7")
        unknown = [split for split in self.splits if split not in ("train", "validation", "test")]
        if unknown or not self.splits:
            raise ValueError(f"Annotate.splits is {self.splits!r}: give one or more of train, validation, test")
        if not self.max_rows >= 1:
            raise ValueError(f"Annotate.max_rows is {self.max_rows}: give at least 1 row")
        if not self.max_cost_dollars >= 0 or not self.max_tokens >= 0:
            raise ValueError(f"Annotate.max_cost_dollars is {self.max_cost_dollars} and max_tokens {self.max_tokens}: they must not be below 0")

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        asked = _Questions.of(self)
        if isinstance(self.teacher, Recorded):
            found = self.teacher.find(asked.questions)
            missing = [question for question in asked.questions if question.fingerprint not in found]
            if missing:
                raise self.teacher.missing(missing[0].prompt, missing[0].sample_index)
            num_asked = 0
        else:
            with CompletionCache(default_folder()) as cache:
                found, num_asked = self._ask(run, asked, cache)
        completions = {question.fingerprint: found[question.fingerprint] for question in asked.questions}
        tokens_in = sum(completion.tokens_in for completion in completions.values())
        tokens_out = sum(completion.tokens_out for completion in completions.values())
        account = Account(
            num_completions=len(completions),
            num_asked=num_asked,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            seconds=sum(completion.seconds for completion in completions.values()),
            cost_dollars=dollars(self.teacher, tokens_in, tokens_out),
        )
        judged = [self._judge(row, [completions[question.fingerprint] for question in asked.of_row[row.id]]) for row in asked.rows]
        summary = write_judged(run.folder, judged, answer=self.task.answer, model=self.teacher.model, revision=self.teacher.revision, account=account)
        return {name: value for name, value in summary.items() if isinstance(value, (int, float, str)) or value is None}

    def plan(self, run: Run) -> Mapping[str, JsonScalar]:
        """Rows, completions that the cache lacks, and what those would cost: by the tokens of the completions it has, else by rule of thumb."""
        asked = _Questions.of(self)
        unique = {question.fingerprint: question for question in asked.questions}
        found: Mapping[str, Completion] = {}
        if isinstance(self.teacher, Recorded):
            found = self.teacher.find(asked.questions)
        elif (default_folder() / "completions.sqlite3").exists():
            with CompletionCache(default_folder()) as cache:
                found = cache.find(asked.questions)
        missing = [question for fingerprint, question in unique.items() if fingerprint not in found]
        if found:
            characters = sum(len(unique[fingerprint].prompt) for fingerprint in found)
            tokens_in_per_character = sum(completion.tokens_in for completion in found.values()) / max(1, characters)
            tokens_out_each = sum(completion.tokens_out for completion in found.values()) / len(found)
        else:
            tokens_in_per_character, tokens_out_each = 1 / CHARACTERS_PER_TOKEN, self.sampling.max_tokens
        tokens_in = math.ceil(sum(len(question.prompt) for question in missing) * tokens_in_per_character)
        tokens_out = math.ceil(len(missing) * tokens_out_each)
        figures: dict[str, JsonScalar] = {
            "num_rows": len(asked.rows),
            "num_completions": len(unique),
            "num_completions_missing": len(missing),
            "tokens_in_estimated": tokens_in,
            "tokens_out_estimated": tokens_out,
        }
        if self.teacher.dollars_per_million_tokens_in or self.teacher.dollars_per_million_tokens_out:  # else nobody has said what it costs
            figures["cost_dollars_estimated"] = round(dollars(self.teacher, tokens_in, tokens_out), 4)
        return figures

    @property
    def whole_sampling(self) -> Sampling:
        """What the teacher is asked with: the settings, and the prompt's stop strings."""
        return replace(self.sampling, stop=tuple(dict.fromkeys((*self.prompt.stop, *self.sampling.stop))))

    def export(self, folder: Path) -> Path:
        """Write this stage's completions out of the cache as a recording, which `recorded:FOLDER` then answers from."""
        asked = _Questions.of(self)
        with CompletionCache(default_folder()) as cache:
            return export_recording(
                cache,
                folder,
                teacher=self.teacher,
                prompt=self.prompt,
                prompts=asked.prompts,
                sampling=self.whole_sampling,
                num_samples=self.num_samples,
                date=date.today().isoformat(),
            )

    def _ask(self, run: Run, asked: _Questions, cache: CompletionCache) -> tuple[Mapping[str, Completion], int]:
        """The completions, those that were missing asked for; and how many of them were not there when this stage began, however often it was killed since."""
        found = cache.find(asked.questions)
        started = run.folder / STARTED
        if not started.exists():
            partial = run.folder / f"{STARTED}.partial"
            partial.write_text(json.dumps({"num_cached": len(found)}))
            partial.rename(started)
        num_cached_at_start = json.loads(started.read_text())["num_cached"]
        missing = {question: request for question, request in asked.requests.items() if question.fingerprint not in found}
        if missing:
            with run.progress(len(missing), "completions") as bar:

                def progress(spent: Spent) -> None:
                    bar.advance()
                    if spent.num_completions % 50 == 0:
                        run.log_metrics(num_completions=spent.num_completions, tokens_out=spent.tokens_out, cost_dollars=spent.cost_dollars)

                budget = Budget(cost_dollars=self.max_cost_dollars, tokens=self.max_tokens)
                ask(self.teacher, cache, missing, self.whole_sampling, budget, progress)
            found = cache.find(asked.questions)
        return found, max(0, len(asked.requests) - num_cached_at_start)

    def _judge(self, row: Row, completions: Sequence[Completion]) -> Judged:
        samples = [
            parse_completion(completion.text, self.task.answer, answer_marker=self.prompt.answer_marker, finish_reason=completion.finish_reason)
            for completion in completions
        ]
        gold = row.gold if row.split != "test" else None  # a wrong test row stays: it measures the teacher
        verdict = verify(samples, self.task.answer, self.verification, gold=gold)
        return Judged(id=row.id, split=row.split, input=self.task.text(row), gold=row.gold, verdict=verdict, completion=completions[verdict.sample].text)


@dataclass(frozen=True)
class _Questions:
    """Everything that a stage asks: rows in the task's order, distinct questions in the order of asking."""

    rows: Sequence[Row]
    prompts: Mapping[str, str]
    of_row: Mapping[str, Sequence[Question]]
    requests: Mapping[Question, Request]

    @property
    def questions(self) -> list[Question]:
        return list(self.requests)

    @classmethod
    def of(cls, stage: Annotate) -> _Questions:
        rows = [row for row in stage.task.rows() if row.split in stage.splits]
        if not rows:
            raise ValueError(f"the task {stage.task.name!r} has no rows in the splits {', '.join(stage.splits)}: there is nothing to annotate")
        in_order = sorted(rows, key=lambda row: _place(row.id))
        in_order = in_order[: int(min(stage.max_rows, len(in_order)))]
        kept = {row.id for row in in_order}
        rows = [row for row in rows if row.id in kept]
        teacher, sampling = stage.teacher, stage.whole_sampling
        model, revision = teacher.model, teacher.revision
        prompts = {row.id: stage.prompt.render(row.fields) for row in rows}
        of_row: dict[str, list[Question]] = {}
        requests: dict[Question, Request] = {}
        for row in in_order:
            prompt = prompts[row.id]
            rendered = teacher.render(prompt)
            of_row[row.id] = []
            for sample in range(stage.num_samples):
                question = Question(model=model, revision=revision, prompt=rendered, sampling=sampling, sample_index=sample)
                requests.setdefault(question, Request(prompt=prompt, sample_index=sample))
                of_row[row.id].append(question)
        return cls(rows=rows, prompts=prompts, of_row=of_row, requests=requests)


def _place(row_id: str) -> bytes:
    """Where a row stands in the order of asking. Not the hash that the splits are cut by (tasks/splits.py): in its order all test rows come first."""
    return hashlib.sha256(b"order of asking: " + row_id.encode(errors="surrogatepass")).digest()
