"""What the cached rationales teach, for every stage that trains a finished student further: elastic, exits, gates, recovery."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llmdistill.core.artifacts import RationaleRow
from llmdistill.losses.multitask import LabelOnly, Multitask, RationaleOnly, lessons_of

if TYPE_CHECKING:
    from llmdistill.batches import Example
    from llmdistill.train import Lessons


class Learning(Protocol):
    """How a stage reads rows."""

    @property
    def loss(self) -> Multitask | LabelOnly | RationaleOnly: ...

    @property
    def max_input_tokens(self) -> int: ...

    @property
    def max_target_tokens(self) -> int: ...


def examples_of(learning: Learning, rows: Sequence[RationaleRow], tokenizer: Any, model: Any) -> "list[Example]":
    """Of rows, whatever their split."""
    limits = {"max_input_tokens": learning.max_input_tokens, "max_target_tokens": learning.max_target_tokens}
    return learning.loss.examples(lessons_of(rows), tokenizer, model.config, **limits)


def split_examples(learning: Learning, rows: Sequence[RationaleRow], split: str, tokenizer: Any, model: Any, *, needed: bool = True) -> "list[Example]":
    """Of the rows of a split. ValueError where there is none and some are needed."""
    examples = examples_of(learning, [row for row in rows if row.split == split], tokenizer, model)
    if needed and not examples:
        raise ValueError(f"none of the {len(rows)} rationales has split {split!r}, so there is nothing to learn from or to choose by; annotate some")
    return examples


def lessons_to_train(learning: Learning, rows: Sequence[RationaleRow], tokenizer: Any, model: Any, *, needs_validation: bool) -> "Lessons":
    """Of the splits "train" and "validation". ValueError where one that is needed has none."""
    from llmdistill.train import Lessons

    train = split_examples(learning, rows, "train", tokenizer, model)
    return Lessons(train=train, validation=split_examples(learning, rows, "validation", tokenizer, model, needed=needs_validation))
