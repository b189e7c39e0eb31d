"""Settings of the recovery: a short re-distillation of a compressed student from the same rows, with the uncompressed student as its teacher.

The loss is in losses/recover.py, the run in recover_run.py. No torch at import.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import ClassVar

from llmdistill.train_settings import Epochs, TrainSettings
from llmdistill.tuning import Full, LoRA


class StepStart(enum.Enum):
    """Where learned steps of quantization begin."""

    FITTED = "at the scales (and zeros) that the method finds without training"
    PAPER = "at 2 mean|w| / sqrt(Qp), without zeros, as LSQ has it"


@dataclass(frozen=True, kw_only=True)
class Recover:
    """How a compressed student is trained again."""

    kind: ClassVar[str] = "recover"

    settings: TrainSettings = TrainSettings(duration=Epochs(3), learning_rate=2e-4, evaluate_every_steps=50)
    kl_weight: float = 1.0
    """What KL from the uncompressed student's logits counts, part by part; a mean over tokens, as the cross-entropy is."""
    hard_weight: float = 1.0
    """What the multitask loss counts."""
    temperature: float = 2.0
    """At which the logits are learned."""
    tuning: Full | LoRA = Full()
    dropout: bool = False
    """The student's dropout while it is trained. Off: what it is to say again was said without, and with it a good student only gets worse."""
    quantization_aware: bool = False
    """Train with the rounding of the int8 or int4 that follows, and learn its steps (lsq.py)."""
    steps: StepStart = StepStart.FITTED

    def __post_init__(self) -> None:
        weights = (self.hard_weight, self.kl_weight)
        if not (all(math.isfinite(weight) and weight >= 0 for weight in weights) and sum(weights) > 0):
            raise ValueError(f"Recover.hard_weight is {self.hard_weight} and kl_weight {self.kl_weight}; give 0 or more, and one of them more than 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"Recover.temperature is {self.temperature}; give more than 0, such as 1 or 2")
        if self.quantization_aware and isinstance(self.tuning, LoRA):
            raise ValueError("Recover.quantization_aware trains the weights that are rounded, and LoRA freezes them; use tuning=Full()")
