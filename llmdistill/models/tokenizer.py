"""A tokenizer trained on the task's own text, for students that are built from scratch.

Byte-level BPE: all 256 bytes are in the vocabulary, so nothing is ever unknown and decoding gives the text back exactly (up to the folding of capitals,
where asked for). Digits are split singly, so that numbers of any length are spelled from ten tokens. Ids are those that T5 expects: padding 0, end 1,
unknown 2 (kept for T5's sake; byte-level text never needs it). The names of those three in a user's text ("</s>") are read as text and not as tokens.

The result is an ordinary `tokenizer.json` folder. Training counts pairs of tokens and nothing else: the same texts in the same order give the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
NUM_SPECIAL_TOKENS = 3
NUM_BYTES = 256
MIN_VOCABULARY_SIZE = NUM_SPECIAL_TOKENS + NUM_BYTES


def check_vocabulary_size(vocabulary_size: int) -> None:
    """Raise where not even the bytes would find room."""
    if vocabulary_size < MIN_VOCABULARY_SIZE:
        raise ValueError(
            f"vocabulary_size is {vocabulary_size}: it must be at least {MIN_VOCABULARY_SIZE}, "
            f"for the {NUM_BYTES} bytes and the {NUM_SPECIAL_TOKENS} special tokens"
        )


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, *, lower_case: bool, ends_every_text: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary_size` tokens (fewer where the text has no more pairs to merge).

    lower_case: fold capitals before splitting; decoding then gives lower case.
    ends_every_text: encoding appends the end token, as T5's tokenizers do; causal prompts must stay open.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    check_vocabulary_size(vocabulary_size)
    tokenizer = Tokenizer(models.BPE())
    if lower_case:
        tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if ends_every_text:
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )
