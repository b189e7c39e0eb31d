"""Which tokenizers llama.cpp has, by what their tokenizer.json says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from dense_models import TEXTS, tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmdistill.export.gguf_tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT, add_tokenizer, because_of_tokenizer

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TEXT = "It's 2024: some  cat,\n\n the MAT don't sit 3.14 東京 Å\u030a"


def trained(pre_tokenizer: Any, *, ignore_merges: bool = False, normalizer: Any = None) -> Any:
    built = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    built.pre_tokenizer = pre_tokenizer
    built.decoder = decoders.ByteLevel()
    if normalizer is not None:
        built.normalizer = normalizer
    special, alphabet = ["<pad>", "</s>", "<s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    built.train_from_iterator([*TEXTS, "2024 2024"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


KNOWN: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": tokenizer,
    "qwen2": lambda: trained(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), BYTES]), normalizer=normalizers.NFC()),
    "llama-bpe": lambda: trained(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), BYTES]), ignore_merges=True),
}


def written(made: Any, path: Path) -> dict[str, Any]:
    """The metadata that a file of this tokenizer alone has."""
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, made, 330)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return {name.removeprefix("tokenizer."): field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("pre", list(KNOWN))
def test_what_llama_cpp_knows_is_recognised(pre: str, tmp_path: Path) -> None:
    made = KNOWN[pre]()
    assert not because_of_tokenizer(made, 330)
    said = written(made, tmp_path / "t.gguf")
    assert said["ggml.pre"] == pre
    assert said["ggml.tokens"][: len(made)] == made.convert_ids_to_tokens(list(range(len(made))))
    assert set(said["ggml.tokens"][len(made) :]) == {f"[PAD{number}]" for number in range(len(made), 330)}
    assert said["ggml.token_type"][:4] == [3, 3, 3, 1]
    if pre != "smollm":  # of which transformers knows nothing: it leaves digits together
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
        assert theirs(TEXT, add_special_tokens=False)["input_ids"] == made(TEXT, add_special_tokens=False)["input_ids"]


def test_what_surrounds_a_text_is_said(tmp_path: Path) -> None:
    made = KNOWN["gpt-2"]()
    assert not (plain := written(made, tmp_path / "1.gguf"))["ggml.add_bos_token"]
    assert not plain["ggml.add_eos_token"]
    made.add_tokens(["<think>"])
    made.chat_template = "{{ messages }}"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 1)])
    said = written(made, tmp_path / "2.gguf")
    assert said["ggml.add_bos_token"]
    assert said["ggml.add_eos_token"]
    assert said["ggml.bos_token_id"] == 2
    assert said["chat_template"] == "{{ messages }}"
    assert said["ggml.token_type"][said["ggml.tokens"].index("<think>")] == gguf.TokenType.USER_DEFINED
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    (reason,) = because_of_tokenizer(made, 330)
    assert "puts [1] before a text and [] after it" in reason
    (reason,) = because_of_tokenizer(KNOWN["gpt-2"](), 280)
    assert "the model's vocabulary is 280" in reason


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tokenizer(lower_case=True), "normalizer is Lowercase.*lower_case=False"),
        (lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)), "in a way that is none of llama.cpp's gpt-2"),
        (lambda: trained(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), BYTES])), "splits text by Split, ByteLevel in a way"),
        (lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.NFC()), "normalizer is NFC"),
        (lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False), ignore_merges=True), "ignore_merges is True"),
    ],
)
def test_what_it_would_read_otherwise_is_refused(make: Callable[[], Any], message: str) -> None:
    (reason,) = because_of_tokenizer(make(), 330)
    assert re.search(message, reason)


def test_other_kinds_of_tokenizer_are_refused() -> None:
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    unigram.decoder = decoders.Metaspace()
    (reason,) = because_of_tokenizer(PreTrainedTokenizerFast(tokenizer_object=unigram), 330)
    assert "its tokenizer is Unigram with the decoder Metaspace" in reason
