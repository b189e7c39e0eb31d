"""Rows of text to examples of tokens, as training reads them and as decoding will ask for them.

The input is tokenized alone, as a server does it, and never together with its target: so a causal student sees the same prompt in training and in use.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmdistill.batches import Example, Pair
from llmdistill.losses.prompts import Prompts

log = logging.getLogger(__name__)


def make_examples(
    inputs: Sequence[str],
    targets: Mapping[str, Sequence[str]],
    prompts: Prompts,
    tokenizer: Any,
    *,
    start_token_id: int,
    max_input_tokens: int,
    max_target_tokens: int,
) -> list[Example]:
    """One example a row. `targets` are by task, and numbered as parts in their order; an empty target gives no pair."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the student's tokenizer has no end token, so its answers would never end; set tokenizer.eos_token")
    rows: list[list[Pair]] = [[] for _ in inputs]
    tokens_of: dict[str, list[np.ndarray]] = {}  # by the text's prefix, so that tasks with the same one share their arrays
    for part, (task, texts) in enumerate(targets.items()):
        prefix = prompts.prefixes[task]
        if prefix not in tokens_of:
            tokens_of[prefix] = _inputs(tokenizer, [prompts.text(task, text) for text in inputs], max_input_tokens)
        start = prompts.decoder_start_token_ids.get(task, start_token_id)
        for row, tokens, target, text in zip(rows, tokens_of[prefix], _targets(tokenizer, texts, max_target_tokens), texts, strict=True):
            if text.strip():
                row.append(Pair(part=part, input=tokens, target=target, start=start))
    return [tuple(row) for row in rows]


def _inputs(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[np.ndarray]:
    """Too long an input loses what stands before its last token, which is its end or its suffix."""
    encoded = _encode(tokenizer, texts)
    _say_how_many([len(tokens) for tokens in encoded], max_tokens, "inputs", "max_input_tokens")
    return [np.array(tokens if len(tokens) <= max_tokens else tokens[: max_tokens - 1] + tokens[-1:], dtype=np.int32) for tokens in encoded]


def _targets(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[np.ndarray]:
    """Target and end token. One that is cut does not end, so that the student never learns to stop there."""
    encoded = [[*tokens, tokenizer.eos_token_id] for tokens in _encode(tokenizer, texts, add_special_tokens=False)]
    _say_how_many([len(tokens) for tokens in encoded], max_tokens, "targets", "max_target_tokens")
    return [np.array(tokens[:max_tokens], dtype=np.int32) for tokens in encoded]


def _encode(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    return tokenizer(list(texts), return_attention_mask=False, verbose=False, **options)["input_ids"] if texts else []


def _say_how_many(lengths: Sequence[int], max_tokens: int, what: str, setting: str) -> None:
    num = sum(length > max_tokens for length in lengths)
    if num:
        log.warning("%d of %d %s are longer than %s (%d; the longest has %d tokens) and are cut", num, len(lengths), what, setting, max_tokens, max(lengths))
