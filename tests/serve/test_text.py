"""Text that comes in pieces is the text that comes at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.serve.text import Detokenizer, StopMatcher, TextStream

WORDS = st.text(alphabet="theordr p,é小🙂\u0301", max_size=12)


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The law, written the slow way: look at ever longer beginnings until one ends in a stop string."""
    for end in range(len(text) + 1):
        starts = [end - len(string) for string in stop if text[:end].endswith(string)]
        if starts:
            return text[: min(starts)], True
    return text, False


def pieces(sequence: Sequence, lengths: Sequence[int]) -> list:
    result, start = [], 0
    for length in lengths:
        result.append(sequence[start : start + length])
        start += length
    return [*result, sequence[start:]]


@given(
    text=st.text(alphabet="abc", max_size=20), stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3), lengths=st.lists(st.integers(0, 4))
)
def test_stop_strings_cut_alike_however_the_text_arrives(text: str, stop: list[str], lengths: list[int]) -> None:
    matcher = StopMatcher(stop)
    shown = "".join(matcher.push(piece) for piece in pieces(text, lengths))
    expected, is_cut = cut(text, stop)
    assert expected.startswith(shown)
    assert matcher.found == is_cut
    assert shown + matcher.close() == expected


@given(text=st.text(alphabet="abc", max_size=20), stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
def test_text_is_held_back_no_longer_than_a_stop_string_could_need(text: str, stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    shown = "".join(matcher.push(character) for character in text)
    held = "" if matcher.found else text[len(shown) :]
    assert held == "" or any(string.startswith(held) for string in stop)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop string is empty"):
        StopMatcher(["a", ""])


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "byte_fallback"])
@pytest.mark.parametrize("causal", [False, True])
def test_detokenized_pieces_join_to_the_whole_text(tokenizers, kind: str, causal: bool) -> None:
    tokenizer = tokenizers[kind]

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @settings(deadline=None, max_examples=30)
    @given(words=st.lists(WORDS, max_size=4), lengths=st.lists(st.integers(1, 3), max_size=20))
    def check(words: list[str], lengths: list[int]) -> None:
        tokens = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
        context = tokenizer("the order", add_special_tokens=False)["input_ids"] if causal else []
        stream = Detokenizer(decode, context)
        shown = [stream.push(piece) for piece in pieces(tokens, lengths) if piece]
        assert not any("\ufffd" in piece for piece in shown)
        assert "".join(shown) + stream.close() == decode(context + tokens)[len(decode(context)) :]

    check()


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_any_tokens_at_all_give_the_text_of_the_whole(tokenizers, kind: str) -> None:
    """Random models write bytes that are no characters."""
    tokenizer = tokenizers[kind]

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @settings(deadline=None, max_examples=30)
    @given(tokens=st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    def check(tokens: list[int]) -> None:
        stream = Detokenizer(decode)
        assert "".join(stream.push([token]) for token in tokens) + stream.close() == decode(tokens)

    check()


def test_a_stop_string_may_end_inside_a_token_and_inside_a_character(tokenizers) -> None:
    tokenizer = tokenizers["byte_level"]
    tokens = tokenizer("a small box 小さい箱 came")["input_ids"]
    stream = TextStream(tokenizer.decode, stop=["さい"])
    shown = []
    for token in tokens:
        shown.append(stream.push([token]))
        if stream.stopped:
            break
    assert "".join(shown) + stream.close() == "a small box 小"
    assert stream.stopped
