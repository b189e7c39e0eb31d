"""A whole pipeline in seconds, for the tests of what holds it together: a teacher that knows two words, students of a few layers, a report.

It reads rows.jsonl beside the run, which `write_rows` makes. The teacher is slow on purpose where a test wants to interrupt it.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmdistill.core.artifacts import Checkpoint, Report
from llmdistill.core.pipeline import main
from llmdistill.core.stage import Stage, speed
from llmdistill.losses.multitask import LabelOnly, Multitask
from llmdistill.models.student import ScratchT5
from llmdistill.stages.annotate import Annotate
from llmdistill.stages.distil import Distil
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.evaluate_baseline import EvaluateBaseline
from llmdistill.stages.report import ReportStage
from llmdistill.tasks.options import ChoiceRows
from llmdistill.teach.prompt import Prompt
from llmdistill.teach.teacher import Completion, Request, Sampling
from llmdistill.train_settings import Steps, TrainSettings

PROMPT = Path(__file__).with_name("reviews.jinja")
GOOD, BAD = ("warm", "kind", "fresh", "quick"), ("cold", "rude", "stale", "slow")


@dataclass(frozen=True, kw_only=True)
class WordTeacher:
    """Calls a review good that has a good word in it."""

    kind: ClassVar[str] = "words"
    model: str = "words"
    revision: str = "1"
    pause_s: float = speed(0.0)
    dollars_per_million_tokens_in: float = speed(0.0)
    dollars_per_million_tokens_out: float = speed(0.0)

    def render(self, prompt: str) -> str:
        return prompt

    def complete(self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Completion], None]) -> None:
        for number, request in enumerate(requests):
            time.sleep(self.pause_s)
            words = request.prompt.rpartition("Text:")[2].split()
            found = next((word for word in words if word in GOOD + BAD), "nothing")
            text = f" It says {found}. The answer is ({'good' if found in GOOD else 'bad'})."
            done(number, Completion(text=text, tokens_in=len(words), tokens_out=8, seconds=0.25, finish_reason="stop"))

    def fingerprint(self) -> dict[str, object]:
        return {"model": self.model, "revision": self.revision}


def write_rows(path: Path, num_rows: int = 40) -> Path:
    """Reviews of a place to eat, each with one word that tells."""
    subjects = ("soup", "waiter", "bread", "service", "tea")
    with path.open("w") as file:
        for number in range(num_rows):
            word = (GOOD, BAD)[number % 2][number // 2 % 4]
            row = {"id": f"r{number}", "text": f"the {subjects[number % 5]} at table {number} was {word}", "mood": ("good", "bad")[number % 2]}
            file.write(json.dumps(row) + "\n")
    return path


def pipeline(
    rows: Path = Path("rows.jsonl"),
    teacher: WordTeacher = WordTeacher(),
    num_steps: int = 6,
    rationale_weight: float = 1.0,
    checkpoint_every_s: float = 300.0,
    prompt: Path = PROMPT,
    seed: int = 0,
) -> Stage[Report]:
    """Reviews, from a teacher to a report.

    Args:
        rows: What write_rows wrote.
        teacher: Who labels and explains.
        num_steps: Of the optimizer.
        rationale_weight: lambda in L = L_label + lambda * L_rationale.
        checkpoint_every_s: How much work a killed training may lose.
        prompt: What the teacher reads.
        seed: Of the student.
    """
    task = ChoiceRows(rows=str(rows), choices=("good", "bad"), input="{text}", gold="mood", id="id").task()
    rationales = Annotate(task=task, teacher=teacher, prompt=Prompt(path=prompt))
    settings = TrainSettings(batch_size=8, duration=Steps(num_steps), evaluate_every_steps=2, log_every_steps=1, checkpoint_every_s=checkpoint_every_s)
    student = ScratchT5(vocabulary_size=300)
    students: tuple[Stage[Checkpoint], ...] = (
        Distil(name="label_only", task=task, rationales=rationales, student=student, loss=LabelOnly(), settings=settings, seed=seed),
        Distil(
            name="multitask", task=task, rationales=rationales, student=student, loss=Multitask(rationale_weight=rationale_weight), settings=settings, seed=seed
        ),
    )
    evaluations = tuple(
        Evaluate(
            name=f"evaluate_{trained.name}",
            checkpoint=trained,
            task=task,
            rationales=rationales,
            max_new_tokens=8,
            max_rationale_tokens=8,
            latency_repeats=2,
        )
        for trained in students
    )
    return ReportStage(title="Reviews", evaluations=evaluations, baselines=(EvaluateBaseline(task=task, rationales=rationales),), rationales=rationales)


if __name__ == "__main__":
    main(pipeline)
