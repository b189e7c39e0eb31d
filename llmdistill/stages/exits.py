"""TrainExits: a student in, the same student out with exits between its decoder's layers, trained from the cached rationales.

    TrainExits(checkpoint=student, task=task, rationales=rationales, num_exits=3)

Each exit is a norm, on request an adapter and a gate, before the student's own head (models/exits.py). Trained are the exits alone, so that the full model
stays what it was to the bit, or the whole student with them (losses/exits.py). At which confidence a token may leave is found afterwards
(stages/calibrate.py); until then none does, and the checkpoint is decoded at full depth.

The exits of an elastic student are its sub-networks' too (elastic/exit_cuts.py): at every step they learn from the whole and from some of these, whose weights
stay what they are.

While it builds, `training/` holds the student with its new exits and the state of the training.
"""

import enum
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdistill.core.artifacts import Checkpoint, RationaleRow, Rationales
from llmdistill.core.manifest import describe
from llmdistill.core.run import Run
from llmdistill.core.stage import JsonScalar, Launcher, Stage
from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.strategy import Sandwich, watched
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly
from llmdistill.models.exit_settings import Confidence, ExitSettings, Policy
from llmdistill.stages.distil_card import task_section
from llmdistill.stages.learned_rows import lessons_to_train, split_examples
from llmdistill.stages.training_folder import load_to_train, training_folder
from llmdistill.tasks.task import Task
from llmdistill.train_settings import Best, Epochs, TrainSettings

if TYPE_CHECKING:
    from llmdistill.batches import Example
    from llmdistill.losses.exits import ExitLoss
    from llmdistill.losses.in_guises import LossInGuises

log = logging.getLogger(__name__)


class Trains(enum.Enum):
    """What is trained."""

    EXITS = "the exits alone; the full model stays what it was"
    WHOLE = "the student and its exits together"


class Vocabulary(enum.Enum):
    """Which tokens an exit can say."""

    WHOLE = "all tokens: the student's head as it is"
    OF_ROWS = "the tokens of the train rows' answers: those rows of the student's head, which is cheaper"


@dataclass(frozen=True, kw_only=True)
class TrainExits(Stage[Checkpoint]):
    """A student with exits."""

    artifact = Checkpoint
    launcher = Launcher.ACCELERATE

    checkpoint: Stage[Checkpoint]
    task: Task
    rationales: Stage[Rationales]
    loss: Multitask | LabelOnly | RationaleOnly = Multitask()
    num_exits: int = 3
    """Evenly spread over the decoder's layers; fewer where it has fewer."""
    layers: tuple[int, ...] = ()
    """After which layers instead; empty for evenly spread ones."""
    encoder_layers: tuple[int, ...] = ()
    """After which layers of a T5's encoder a prompt may leave; for short answers, where the encoder is most of the work."""
    adapter_rank: int = 0
    vocabulary: Vocabulary = Vocabulary.OF_ROWS
    gates: bool = True
    """Gates are trained, so that CalibrateExits can choose them as the confidence."""
    confidence: Confidence = Confidence.TOP1
    policy: Policy = Policy.DEFERRED
    trains: Trains = Trains.EXITS
    subnets: Sandwich = Sandwich()
    """The sub-networks of an elastic student that each step learns from beside the whole."""
    kl_weight: float = 1.0
    temperature: float = 1.0
    layer_dropout: float = 0.0
    """The rate of the last layer, while the whole student is trained."""
    input_noise: float = 0.0
    """The most of a row's input tokens replaced, in half of the train rows. Gates need it: of rows that a student knows by heart they learn nothing."""
    settings: TrainSettings = TrainSettings(duration=Epochs(8), learning_rate=3e-3, evaluate_every_steps=50)
    dropout: bool = False
    """The student's own dropout while it is trained."""
    max_input_tokens: int = 512
    max_target_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.settings.best not in (Best.LOSS, Best.LAST):
            raise ValueError(f"settings.best is {self.settings.best.name}, which looks at the full model alone; use LOSS (of the exits too) or LAST")
        for name, least in (("num_exits", 1), ("max_input_tokens", 2), ("max_target_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"TrainExits.{name} is {getattr(self, name)}; give {least} or more")
        if self.layer_dropout and self.trains is Trains.EXITS:
            raise ValueError(f"TrainExits.layer_dropout is {self.layer_dropout}, and the layers are not trained: set trains=WHOLE, or layer_dropout=0")

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        from llmdistill.models.modes import only_trained, without_dropout
        from llmdistill.train import train

        rows = run.artifact(self.rationales).rows()
        with training_folder(run, lambda initial: self._prepare(run, initial, rows)) as (folder, process):
            model, tokenizer = load_to_train(folder / "initial")
            lessons = lessons_to_train(self, rows, tokenizer, model, needs_validation=self.settings.best is not Best.LAST)
            with ExitStack() as stack:
                if not self.dropout or self.trains is Trains.EXITS:
                    stack.enter_context(without_dropout(model))
                if self.trains is Trains.EXITS:
                    stack.enter_context(only_trained(model, list(model.exits.parameters())))  # pyright: ignore[reportAttributeAccessIssue]
                trained = train(model, lessons, self._loss(model), self.settings, folder, seed=self.seed, journal=run)
            figures: dict[str, JsonScalar] = {**trained.figures, "num_train_examples": len(lessons.train)}
            if process.is_main_process:
                figures |= self._write(run, folder, trained.weights, lessons.train, figures)
        return figures

    def _prepare(self, run: Run, folder: Path, rows: Sequence[RationaleRow]) -> None:
        """Write the student with its new exits."""
        import torch

        from llmdistill.elastic.kept import is_elastic
        from llmdistill.models import checkpoint
        from llmdistill.models.anatomy import stacks
        from llmdistill.models.exits import add_exits

        source = run.artifact(self.checkpoint)
        model, tokenizer = checkpoint.load(source.folder)
        if is_elastic(model) and self.trains is Trains.WHOLE:
            raise ValueError(
                f"the student of {self.checkpoint.name!r} is elastic, and its sub-networks were trained for the weights that it has: set trains=EXITS, or "
                "extract one first (the Extract stage, or `llmdistill extract FOLDER OUT --subnet TEXT`) and train that"
            )
        num_layers = len(stacks(model)[-1].layers)
        if num_layers < 2:
            raise ValueError(
                f"the student of {self.checkpoint.name!r} has {num_layers} decoder layer, and an exit needs one below it and one above: take a deeper one"
            )
        layers = self.layers or evenly(self.num_exits, num_layers)
        vocabulary = self._vocabulary(split_examples(self, rows, "train", tokenizer, model), model) if self.vocabulary is Vocabulary.OF_ROWS else []
        settings = ExitSettings(
            layers=layers,
            encoder_layers=self.encoder_layers,
            adapter_rank=self.adapter_rank,
            num_vocabulary=len(vocabulary),
            has_gates=self.gates,
            confidence=self.confidence,
            policy=self.policy,
        )
        torch.manual_seed(self.seed)  # adapters and gates begin at random
        add_exits(model, settings, vocabulary)
        checkpoint.save(model, tokenizer, folder, lineage=source.lineage(), card=source.model_card())

    def _vocabulary(self, examples: "Sequence[Example]", model: Any) -> list[int]:
        """Every token of the answers, ascending, and those that end one."""
        counts = Counter(int(token) for example in examples for pair in example for token in pair.target)
        stops = getattr(model.generation_config, "eos_token_id", None)
        return sorted(counts.keys() | set([] if stops is None else [stops] if isinstance(stops, int) else stops))

    def _loss(self, model: Any) -> "ExitLoss | LossInGuises":
        from llmdistill.elastic.kept import is_elastic
        from llmdistill.losses.exits import ExitLoss

        loss = ExitLoss(
            multitask=self.loss,
            has_gates=self.gates or bool(self.encoder_layers),
            trains_whole=self.trains is Trains.WHOLE,
            kl_weight=self.kl_weight,
            temperature=self.temperature,
            layer_dropout=self.layer_dropout,
            input_noise=self.input_noise,
            seed=self.seed,
        )
        return self._in_sub_networks(loss, model) if is_elastic(model) else loss

    def _in_sub_networks(self, loss: "ExitLoss", model: Any) -> "LossInGuises":
        """The loss of the whole and of those sub-networks of each step that have exits."""
        from llmdistill.elastic.exit_cuts import exits_within
        from llmdistill.elastic.kept import space_of
        from llmdistill.elastic.subnet import with_subnet
        from llmdistill.losses.in_guises import LossInGuises
        from llmdistill.models.exit_settings import read_exits

        space, settings = space_of(model), read_exits(model.config)
        assert settings is not None, "the student has exits before it is trained"
        of_step = self.subnets.subnets(space, seed=self.seed, num_steps=0)

        def guises(subnets: Sequence[Subnet]) -> list[Any]:
            return [partial(with_subnet, subnet=subnet) for subnet in subnets if exits_within(settings, space, subnet)]

        return LossInGuises(loss=loss, guises=lambda step: guises(of_step(step)), watched=guises(watched(space, seed=self.seed)))

    def _write(self, run: Run, folder: Path, weights: Path, examples: "Sequence[Example]", figures: Mapping[str, JsonScalar]) -> dict[str, JsonScalar]:
        """Write the checkpoint; returns its sizes."""
        from llmdistill.models import checkpoint
        from llmdistill.train_state import read_weights

        model, tokenizer = load_to_train(folder / "initial")
        read_weights(model, weights)
        if getattr(model.config, "llmdistill", None) is None:
            model.config.llmdistill = task_section(self.task, self.loss, model.config, examples)
        settings = ExitSettings.from_json(model.config.exits)  # pyright: ignore[reportArgumentType]
        sizes: dict[str, JsonScalar] = {
            "exit_layers": ", ".join(map(str, settings.layers)),
            "encoder_exit_layers": ", ".join(map(str, settings.encoder_layers)),
            "exit_parameters": sum(parameter.numel() for parameter in model.exits.parameters()),  # pyright: ignore[reportAttributeAccessIssue]
            "exit_vocabulary": settings.num_vocabulary,
        }
        source = Checkpoint(folder / "initial")
        entry = {"technique": "exits", "settings": describe(self), "measured": dict(figures) | sizes}
        checkpoint.save(model.eval(), tokenizer, run.folder, lineage=[*source.lineage(), entry], card=_card(self, source, dict(figures) | sizes))
        return sizes


def evenly(num_exits: int, num_layers: int) -> tuple[int, ...]:
    """After which layers, at most so many exits lie."""
    return tuple(sorted({round(num_layers * number / (num_exits + 1)) for number in range(1, num_exits + 1)} - {0, num_layers}))


def _card(stage: TrainExits, source: Checkpoint, figures: Mapping[str, JsonScalar]) -> str:
    """README.md: what the student says of itself, and where it may be left."""
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    encoder = f" and a prompt the encoder after {figures['encoder_exit_layers']}" if stage.encoder_layers else ""
    return f"""{source.model_card().rstrip()}

# {stage.name}: exits
A token may leave the decoder after layer {figures["exit_layers"]}{encoder},
where llmdistill decodes and a threshold says when; until one is calibrated, none leaves. In transformers' own `generate` it is the full model.

| figure | value |
|---|---|
{table}
"""
