"""Students that decide what to compute, token by token: layers or feed-forwards that are skipped, and feed-forwards of which some groups of neurons are used.

    skipping = SkipLayers(checkpoint=student, task=task, rationales=rationales, compute_weight=0.05)
    refined = RefineSkips(checkpoint=skipping, teacher=student, task=task, rationales=rationales, compute_weight=0.05)
    gated = GateChannels(checkpoint=student, task=task, rationales=rationales, groups=8, kept=2)

Each takes a student, puts gates in (models/skipping.py, models/channel_gated_feed_forward.py) and trains it for a while, with the student as it
was as the teacher; RefineSkips takes one that has gates, and refines them by REINFORCE (losses/skip_policy.py). The result is a checkpoint as any: it loads,
decodes, is evaluated, served and compressed. An elastic student, or one in integers, is refused: gates come before integers, and after extraction.

Figures: losses of the validation rows, and the share of the work that is done on them (losses/work.py).

While it builds, `training/` holds the student with its gates before training, and the state of the training.
"""

import enum
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdistill.core.artifacts import Checkpoint, RationaleRow, Rationales
from llmdistill.core.manifest import describe
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Launcher, Stage
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.stages.distil_card import task_section
from llmdistill.stages.learned_rows import lessons_to_train
from llmdistill.stages.training_folder import load_to_train, training_folder
from llmdistill.tasks.task import Task
from llmdistill.train_settings import Best, Epochs, TrainSettings

if TYPE_CHECKING:
    from llmdistill.train import Lessons, Loss

log = logging.getLogger(__name__)

GATE_SPREAD = 0.3
"""Standard deviation of what new gates make of a token of unit size: enough to begin with, and not enough to shut one."""


class Unit(enum.Enum):
    """What a token skips."""

    LAYER = "whole layers: attention and feed-forward"
    FEED_FORWARD = "feed-forwards"


class Where(enum.Enum):
    """Whose layers decide. A causal model has a decoder alone."""

    ENCODER = ("encoder",)
    DECODER = ("decoder",)
    BOTH = ("encoder", "decoder")


@dataclass(frozen=True, kw_only=True)
class _Deciding(Stage[Checkpoint]):
    """What the three stages share: rows, loss, teacher and training."""

    artifact = Checkpoint
    launcher = Launcher.ACCELERATE

    checkpoint: Stage[Checkpoint]
    task: Task
    rationales: Stage[Rationales]
    loss: Multitask | LabelOnly | RationaleOnly = Multitask()
    teacher: Stage[Checkpoint] | None = None
    """Whose logits are learned beside the rows; None for those of the checkpoint as it was."""
    hard_weight: float = 0.5
    """What the multitask loss counts."""
    kl_weight: float = 1.0
    """What KL from the teacher's logits counts."""
    temperature: float = 1.0
    settings: TrainSettings = TrainSettings(duration=Epochs(6), learning_rate=5e-4, evaluate_every_steps=50)
    dropout: bool = False
    """The student's dropout while it is trained. Off: what the teacher's logits say was said without."""
    max_input_tokens: int = 512
    max_target_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_input_tokens", "max_target_tokens"):
            if getattr(self, name) < 2:
                raise ValueError(f"{type(self).__name__}.{name} is {getattr(self, name)}; give 2 or more")
        if self.settings.best is Best.ACCURACY:
            raise ValueError(f"{type(self).__name__}.settings.best is ACCURACY, which takes no notice of what is skipped; use LOSS, LABEL_LOSS or LAST")

    def _prepare(self, model: Any, lessons: "Lessons") -> None:
        """Put the gates in."""
        raise NotImplementedError

    def _loss(self, model: Any, teacher: Any) -> "Loss":
        raise NotImplementedError

    def _train_only(self, model: Any) -> None:
        """Say which weights are trained, where it is not all."""

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        from llmdistill.models.modes import without_dropout
        from llmdistill.train import train

        rows = run.artifact(self.rationales).rows()
        with training_folder(run, lambda initial: self._write_initial(run, initial, rows)) as (folder, process):
            model, tokenizer = load_to_train(folder / "initial")
            self._train_only(model)
            lessons = lessons_to_train(self, rows, tokenizer, model, needs_validation=True)
            teacher, _ = load_to_train(run.artifact(self.teacher or self.checkpoint).folder)
            with nullcontext() if self.dropout else without_dropout(model):
                trained = train(model, lessons, self._loss(model, teacher), self.settings, folder, seed=self.seed, journal=run)
            figures: dict[str, JsonScalar] = {**trained.figures, "num_train_examples": len(lessons.train)}
            if process.is_main_process:
                figures |= self._write(run, folder, trained.weights, lessons, figures)
        return figures

    def _write_initial(self, run: Run, folder: Path, rows: Sequence[RationaleRow]) -> None:
        """Write the student with its gates."""
        from llmdistill.elastic.kept import is_elastic
        from llmdistill.models import checkpoint
        from llmdistill.models.deciding import deciding

        source = run.artifact(self.checkpoint)
        model, tokenizer = checkpoint.load(source.folder)
        if is_elastic(model):
            raise ValueError(
                f"the student of {self.checkpoint.name!r} is elastic, and gates are trained for one student: extract one first (the Extract stage)"
            )
        if any(not parameter.is_floating_point() for parameter in model.parameters()):
            raise ValueError(f"the student of {self.checkpoint.name!r} has integer weights, which cannot be trained: gates first, integers afterwards")
        gates = list(deciding(model))
        if gates and not isinstance(self, RefineSkips):
            raise ValueError(f"the student of {self.checkpoint.name!r} decides already, at {gates[0]} first; begin with one that does not, or refine its gates")
        self._prepare(model, lessons_to_train(self, rows, tokenizer, model, needs_validation=True))
        checkpoint.save(model, tokenizer, folder, lineage=source.lineage(), card=source.model_card())

    def _write(self, run: Run, folder: Path, weights: Path, lessons: "Lessons", figures: Mapping[str, JsonScalar]) -> dict[str, JsonScalar]:
        """Write the checkpoint; returns its size and the share of the work that it does."""
        from llmdistill.losses.work import shares_of_work
        from llmdistill.models import checkpoint
        from llmdistill.train_state import read_weights

        model, tokenizer = load_to_train(folder / "initial")
        read_weights(model.requires_grad_(False), weights)
        if getattr(model.config, "llmdistill", None) is None:
            model.config.llmdistill = task_section(self.task, self.loss, model.config, lessons.train)
        shares = {name: round(share, 4) for name, share in shares_of_work(model, lessons.validation, self.settings).items()}
        measured: dict[str, JsonScalar] = {"parameters": sum(parameter.numel() for parameter in model.parameters()), **shares}
        source = Checkpoint(folder / "initial")
        entry = {"technique": _technique(self), "settings": describe(self), "measured": dict(figures) | measured}
        card = _card(self, source, dict(figures) | measured)
        checkpoint.save(model.requires_grad_(True).eval(), tokenizer, run.folder, lineage=[*source.lineage(), entry], card=card)
        return measured


@dataclass(frozen=True, kw_only=True)
class SkipLayers(_Deciding):
    """A student whose tokens skip layers that they can do without (SkipNet): straight-through gates under a penalty."""

    unit: Unit = Unit.LAYER
    where: Where = Where.BOTH
    compute_weight: float = 0.05
    """What the share of the work that is done, of what may be skipped, counts in the loss. More skips more."""
    open_at_start: float = 0.9
    """How likely every gate is to be open before training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight(self, self.compute_weight)
        if not 0.5 < self.open_at_start < 1:
            raise ValueError(f"SkipLayers.open_at_start is {self.open_at_start}; give more than 0.5, so that the student begins as it is, and less than 1")

    def _prepare(self, model: Any, lessons: "Lessons") -> None:
        import torch

        from llmdistill.models.feed_forward import replace_feed_forwards
        from llmdistill.models.skipped_feed_forward import SkippedFeedForward
        from llmdistill.models.skipped_layer import replace_layers

        generator = torch.Generator().manual_seed(self.seed)
        names = self.where.value
        for module in replace_layers(model, names) if self.unit is Unit.LAYER else replace_feed_forwards(model, SkippedFeedForward, names):
            module.open_gate(self.open_at_start)
            torch.nn.init.normal_(module.gate.weight, std=GATE_SPREAD * module.width**-0.5, generator=generator)

    def _loss(self, model: Any, teacher: Any) -> "Loss":
        return _skip_loss(self, model, teacher, self.compute_weight)


@dataclass(frozen=True, kw_only=True)
class RefineSkips(_Deciding):
    """A student that skips, with its gates refined by REINFORCE: what they draw is judged by what it costs (SkipNet's second stage)."""

    compute_weight: float = 0.05
    """What the share of the work that is done, of what may be skipped, costs a row, in nats."""
    num_samples: int = 2
    """Draws of a step; each is judged against the others, and runs the student once."""
    gates_alone: bool = False
    """Train the gates and nothing else, in place of the hybrid of both."""
    settings: TrainSettings = TrainSettings(duration=Epochs(4), learning_rate=2e-4, evaluate_every_steps=50)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight(self, self.compute_weight)
        if self.num_samples < 2:
            raise ValueError(f"RefineSkips.num_samples is {self.num_samples}; give 2 or more, each of which is measured against the others")

    def _prepare(self, model: Any, lessons: "Lessons") -> None:
        from llmdistill.losses.gates import gate_costs

        gate_costs(model)  # refuses a student without gates

    def _train_only(self, model: Any) -> None:
        from llmdistill.models.skipping import skipped

        if self.gates_alone:
            model.requires_grad_(False)
            for module in skipped(model).values():
                module.gate.requires_grad_(True)

    def _loss(self, model: Any, teacher: Any) -> "Loss":
        from llmdistill.losses.skip_policy import SkipPolicyLoss

        return SkipPolicyLoss(supervised=_skip_loss(self, model, teacher, self.compute_weight), num_samples=self.num_samples, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class GateChannels(_Deciding):
    """A student whose tokens use some groups of each feed-forward's neurons (feature boosting and suppression)."""

    where: Where = Where.BOTH
    groups: int = 8
    """Of the neurons of a feed-forward: 2, 4, 8, 16, ..."""
    kept: int = 4
    """Groups that each token uses."""
    num_calibration_rows: int = 128
    """Neurons are grouped by what they do on so many train rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.kept <= self.groups:
            raise ValueError(f"GateChannels.kept is {self.kept} of {self.groups} groups; give 1 to all of them")
        if self.num_calibration_rows < 1:
            raise ValueError(f"GateChannels.num_calibration_rows is {self.num_calibration_rows}; give 1 or more")

    def _prepare(self, model: Any, lessons: "Lessons") -> None:
        from llmdistill.compress.calibration import Calibration
        from llmdistill.compress.channel_gating import gate_channels

        calibration = Calibration(examples=lessons.train[: self.num_calibration_rows], loss=self.loss)
        gate_channels(model, calibration, self.where.value, groups=self.groups, kept=self.kept)

    def _loss(self, model: Any, teacher: Any) -> "Loss":
        from llmdistill.losses.recover import RecoveryLoss

        return RecoveryLoss(teacher, self.loss, hard_weight=self.hard_weight, kl_weight=self.kl_weight, temperature=self.temperature)


def _skip_loss(stage: _Deciding, model: Any, teacher: Any, compute_weight: float) -> Any:
    from llmdistill.losses.gates import gate_costs
    from llmdistill.losses.recover import FrozenTeacher
    from llmdistill.losses.skip import SkipLoss

    return SkipLoss(
        multitask=stage.loss,
        costs=gate_costs(model),
        compute_weight=compute_weight,
        teacher=FrozenTeacher(teacher),
        hard_weight=stage.hard_weight,
        kl_weight=stage.kl_weight,
        temperature=stage.temperature,
    )


def _check_weight(stage: _Deciding, compute_weight: float) -> None:
    if not 0 <= compute_weight < math.inf:
        raise ValueError(f"{type(stage).__name__}.compute_weight is {compute_weight}; give 0 or more")


def _technique(stage: _Deciding) -> str:
    return {SkipLayers: "skip", RefineSkips: "refine skips", GateChannels: "gate channels"}[type(stage)]


def _card(stage: _Deciding, source: Checkpoint, figures: Mapping[str, JsonScalar]) -> str:
    """README.md: what the student says of itself, and what it decides."""
    what = {
        SkipLayers: "Each token skips what it can do without.",
        RefineSkips: "Each token skips what it can do without; what that is was refined by REINFORCE.",
        GateChannels: "Each token uses some groups of each feed-forward's neurons.",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""{source.model_card().rstrip()}

# {stage.name}: {_technique(stage)}
{what[type(stage)]}

Import llmdistill first: `AutoModelForSeq2SeqLM` or `AutoModelForCausalLM` then reads the folder as any other, and `llmdistill serve` serves it.

| figure | value |
|---|---|
{table}
"""
