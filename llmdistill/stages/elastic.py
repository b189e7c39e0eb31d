"""Elastic: a student in, the same student out with nested sub-networks that were trained to stand alone.

    Elastic(checkpoint=student, task=task, rationales=rationales, axes=Axes(ffn=(0.25, 0.5), depth=(0.5,)), strategy=Sandwich())

Its neurons and heads are put in the order of their importance, which leaves its function as it was (elastic/sorting.py), and its layers get an order in which
they leave (elastic/layer_order.py). Then the whole model and sub-networks of it are trained together (losses/in_place.py). The result is a checkpoint as any:
it loads as the whole model, and its config.json says which sub-networks there are (elastic/space.py).

While it builds, `training/` holds the sorted student and the state of the training; metrics.jsonl has the losses of the whole and of sub-networks.
"""

import enum
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmdistill.core.artifacts import Checkpoint, RationaleRow, Rationales
from llmdistill.core.manifest import describe
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Launcher, Stage
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.strategy import Progressive, Sandwich, watched
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.stages.distil_card import task_section
from llmdistill.stages.learned_rows import lessons_to_train, split_examples
from llmdistill.stages.training_folder import load_to_train, training_folder
from llmdistill.tasks.task import Task
from llmdistill.train_settings import Best, Epochs, TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.batches import Example
    from llmdistill.elastic.space import Space
    from llmdistill.losses.in_place import InPlaceLoss

log = logging.getLogger(__name__)


class Teacher(enum.Enum):
    """Whose logits are learned beside the rows."""

    STUDENT = "the student's as it was, by the whole and by its sub-networks"
    IN_PLACE = "the whole's, by its sub-networks; the whole learns the rows alone"


@dataclass(frozen=True, kw_only=True)
class Elastic(Stage[Checkpoint]):
    """A student made elastic. It ends when its sub-networks have not become better for `settings.patience_evaluations`, or with `settings.duration`."""

    artifact = Checkpoint
    launcher = Launcher.ACCELERATE

    checkpoint: Stage[Checkpoint]
    task: Task
    rationales: Stage[Rationales]
    axes: Axes = Axes()
    strategy: Sandwich | Progressive = Sandwich()
    loss: Multitask | LabelOnly | RationaleOnly = Multitask()
    teacher: Teacher = Teacher.STUDENT
    hard_weight: float = 0.5
    """What the multitask loss counts where a teacher's logits are learned beside it."""
    kl_weight: float = 1.0
    """What KL from the teacher's logits counts."""
    temperature: float = 1.0
    settings: TrainSettings = TrainSettings(duration=Epochs(8), learning_rate=1e-3, evaluate_every_steps=50)
    dropout: bool = False
    """The student's dropout while it is trained. Off: what the teacher's logits say was said without."""
    num_importance_rows: int = 256
    """Importance is measured on so many train rows; with 0 nothing is sorted, and layers leave spread out evenly."""
    max_input_tokens: int = 512
    max_target_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.settings.best not in (Best.LOSS, Best.LAST):
            raise ValueError(f"settings.best is {self.settings.best.name}, which looks at the whole model alone; use LOSS (of sub-networks too) or LAST")
        for name, least in (("num_importance_rows", 0), ("max_input_tokens", 2), ("max_target_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"Elastic.{name} is {getattr(self, name)}; give {least} or more")

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        from llmdistill.elastic.kept import space_of
        from llmdistill.models.modes import without_dropout
        from llmdistill.train import train

        rows = run.artifact(self.rationales).rows()
        with training_folder(run, lambda initial: self._prepare(run, initial, rows)) as (folder, process):
            model, tokenizer = load_to_train(folder / "initial")
            lessons = lessons_to_train(self, rows, tokenizer, model, needs_validation=self.settings.best is not Best.LAST)
            space = space_of(model)
            teacher = load_to_train(folder / "initial")[0] if self.teacher is Teacher.STUDENT else None
            loss = self._loss(space, lessons.train, teacher)
            with nullcontext() if self.dropout else without_dropout(model):
                trained = train(model, lessons, loss, self.settings, folder, seed=self.seed, journal=run)
            figures: dict[str, JsonScalar] = {**trained.figures, "num_train_examples": len(lessons.train), "num_subnets": _number(space.num_subnets)}
            if process.is_main_process:
                figures |= self._write(run, folder, trained.weights, lessons.train, figures)
        return figures

    def _prepare(self, run: Run, folder: Path, rows: Sequence[RationaleRow]) -> None:
        """Write the sorted student with its space."""
        from llmdistill.elastic.importance import importance
        from llmdistill.elastic.kept import keep
        from llmdistill.elastic.layer_order import layer_orders
        from llmdistill.elastic.measure import shape_of
        from llmdistill.elastic.sorting import order_by, sort
        from llmdistill.models import checkpoint
        from llmdistill.models.exits import exits_of

        source = run.artifact(self.checkpoint)
        model, tokenizer = checkpoint.load(source.folder)
        if exits_of(model) is not None:
            raise ValueError(
                f"the student of {self.checkpoint.name!r} has exits, which read the states of the whole in the order that they have now: "
                "make the student elastic first, and give it exits afterwards"
            )
        space = self.axes.space(shape_of(model))  # refuses what cannot be before anything is measured
        if self.num_importance_rows:
            examples = split_examples(self, rows, "train", tokenizer, model)[: self.num_importance_rows]
            sort(model, order_by(importance(model, examples, self.loss), channels=len(space.widths) > 1))
            fewest = min(stack.depths[0] for stack in space.stacks)
            if any(len(stack.depths) > 1 for stack in space.stacks):
                space = self.axes.space(space.shape, layer_orders(model, examples, self.loss, fewest=fewest))
        keep(model, space)
        checkpoint.save(model, tokenizer, folder, lineage=source.lineage(), card=source.model_card())

    def _loss(self, space: "Space", examples: "Sequence[Example]", teacher: "PreTrainedModel | None") -> "InPlaceLoss":
        from llmdistill.batches import Plan
        from llmdistill.elastic.subnet import with_subnet
        from llmdistill.losses.in_place import InPlaceLoss
        from llmdistill.losses.recover import FrozenTeacher

        num_steps = Plan(examples, self.settings, seed=self.seed).num_steps()
        at = self.strategy.subnets(space, seed=self.seed, num_steps=num_steps)
        return InPlaceLoss(
            multitask=self.loss,
            guises=lambda step: [partial(with_subnet, subnet=subnet) for subnet in at(step)],
            watched=[partial(with_subnet, subnet=subnet) for subnet in watched(space, seed=self.seed)],
            num_subnets=self.strategy.num_subnets,
            teacher=None if teacher is None else FrozenTeacher(teacher),
            hard_weight=self.hard_weight,
            kl_weight=self.kl_weight,
            temperature=self.temperature,
        )

    def _write(self, run: Run, folder: Path, weights: Path, examples: "Sequence[Example]", figures: Mapping[str, JsonScalar]) -> dict[str, JsonScalar]:
        """Write the checkpoint; returns its sizes."""
        from llmdistill.elastic.cost import num_parameters
        from llmdistill.elastic.kept import space_of
        from llmdistill.models import checkpoint
        from llmdistill.train_state import read_weights

        model, tokenizer = load_to_train(folder / "initial")
        read_weights(model, weights)
        if getattr(model.config, "llmdistill", None) is None:
            model.config.llmdistill = task_section(self.task, self.loss, model.config, examples)
        space, source = space_of(model), Checkpoint(folder / "initial")
        sizes = {"parameters": num_parameters(space, space.largest()), "parameters_smallest": num_parameters(space, space.smallest())}
        entry = {"technique": "elastic", "settings": describe(self), "measured": dict(figures) | sizes}
        checkpoint.save(model.eval(), tokenizer, run.folder, lineage=[*source.lineage(), entry], card=_card(self, source, space, dict(figures) | sizes))
        return dict(sizes)


def _number(num_subnets: int) -> int | str:
    """JSON numbers are exact to 2^53."""
    return num_subnets if num_subnets < 2**53 else f"{num_subnets:.3e}"


def _card(stage: Elastic, source: Checkpoint, space: "Space", figures: Mapping[str, JsonScalar]) -> str:
    """README.md: what the whole says of itself, and what it holds."""
    from llmdistill.elastic.choice import write

    stacks = {
        shape.name: {"depths": legal.depths, "heads": legal.heads, "ffn": legal.ffn_widths, "ranks": legal.ranks}
        for shape, legal in zip(space.shape.stacks, space.stacks, strict=True)
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""{source.model_card().rstrip()}

# {stage.name}: elastic
Smaller students are inside: the first neurons, heads and layers of this one. As it is, it loads as the whole.
`llmdistill extract FOLDER OUT --subnet {write(space.smallest(), space)}` makes an ordinary folder of the smallest, and `--subnet` takes any of these:

```json
{json.dumps({"width": space.widths} | stacks)}
```

| figure | value |
|---|---|
{table}
"""
