"""The losses of Distilling step-by-step: L = L_label + lambda * L_rationale, and its two halves alone as ablations.

Source: Hsieh et al. 2023, section 3.2, equations 3 and 4. Both terms are cross-entropy by token, averaged over the target tokens of the whole step. Where
we differ: the reference runs the model twice, on batches padded to their longest; here both tasks are one batch, padded apart (batches.py), and the encoder
may be shared.

No torch at import: a pipeline holds these as settings.
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmdistill.core.artifacts import RationaleRow
from llmdistill.losses.prompts import EXPLAIN, PREDICT, Prompts, prefixed, shared_encoder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmdistill.batches import Batch, Example

LABEL, RATIONALE = "label", "rationale"
_TASK_OF_PART = {LABEL: PREDICT, RATIONALE: EXPLAIN}


class Form(enum.Enum):
    """How a T5 student is told the task."""

    TWO_PASS = "a prefix on the input; the encoder reads each text twice"
    SHARED_ENCODER = "the decoder's first token; the encoder reads each text once"


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What one row teaches. Without a rationale it teaches the label only."""

    input: str
    label: str
    rationale: str


def lessons_of(rows: Iterable[RationaleRow]) -> list[Lesson]:
    """What a teacher's rows teach."""
    return [Lesson(input=row.input, label=row.label, rationale=row.rationale) for row in rows]


@dataclass(frozen=True, kw_only=True)
class _TokenLoss:
    """Cross-entropy of each part's tokens, for whatever parts a subclass names."""

    form: Form = Form.TWO_PASS
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; give 0 or more and less than 1")

    @property
    def parts(self) -> tuple[str, ...]:
        """What is learned, in the order of the sums and counts."""
        raise NotImplementedError

    @property
    def weights(self) -> tuple[float, ...]:
        """What each part's mean counts in the loss."""
        return tuple(1.0 for _ in self.parts)

    def counts_P(self, batch: "Batch") -> "Tensor":
        """Target tokens of each part, without running the model."""
        from llmdistill.losses.loss import counts_P

        return counts_P(batch, num_parts=len(self.parts))

    def sums_P(self, model: "nn.Module", batch: "Batch") -> "Tensor":
        """Summed token losses of each part."""
        from llmdistill.losses.loss import cross_entropy_P, target_logits_NV

        smoothing = self.label_smoothing if model.training else 0.0
        return cross_entropy_P(target_logits_NV(model, batch), batch, num_parts=len(self.parts), label_smoothing=smoothing)

    def prompts(self, config: Any) -> Prompts:
        """How this student is told the task, from its transformers config."""
        if self.form is Form.TWO_PASS:
            return prefixed(is_encoder_decoder=config.is_encoder_decoder)
        return shared_encoder(
            is_encoder_decoder=config.is_encoder_decoder,
            start_token_id=getattr(config, "decoder_start_token_id", 0),
            end_token_id=getattr(config, "eos_token_id", 0),
        )

    def examples(self, lessons: Sequence[Lesson], tokenizer: Any, config: Any, *, max_input_tokens: int, max_target_tokens: int) -> "list[Example]":
        """The rows in tokens, in their order; a row without any of this loss's parts is left out."""
        from llmdistill.losses.tokens import make_examples

        examples = make_examples(
            [lesson.input for lesson in lessons],
            {_TASK_OF_PART[part]: [getattr(lesson, part) for lesson in lessons] for part in self.parts},
            self.prompts(config),
            tokenizer,
            start_token_id=getattr(config, "decoder_start_token_id", None) or 0,
            max_input_tokens=max_input_tokens,
            max_target_tokens=max_target_tokens,
        )
        return [example for example in examples if example]


@dataclass(frozen=True, kw_only=True)
class Multitask(_TokenLoss):
    """L_label + rationale_weight * L_rationale."""

    kind: ClassVar[str] = "multitask"

    rationale_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rationale_weight > 0:
            raise ValueError(f"rationale_weight is {self.rationale_weight}; give more than 0, or use the label-only loss")

    @property
    def parts(self) -> tuple[str, ...]:
        return (LABEL, RATIONALE)

    @property
    def weights(self) -> tuple[float, ...]:
        """The label's mean counts once, the rationale's rationale_weight times."""
        return (1.0, self.rationale_weight)


@dataclass(frozen=True, kw_only=True)
class LabelOnly(_TokenLoss):
    """L_label alone: ordinary distillation by label."""

    kind: ClassVar[str] = "label-only"

    @property
    def parts(self) -> tuple[str, ...]:
        return (LABEL,)


@dataclass(frozen=True, kw_only=True)
class RationaleOnly(_TokenLoss):
    """L_rationale alone: a student that explains and was never taught to label."""

    kind: ClassVar[str] = "rationale-only"

    @property
    def parts(self) -> tuple[str, ...]:
        return (RATIONALE,)
