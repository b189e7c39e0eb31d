"""Distil: a student learns a teacher's labels and rationales, and becomes an ordinary checkpoint.

The rows with split "train" are learned from; those with split "validation" choose the weights. What the student reads, how it is told the task and how long its
answers get is written into config.json under `llmdistill` (losses/prompts.py), so that evaluation and the server ask it what it was taught.

An elastic student is refused: its sub-networks would be left behind. One of them is extracted first and trained, or the student is made elastic afterwards.

While it builds, `training/` holds the student as it was before its first step (so that a resumed run has the same tokenizer) and the state of the training;
it is removed when the checkpoint is written. metrics.jsonl has the loss curves, and trackers/ what tensorboard is to show.
"""

import enum
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdistill.core.artifacts import Checkpoint, RationaleRow, Rationales
from llmdistill.core.manifest import describe
from llmdistill.core.run import Run
from llmdistill.core.spec import write
from llmdistill.core.stage import JsonScalar, Launcher, Stage
from llmdistill.elastic.kept import is_elastic, refusal
from llmdistill.losses.multitask import LABEL, LabelOnly, Lesson, Multitask, RationaleOnly
from llmdistill.models.student import ScratchT5, Student
from llmdistill.stages.answering import Answering
from llmdistill.stages.distil_card import Learned, model_card, task_section
from llmdistill.stages.elastic import Elastic
from llmdistill.stages.training_folder import load_to_train, training_folder
from llmdistill.tasks.task import Task
from llmdistill.train_settings import Best, TrainSettings
from llmdistill.tuning import Full, LoRA, adapt, merge

if TYPE_CHECKING:
    from llmdistill.batches import Example
    from llmdistill.train import Trained

log = logging.getLogger(__name__)


class Labels(enum.Enum):
    """Whose labels the student learns."""

    TEACHER = "the teacher's"
    GOLD = "the known ones; rows without one are left out"


@dataclass(frozen=True, kw_only=True)
class Distil(Stage[Checkpoint]):
    """A student trained on a teacher's answers. The ablations differ in `loss` alone and share everything upstream."""

    artifact = Checkpoint
    launcher = Launcher.ACCELERATE

    task: Task
    rationales: Stage[Rationales]
    student: Student | Stage[Checkpoint] = ScratchT5()
    """A new or pretrained student, or an earlier stage's checkpoint."""
    loss: Multitask | LabelOnly | RationaleOnly = Multitask()
    labels: Labels = Labels.TEACHER
    min_confidence: float = 0.0
    """Rows on which fewer of the teacher's samples agreed are left out."""
    tuning: Full | LoRA = Full()
    settings: TrainSettings = TrainSettings()
    max_input_tokens: int = 512
    max_target_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"Distil.min_confidence is {self.min_confidence}; give 0 to 1")
        if self.max_input_tokens < 2 or self.max_target_tokens < 2:
            raise ValueError(f"Distil.max_input_tokens is {self.max_input_tokens} and max_target_tokens {self.max_target_tokens}; give 2 or more")
        needs_label = self.settings.best in (Best.LABEL_LOSS, Best.ACCURACY)
        if needs_label and LABEL not in self.loss.parts:
            raise ValueError(f"settings.best is {self.settings.best.name}, and the loss {self.loss.kind} learns no labels; use LOSS or LAST")
        if isinstance(self.student, Elastic):
            raise ValueError(refusal(self._whose, verb="distil"))

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        from llmdistill.train import Lessons, train

        lessons, counts = self._lessons(run.artifact(self.rationales).rows())
        with training_folder(run, lambda initial: self._prepare(run, initial, lessons["train"])) as (folder, process):
            model, tokenizer = self._load(folder / "initial")
            if is_elastic(model):
                raise ValueError(refusal(self._whose, verb="distil"))
            examples = {split: self.loss.examples(rows, tokenizer, model.config, **self._limits) for split, rows in lessons.items()}
            train_lessons = Lessons(train=examples["train"], validation=examples["validation"], score=self._score(lessons["validation"], tokenizer))
            trained = train(model, train_lessons, self.loss, self.settings, folder, seed=self.seed, journal=run)
            figures = counts | {"num_train_examples": len(examples["train"]), "num_validation_examples": len(examples["validation"])} | dict(trained.figures)
            figures["trained_parameters"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            if process.is_main_process:
                figures["parameters"] = self._write(run, folder, trained, examples["train"], figures)
        return figures

    @property
    def _whose(self) -> str:
        return f"the student of {self.student.name!r}" if isinstance(self.student, Stage) else f"the student {write(self.student)}"

    @property
    def _limits(self) -> dict[str, int]:
        return {"max_input_tokens": self.max_input_tokens, "max_target_tokens": self.max_target_tokens}

    def _lessons(self, rows: Sequence[RationaleRow]) -> tuple[dict[str, list[Lesson]], dict[str, int]]:
        """What each split teaches, and how many rows were left out."""
        lessons: dict[str, list[Lesson]] = {"train": [], "validation": []}
        counts = {"num_rows_without_gold": 0, "num_rows_below_min_confidence": 0}
        for row in rows:
            label = row.label if self.labels is Labels.TEACHER else row.gold
            if row.split not in lessons:
                continue
            if row.confidence < self.min_confidence:
                counts["num_rows_below_min_confidence"] += 1
            elif label is None:
                counts["num_rows_without_gold"] += 1
            else:
                lessons[row.split].append(Lesson(input=row.input, label=label, rationale=row.rationale))
        for split, need in (("train", True), ("validation", self.settings.best is not Best.LAST)):
            if need and not lessons[split]:
                raise ValueError(
                    f"no row of split {split!r} is left to learn from, of {len(rows)} rows: {counts['num_rows_below_min_confidence']} are below min_confidence "
                    f"{self.min_confidence}, {counts['num_rows_without_gold']} have no gold label; "
                    "change the task's splits, min_confidence, labels or settings.best"
                )
        return lessons, counts

    def _prepare(self, run: Run, folder: Path, lessons: Sequence[Lesson]) -> None:
        """Write the student as it is before its first step."""
        from llmdistill.models import checkpoint

        if isinstance(self.student, Stage):
            shutil.copytree(run.artifact(self.student).folder, folder)
        else:
            texts = [text for lesson in lessons for text in ("predict: " + lesson.input, lesson.label, "explain: " + lesson.input, lesson.rationale)]
            model, tokenizer = self.student.prepare(texts, self.seed)
            checkpoint.save(model, tokenizer, folder, lineage=[{"technique": "initialise", "student": describe(self.student), "seed": self.seed}], card="")

    def _load(self, folder: Path) -> tuple[Any, Any]:
        """The student, ready to train, and its tokenizer."""
        model, tokenizer = load_to_train(folder)
        adapt(model, self.tuning, seed=self.seed)
        return model, tokenizer

    def _score(self, lessons: Sequence[Lesson], tokenizer: Any) -> Any:
        """Accuracy on the validation rows, against labels of the kind that is learned, decoded by the engine that serves."""
        if not lessons or LABEL not in self.loss.parts:
            return None
        texts, labels = [lesson.input for lesson in lessons], [lesson.label for lesson in lessons]

        def score(model: Any) -> dict[str, float]:
            student = Answering(model=model, tokenizer=tokenizer, prompts=self.loss.prompts(model.config), max_batch_rows=64)
            return {"validation_accuracy": student.accuracy(self.task.answer, texts, labels)}

        return score

    def _write(self, run: Run, folder: Path, trained: "Trained", examples: "Sequence[Example]", figures: Mapping[str, JsonScalar]) -> int:
        """Write the checkpoint; returns its number of parameters."""
        from llmdistill.models import checkpoint
        from llmdistill.train_state import read_weights

        model, tokenizer = self._load(folder / "initial")
        read_weights(model, trained.weights)
        merge(model, self.tuning)
        section = task_section(self.task, self.loss, model.config, examples)
        model.config.llmdistill = section
        model.generation_config.max_new_tokens = max(section["max_new_tokens"].values())
        model.generation_config.max_length = None
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        teacher = run.artifact(self.rationales).summary()
        base = Checkpoint(folder / "initial")
        learned = Learned(
            technique="distil",
            settings=describe(self),
            teacher={name: teacher.get(name) for name in ("model", "revision", "accuracy")},
            measured=dict(figures) | {"parameters": num_parameters},
        )
        lineage = [*base.lineage(), learned.lineage_entry()]
        checkpoint.save(model.eval(), tokenizer, run.folder, lineage=lineage, card=model_card(self.name, self.task, section, lineage))
        return num_parameters
