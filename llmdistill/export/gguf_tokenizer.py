"""A byte-level BPE tokenizer as GGUF metadata.

llama.cpp has code of its own for each way of splitting text before the merges, and a GGUF only says which ("pre"). Those that are known here are recognised by
what tokenizer.json says, step by step; a tokenizer that does anything else (folds capitals, splits otherwise, SentencePiece) would give other tokens there,
and is refused. Source: the regular expressions of llama-vocab.cpp in llama.cpp, beside those of the tokenizers library.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTES_AND_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES = BYTES_AND_WORDS | {"use_regex": False}

PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTES_AND_WORDS],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES_AND_WORDS],
    "qwen2": [{"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}, BYTES],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}, BYTES],
}
"""llama.cpp's name for the steps that it knows. "smollm" is also what a tokenizer trained here does (models/tokenizer.py)."""


def because_of_tokenizer(tokenizer: Any, num_tokens: int) -> list[str]:
    """Why llama.cpp would read text otherwise than this tokenizer, of a model with so many tokens."""
    data = _data(tokenizer)
    model, pre, decoder = data["model"], _pre_tokenizer(data), (data["decoder"] or {}).get("type")
    if model["type"] != "BPE" or decoder != "ByteLevel":
        return [f"its tokenizer is {model['type']} with the decoder {decoder}, and what can be written is byte-level BPE"]
    reasons = []
    if not pre:
        steps, known = ", ".join(step["type"] for step in _steps(data["pre_tokenizer"])), ", ".join(PRE_TOKENIZERS)
        reasons.append(f"its tokenizer splits text by {steps} in a way that is none of llama.cpp's {known}")
    normalizer = (data["normalizer"] or {}).get("type")
    if normalizer and (normalizer, pre) != ("NFC", "qwen2"):  # which llama.cpp leaves out for all that are read so
        reasons.append(f"its tokenizer's normalizer is {normalizer}, and llama.cpp has none: where it folds capitals, train the student with lower_case=False")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            reasons.append(f"its tokenizer's {name} is {model[name]!r}, which llama.cpp does not do")
    if pre and bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        reasons.append(f"its tokenizer's ignore_merges is {model.get('ignore_merges')}, and for {pre} llama.cpp takes the other")
    starts, ends = _around(tokenizer)
    if starts not in ([], [tokenizer.bos_token_id]) or ends not in ([], [tokenizer.eos_token_id]):
        reasons.append(f"its tokenizer puts {starts} before a text and {ends} after it, and llama.cpp puts a start token, an end token, or neither")
    if max(_ids(data).values()) >= num_tokens:
        reasons.append(f"its tokenizer has token {max(_ids(data).values())}, and the model's vocabulary is {num_tokens}")
    return reasons


def add_tokenizer(writer: Any, tokenizer: Any, num_tokens: int) -> None:
    """Write one that llama.cpp has to a GGUFWriter, filled up to the model's vocabulary."""
    from gguf import TokenType

    data = _data(tokenizer)
    added = {token["content"]: token for token in data["added_tokens"]}
    tokens, types = [f"[PAD{number}]" for number in range(num_tokens)], [TokenType.UNUSED] * num_tokens
    for text, number in _ids(data).items():
        tokens[number] = text
        types[number] = TokenType.NORMAL if text not in added else TokenType.CONTROL if added[text]["special"] else TokenType.USER_DEFINED
    starts, ends = _around(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(data))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]])
    writer.add_add_bos_token(bool(starts))
    writer.add_add_eos_token(bool(ends))
    for add, number in ((writer.add_bos_token_id, tokenizer.bos_token_id), (writer.add_pad_token_id, tokenizer.pad_token_id)):
        if number is not None:
            add(number)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    elif tokenizer.chat_template:
        writer.add_chat_template([{"name": name, "template": template} for name, template in tokenizer.chat_template.items()])


def _data(tokenizer: Any) -> dict[str, Any]:
    """What tokenizer.json says."""
    if not tokenizer.is_fast:
        raise ValueError(f"a {type(tokenizer).__name__} has no tokenizer.json, from which a GGUF's tokenizer is written: use ctranslate2, or a fast tokenizer")
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _ids(data: Mapping[str, Any]) -> dict[str, int]:
    """Every token with its number."""
    return data["model"]["vocab"] | {token["content"]: token["id"] for token in data["added_tokens"]}


def _pre_tokenizer(data: Mapping[str, Any]) -> str:
    """llama.cpp's name for it; "" where it has none."""
    steps = [{name: value for name, value in step.items() if name != "trim_offsets"} for step in _steps(data["pre_tokenizer"])]
    return next((name for name, known in PRE_TOKENIZERS.items() if steps == known), "")


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if pre_tokenizer is not None and pre_tokenizer["type"] == "Sequence":
        for step in pre_tokenizer["pretokenizers"]:
            yield from _steps(step)
    elif pre_tokenizer is not None:
        yield pre_tokenizer


def _around(tokenizer: Any) -> tuple[Sequence[int], Sequence[int]]:
    """The tokens that are put before and after a text."""
    inner, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next(start for start in range(len(whole)) if whole[start : start + len(inner)] == inner)
    return whole[:start], whole[start + len(inner) :]
