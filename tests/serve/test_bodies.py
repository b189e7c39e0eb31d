"""A body is taken, or refused in OpenAI's words; nothing else can happen."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.serve.bodies import ChatBody, CompletionBody, PredictBody, parse_body, parse_json
from llmdistill.serve.errors import ServeError

COMPLETION = {"model": "m", "prompt": "hello"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"text"',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"\xff\xfe",
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ServeError) as raised:
        parse_json(data)
    assert (raised.value.status, raised.value.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    "fields, param, code",
    [
        ({"model": None}, "model", "invalid_type"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
        ({"prompt": [True]}, "prompt", "invalid_value"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
        ({"max_tokens": "16"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": True}, "max_tokens", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": float("inf")}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, None, "invalid_value"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "unsupported_parameter"),
        ({"logprobs": 0}, "logprobs", "unsupported_parameter"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"user": 7}, "user", "invalid_type"),
    ],
)
def test_a_wrong_field_is_named(fields: dict, param: str | None, code: str) -> None:
    with pytest.raises(ServeError) as raised:
        parse_body(CompletionBody, COMPLETION | fields)
    assert (raised.value.status, raised.value.param, raised.value.code) == (400, param, code)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ServeError, match="Missing required parameter: 'prompt'") as raised:
        parse_body(CompletionBody, {"model": "m"})
    assert raised.value.code == "missing_required_parameter"


@pytest.mark.parametrize(
    "messages, param",
    [
        ([], "messages"),
        (["hello"], "messages[0]"),
        ([{"role": "robot", "content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "a", "tool_calls": []}], "messages[1].tool_calls"),
    ],
)
def test_a_wrong_message_is_named(messages: list, param: str) -> None:
    with pytest.raises(ServeError) as raised:
        parse_body(ChatBody, CHAT | {"messages": messages})
    assert raised.value.param == param


def test_fields_that_ask_for_nothing_are_taken() -> None:
    nothing = {"user": "me", "metadata": {"a": "b"}, "store": False, "logit_bias": {}, "presence_penalty": 0.0, "tools": [], "logprobs": None, "best_of": 1}
    assert parse_body(CompletionBody, COMPLETION | nothing) == parse_body(CompletionBody, COMPLETION)
    assert parse_body(CompletionBody, {"model": "m", "prompt": [1, 2]}).prompt == [[1, 2]]
    assert parse_body(CompletionBody, COMPLETION | {"stop": "x", "temperature": 1}).stop == ("x",)
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert parse_body(ChatBody, CHAT | {"messages": [{"role": "user", "content": parts}]}).messages[0].content == "hello"


@pytest.mark.parametrize(
    "fields", [{}, {"fields": {"message": "a"}, "input": "a"}, {"input": 1}, {"fields": {"message": 1}}, {"input": "a", "rationale": "yes"}]
)
def test_predict_takes_fields_or_input(fields: dict) -> None:
    with pytest.raises(ServeError):
        parse_body(PredictBody, fields)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(body_type=st.sampled_from([CompletionBody, ChatBody, PredictBody]), data=st.data())
def test_no_body_is_more_than_refused(body_type: type, data: st.DataObject) -> None:
    names = [*body_type.model_fields, "tools", "user", "nonsense"]
    body = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=5))
    base = {CompletionBody: COMPLETION, ChatBody: CHAT, PredictBody: {}}[body_type]
    refusal = None
    try:
        parse_body(body_type, parse_json(json.dumps(base | body).encode()))
    except ServeError as error:
        refusal = error
    assert refusal is None or refusal.status == 400
    assert refusal is None or json.loads(bytes(refusal.response().body))["error"]["message"]
