"""Bodies and answers of the OpenAI protocol, as data."""

import contextlib
import email.utils
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.teach.openai_protocol import FatalError, PassingError, read_answer, request_body, retry_after_seconds
from llmdistill.teach.teacher import Sampling


def answer(data: object, status: int = 200, chat: bool = True, wait_seconds: float = 0.0):
    return read_answer(status, json.dumps(data).encode(), chat=chat, wait_seconds=wait_seconds)


def test_bodies() -> None:
    greedy = Sampling(max_tokens=9, stop=("\n", "a", "b", "c", "d"))
    assert request_body("m", "p", 0, greedy, reasoning=False) == {
        "model": "m", "prompt": "p", "max_tokens": 9, "temperature": 0.0, "stop": ["\n", "a", "b", "c"],
    }  # fmt: skip
    drawn = request_body("m", [{"role": "user", "content": "p"}], 3, Sampling(temperature=0.5, top_p=0.9, seed=7), reasoning=False)
    assert (drawn["seed"], drawn["top_p"], "stop" in drawn) == (10, 0.9, False)
    assert request_body("m", [], 0, greedy, reasoning=True) == {"model": "m", "messages": [], "max_completion_tokens": 9}


def test_answers() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    chat = answer({"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}], "usage": usage})
    assert (chat.text, chat.tokens_in, chat.tokens_out, chat.was_cut) == ("yes", 5, 2, False)
    plain = answer({"choices": [{"text": "ye", "finish_reason": "length"}]}, chat=False)
    assert (plain.text, plain.tokens_in, plain.tokens_out, plain.was_cut) == ("ye", None, None, True)
    assert answer({"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}).text == ""
    assert answer({"choices": [{"message": {"content": "half \ud83d"}}]}).text == "half ?"


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 529])
def test_what_passes_is_tried_again(status: int) -> None:
    with pytest.raises(PassingError, match="HTTP") as failure:
        answer({"error": {"message": "busy"}}, status, wait_seconds=4.0)
    assert failure.value.wait_seconds == 4.0


@pytest.mark.parametrize("status, error", [(400, "bad"), (401, {"message": "key"}), (404, {"message": "no such model"}), (429, {"code": "insufficient_quota"})])
def test_what_cannot_pass_is_not(status: int, error: object) -> None:
    with pytest.raises(FatalError, match=f"HTTP {status}"):
        answer({"error": error}, status)


NO_COMPLETION = [None, [], {}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": "text"}]}, {"choices": [{"message": {"content": 7}}]}]


@pytest.mark.parametrize("data", NO_COMPLETION)
def test_an_answer_without_a_completion_may_pass(data: object) -> None:
    with pytest.raises(PassingError):
        answer(data)


@given(st.binary(max_size=200), st.integers(100, 599), st.booleans())
def test_no_answer_raises_anything_else(content: bytes, status: int, chat: bool) -> None:
    with contextlib.suppress(FatalError, PassingError):
        read_answer(status, content, chat=chat, wait_seconds=0.0)


def test_retry_after() -> None:
    assert retry_after_seconds({}) == 0.0
    assert retry_after_seconds({"retry-after": "2.5"}) == 2.5
    assert retry_after_seconds({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert 28 < retry_after_seconds({"retry-after": email.utils.formatdate(time.time() + 30, usegmt=True)}) <= 30
    for nonsense in ("", "soon", "nan", "-3", "inf", "Wed, 99 Foo 2020"):
        assert retry_after_seconds({"retry-after": nonsense}) == 0.0
    assert retry_after_seconds({"retry-after": "1e9"}) == 3600.0
