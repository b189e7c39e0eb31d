"""Settings of the training loop. No torch here: pipelines and stages hold these, and must answer `--help` at once.

A choice between kinds is a type (`Epochs(10) | Steps(500)`); each has a `kind`, so that it is one word on the command line (`epochs:10`).
Fields marked speed() change how fast the same weights are reached, and so are no part of a stage's key.
"""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from llmdistill.core.stage import speed


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; give a number above 0")


def _at_least_0(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; give 0 or more")


class BatchUnit(enum.Enum):
    """What batch_size and micro_batch_size count."""

    EXAMPLES = "examples"
    PADDED_TOKENS = "tokens of inputs and targets, padding included"


class Schedule(enum.Enum):
    """How the learning rate moves; transformers' names."""

    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    COSINE_WITH_MIN_LR = "cosine_with_min_lr"
    POLYNOMIAL = "polynomial"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    INVERSE_SQRT = "inverse_sqrt"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"


class Precision(enum.Enum):
    """The type that the model computes in; its weights and the optimizer stay in float32. A user's own accelerate setting comes first."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FASTEST = "bfloat16 where the hardware multiplies it faster than float32, else float32"


class Best(enum.Enum):
    """Which weights are kept in the end. The value is the figure of the validation rows that decides, and whether more is better."""

    LAST = ("", False)
    LOSS = ("validation_loss", False)
    LABEL_LOSS = ("validation_loss_label", False)
    ACCURACY = ("validation_accuracy", True)

    @property
    def figure(self) -> str:
        """Name of the figure, empty for LAST."""
        return self.value[0]

    @property
    def more_is_better(self) -> bool:
        return self.value[1]


class Tracker(enum.Enum):
    """Where figures go beside metrics.jsonl, through accelerate."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"


@dataclass(frozen=True)
class Epochs:
    """So many passes over the rows."""

    kind: ClassVar[str] = "epochs"
    number: float

    def __post_init__(self) -> None:
        _positive("number of epochs", self.number)


@dataclass(frozen=True)
class Steps:
    """So many steps of the optimizer."""

    kind: ClassVar[str] = "steps"
    number: int

    def __post_init__(self) -> None:
        _at_least_0("number of steps", self.number)


@dataclass(frozen=True)
class Share:
    """A part of all steps, from 0 to 1."""

    kind: ClassVar[str] = "share"
    of_steps: float

    def __post_init__(self) -> None:
        if not 0 <= self.of_steps <= 1:
            raise ValueError(f"a share of the steps is {self.of_steps}; give 0 to 1")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay; norms and biases are not decayed."""

    kind: ClassVar[str] = "adamw"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        _at_least_0("weight_decay", self.weight_decay)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more and less than 1")
        _positive("epsilon", self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Adafactor:
    """Factored second moments: little memory, and what T5 was trained with. Updates are scaled by the size of the weights, so the learning rate is relative."""

    kind: ClassVar[str] = "adafactor"
    weight_decay: float = 0.0
    beta2_decay: float = -0.8

    def __post_init__(self) -> None:
        _at_least_0("weight_decay", self.weight_decay)
        if not -1 < self.beta2_decay <= 0:
            raise ValueError(f"beta2_decay is {self.beta2_decay}; give more than -1 and at most 0 (0.8 is the paper's, as -0.8)")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a student is trained."""

    batch_size: int = 32
    """Examples (or padded tokens) of one step, over all processes and micro-batches together."""
    batch_unit: BatchUnit = BatchUnit.EXAMPLES
    micro_batch_size: int = speed(64)
    """The most that one process puts through the model at once; a step with more is accumulated."""
    bucket_steps: int = 8
    """Rows of so many steps are sorted by length before they are cut into batches; 1 leaves them wholly at random and pads the most."""
    duration: Epochs | Steps = Epochs(10)
    learning_rate: float = 1e-3
    schedule: Schedule = Schedule.LINEAR
    schedule_options: Mapping[str, float] = field(default_factory=dict)
    """Further arguments of the schedule, by transformers' names (num_cycles, min_lr, num_decay_steps, ...)."""
    warmup: Steps | Share = Share(0.06)
    optimizer: AdamW | Adafactor = AdamW()
    max_gradient_norm: float = 1.0
    precision: Precision = Precision.FLOAT32
    evaluate_every_steps: int = 100
    """Validation rows are looked at this often, and at the end."""
    best: Best = Best.LOSS
    patience_evaluations: int = 0
    """Stop after so many evaluations without a better one; 0 trains to the end."""
    checkpoint_every_s: float = speed(300.0)
    """How much work a killed run may lose."""
    log_every_steps: int = speed(20)
    trackers: tuple[Tracker, ...] = speed(())
    deterministic: bool = speed(False)
    """Let torch raise where an operation of this device is not deterministic. On CPUs all that we use are."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size", "bucket_steps", "evaluate_every_steps", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("learning_rate", "max_gradient_norm", "checkpoint_every_s"):
            _positive(name, getattr(self, name))
        _at_least_0("patience_evaluations", self.patience_evaluations)
        if self.duration == Steps(0):
            raise ValueError("duration is 0 steps; give 1 or more")
        if self.patience_evaluations and self.best is Best.LAST:
            raise ValueError(
                "patience_evaluations needs a figure to watch, but best is LAST; set best to LOSS, LABEL_LOSS or ACCURACY, or patience_evaluations to 0"
            )

    def num_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole training."""
        return self.duration.number if isinstance(self.duration, Steps) else max(1, round(self.duration.number * steps_per_epoch))

    def num_warmup_steps(self, num_steps: int) -> int:
        """Steps until the learning rate is reached."""
        return self.warmup.number if isinstance(self.warmup, Steps) else round(self.warmup.of_steps * num_steps)
