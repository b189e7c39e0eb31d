"""A student trained on rows and on what a larger one with the same tokenizer says of them, as the sub-networks of an elastic student are.

It is what benchmarks/elastic.py compares with. Cross-entropy and KL count as in the elastic stage, and the student's dropout is off as it is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmdistill.core.artifacts import Checkpoint, Rationales
from llmdistill.core.manifest import describe
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Stage
from llmdistill.losses.multitask import LabelOnly, lessons_of
from llmdistill.train_settings import TrainSettings

if TYPE_CHECKING:
    from llmdistill.batches import Example


@dataclass(frozen=True, kw_only=True)
class TaughtByLogits(Stage[Checkpoint]):
    """The student, trained with a frozen teacher. The settings are those of the elastic stage (stages/elastic.py)."""

    artifact = Checkpoint

    student: Stage[Checkpoint]
    teacher: Stage[Checkpoint]
    rationales: Stage[Rationales]
    loss: LabelOnly = LabelOnly()
    settings: TrainSettings
    hard_weight: float
    kl_weight: float
    temperature: float
    dropout: bool
    max_input_tokens: int
    max_target_tokens: int
    seed: int

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        import torch

        from llmdistill.losses.recover import RecoveryLoss
        from llmdistill.models import checkpoint
        from llmdistill.models.modes import without_dropout
        from llmdistill.train import Lessons, train
        from llmdistill.train_state import read_weights

        source, folder = run.artifact(self.student), run.folder / "training"
        model, tokenizer = checkpoint.load(source.folder, dtype=torch.float32)
        teacher, _ = checkpoint.load(run.artifact(self.teacher).folder, dtype=torch.float32)
        limits = {"max_input_tokens": self.max_input_tokens, "max_target_tokens": self.max_target_tokens}
        examples: dict[str, list[Example]] = {}
        for split in ("train", "validation"):
            lessons = lessons_of(row for row in run.artifact(self.rationales).rows() if row.split == split)
            examples[split] = self.loss.examples(lessons, tokenizer, model.config, **limits)
        loss = RecoveryLoss(teacher, self.loss, hard_weight=self.hard_weight, kl_weight=self.kl_weight, temperature=self.temperature)
        with nullcontext() if self.dropout else without_dropout(model):
            trained = train(
                model, Lessons(train=examples["train"], validation=examples["validation"]), loss, self.settings, folder, seed=self.seed, journal=run
            )
        read_weights(model, trained.weights)
        entry = {"technique": "taught by logits", "settings": describe(self), "measured": dict(trained.figures)}
        checkpoint.save(model.eval(), tokenizer, run.folder, lineage=[*source.lineage(), entry], card=source.model_card())
        shutil.rmtree(folder)
        return trained.figures
