"""Laws: decoding undoes encoding for any text, digits stand alone, and training is a function of its texts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmdistill.models.tokenizer import END, PAD, UNKNOWN, train_tokenizer

TEXTS = ["predict: where is my order 1234?", "explain: the order is late", "delivery_status", "Ünïcödé → 訂單"] * 3
TOKENIZER = train_tokenizer(TEXTS, 300, lower_case=False, ends_every_text=True)


@given(st.text())
def test_decoding_gives_the_text_back_and_nothing_is_unknown(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    assert ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.unk_token_id not in ids


def test_ids_are_those_that_t5_expects() -> None:
    assert TOKENIZER.convert_tokens_to_ids([PAD, END, UNKNOWN]) == [0, 1, 2]
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id) == (0, 1, 2)
    assert len(TOKENIZER) <= 300


def test_the_names_of_special_tokens_in_a_text_are_text() -> None:
    ids = TOKENIZER(f"a {END} b {PAD}").input_ids
    assert ids.count(TOKENIZER.eos_token_id) == 1
    assert TOKENIZER.pad_token_id not in ids


def test_digits_are_split_singly_and_pairs_of_letters_are_merged() -> None:
    tokens = train_tokenizer(["order 2024"] * 50, 300, lower_case=False, ends_every_text=False).tokenize("order 2024")
    assert tokens == ["order", "Ġ", "2", "0", "2", "4"]


def test_lower_case_folds_what_it_reads() -> None:
    tokenizer = train_tokenizer(TEXTS, 300, lower_case=True, ends_every_text=False)
    assert tokenizer("WHERE").input_ids == tokenizer("where").input_ids


def test_a_prompt_stays_open_where_asked() -> None:
    tokenizer = train_tokenizer(TEXTS, 300, lower_case=False, ends_every_text=False)
    assert tokenizer.eos_token_id not in tokenizer("where is my order").input_ids


def test_equal_texts_give_equal_tokenizers() -> None:
    assert train_tokenizer(iter(TEXTS), 300, lower_case=False, ends_every_text=True).backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_a_saved_one_is_an_ordinary_folder(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    text = f"Order 12 {END} is late"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text
    assert {file.suffix for file in tmp_path.iterdir()} == {".json"}


def test_refuses_a_vocabulary_without_room_for_the_bytes() -> None:
    with pytest.raises(ValueError, match="at least 259"):
        train_tokenizer(TEXTS, 258, lower_case=False, ends_every_text=True)
