"""The endpoints, asked by OpenAI's own client over a real connection."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from openai import OpenAI

from llmdistill.serve.predict import TaskSection
from llmdistill.serve.settings import ServeSettings

PROMPT = "the parcel is late 小さい箱が届いた 🙂"
SETTINGS = ServeSettings(max_prompt_tokens=400, max_new_tokens=300, max_body_bytes=20_000, max_queue_rows=64)


@pytest.fixture(scope="module")
def task() -> TaskSection:
    section = {"task": "tickets", "input_template": "{subject}: {message}", "choices": ["cancel_order", "billing_problem"]}
    return TaskSection.from_config({"llmdistill": section}, is_encoder_decoder=False)


@pytest.fixture(scope="module")
def url(server_context, served_model, scripted_engine, tokenizers, task) -> Iterator[str]:
    tokenizer = tokenizers["byte_level"]
    with server_context(served_model(tokenizer, lambda: scripted_engine(tokenizer.eos_token_id), causal=True, task=task), SETTINGS) as running:
        yield running.url


@pytest.fixture
def client(url, connect) -> OpenAI:
    return connect(url)


def test_completions(client) -> None:
    answer = client.completions.create(model="student", prompt=PROMPT, max_tokens=200, temperature=0)
    assert (answer.object, answer.model) == ("text_completion", "student")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (PROMPT, "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == answer.usage.prompt_tokens + 1
    assert client.completions.create(model="student", prompt="a" * 60, temperature=0).choices[0].finish_reason == "length"


def test_several_prompts_and_choices_come_in_order(client) -> None:
    answer = client.completions.create(model="student", prompt=["one", "two"], n=2, temperature=0)
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(["one", "one", "two", "two"]))
    assert client.completions.create(model="student", prompt=[5, 6, 7], temperature=0).usage.completion_tokens == 4


def test_a_seed_repeats_and_choices_differ(client) -> None:
    def ask(seed: int) -> list[str]:
        answer = client.completions.create(model="student", prompt=PROMPT, n=3, temperature=1.5, seed=seed)
        return [choice.text for choice in answer.choices]

    assert ask(-7) == ask(-7)
    assert ask(-7) != ask(8)
    assert len(set(ask(8))) == 3


@pytest.mark.parametrize("stop", [None, "いた", ["late", "no"]])
def test_a_stream_joins_to_the_plain_answer(client, stop) -> None:
    options = {"model": "student", "prompt": PROMPT, "max_tokens": 200, "temperature": 0} | ({} if stop is None else {"stop": stop})
    plain = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == plain.choices[0].text
    assert not any("\ufffd" in chunk.choices[0].text for chunk in chunks[:-1])
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage
    assert len(chunks) > 5


def test_a_stream_of_several_choices(client) -> None:
    texts: dict[int, str] = {}
    for chunk in client.completions.create(model="student", prompt=["one", "three"], n=2, temperature=0, stream=True):
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert texts == {0: "one", 1: "one", 2: "three", 3: "three"}


def test_chat(client) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    expected = "system: be brief\nuser: hello\nassistant: "
    answer = client.chat.completions.create(model="student", messages=messages, temperature=0)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(model="student", messages=messages, temperature=0, stream=True, max_completion_tokens=100))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_chat_without_a_template_is_a_clear_refusal(start_server, served_model, scripted_engine, tokenizers, connect) -> None:
    tokenizer = tokenizers["metaspace"]
    server = start_server(served_model(tokenizer, scripted_engine(tokenizer.eos_token_id)))
    with pytest.raises(openai.BadRequestError, match="has no chat template; use /v1/completions") as raised:
        connect(server.url).chat.completions.create(model="student", messages=[{"role": "user", "content": "hello"}])
    assert raised.value.code == "no_chat_template"


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == ["student"]
    assert client.models.retrieve("student").owned_by == "llmdistill"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("a/b")
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")


def test_a_wrong_field_is_openais_error(client) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="student", prompt="a", temperature=3)
    assert (raised.value.param, raised.value.code, raised.value.type) == ("temperature", "invalid_value", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="Unknown parameter: 'colour'"):
        client.completions.create(model="student", prompt="a", extra_body={"colour": "red"})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt": "x y " * 300}, "longest prompt of this server is 400 tokens"),
        ({"prompt": "a", "max_tokens": 301}, "max_tokens is too large"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": [10**9]}, "outside the vocabulary"),
        ({"prompt": [-1]}, "outside the vocabulary"),
        ({"prompt": ["a"] * 65}, "65 answers at once"),
    ],
)
def test_limits_of_a_prompt(client, options, message) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(model="student", **options)


def test_a_causal_model_has_only_so_many_positions(start_server, served_model, scripted_engine, tokenizers, connect) -> None:
    tokenizer = tokenizers["byte_level"]
    server = start_server(served_model(tokenizer, scripted_engine(tokenizer.eos_token_id), causal=True, num_positions=50))
    client = connect(server.url)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 50 tokens") as raised:
        client.completions.create(model="student", prompt="hello", max_tokens=50)
    assert raised.value.code == "context_length_exceeded"
    answer = client.chat.completions.create(model="student", messages=[{"role": "user", "content": "hello"}], temperature=0)
    assert answer.usage.total_tokens <= 50


def test_predict(url, http) -> None:
    def ask(**body) -> httpx.Response:
        return http.post(f"{url}/v1/predict", json=body)

    fields = {"subject": "billing problem", "message": "paid twice"}
    answer = ask(fields=fields).json()
    assert (answer["label"], answer["task"], answer["output"]) == ("billing_problem", "tickets", "predict: billing problem: paid twice\n")
    assert "rationale" not in answer
    answer = ask(fields=fields, rationale=True).json()
    assert answer["rationale"] == "explain: billing problem: paid twice"
    assert answer["usage"]["completion_tokens"] > 20
    assert ask(input="nothing of the kind").json()["label"] is None
    for body, param in [({"fields": {"subject": "a"}}, "fields.message"), ({"fields": fields | {"x": "y"}}, "fields.x"), ({"fields": "a"}, "fields")]:
        response = ask(**body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_predict_without_a_task_takes_input_only(start_server, served_model, scripted_engine, tokenizers, http) -> None:
    tokenizer = tokenizers["metaspace"]
    url = start_server(served_model(tokenizer, scripted_engine(tokenizer.eos_token_id))).url
    assert http.post(f"{url}/v1/predict", json={"input": "the order"}).json()["label"] == "predict the order"
    assert http.post(f"{url}/v1/predict", json={"fields": {"message": "a"}}).status_code == 400


def test_a_student_that_cannot_explain_says_so(start_server, served_model, scripted_engine, tokenizers, http) -> None:
    tokenizer = tokenizers["byte_level"]
    section = {"task": "t", "prefixes": {"predict": ""}, "input_template": "{message}"}
    task = TaskSection.from_config({"llmdistill": section}, is_encoder_decoder=True)
    url = start_server(served_model(tokenizer, scripted_engine(tokenizer.eos_token_id), task=task)).url
    assert http.post(f"{url}/v1/predict", json={"input": "a", "rationale": True}).json()["error"]["param"] == "rationale"
    assert http.post(f"{url}/v1/predict", json={"fields": {"message": "yes"}}).json()["label"] == "yes"


@pytest.mark.parametrize(
    "section",
    [
        7,
        {"input_template": "{}"},
        {"input_template": "{a.b}"},
        {"input_template": "{a"},
        {"choices": [1, 2]},
        {"choices": ["one"]},
        {"prefixes": {"predict": 1}},
        {"task": 1},
    ],
)
def test_a_broken_section_is_refused_before_serving(section) -> None:
    with pytest.raises(ValueError, match=r"config\.json|Choice"):
        TaskSection.from_config({"llmdistill": section}, is_encoder_decoder=True)


def test_every_refusal_has_the_same_shape(url, http) -> None:
    responses = {
        404: http.get(f"{url}/nothing"),
        405: http.get(f"{url}/v1/completions"),
        415: http.post(f"{url}/v1/completions", content=b"{}", headers={"content-type": "text/plain"}),
        413: http.post(f"{url}/v1/completions", json={"model": "student", "prompt": "a" * 30_000}),
        400: http.post(f"{url}/v1/completions", content=b"{", headers={"content-type": "application/json"}),
    }
    for status, response in responses.items():
        assert response.status_code == status
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_metrics_and_health(start_server, served_model, scripted_engine, tokenizers, connect, http) -> None:
    tokenizer = tokenizers["byte_level"]
    url = start_server(served_model(tokenizer, scripted_engine(tokenizer.eos_token_id))).url
    client = connect(url)
    assert http.get(f"{url}/health").json() == {"status": "ok", "reason": None, "active_rows": 0, "waiting_rows": 0}
    assert http.get(f"{url}/ready").status_code == 200
    client.completions.create(model="student", prompt="hello", temperature=0)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="student", prompt="hello", n=0)
    http.get(f"{url}/some/path/of/an/attacker")
    page = http.get(f"{url}/metrics").text
    for line in [
        'llmdistill_requests_total{path="/v1/completions",status="200"} 1.0',
        'llmdistill_requests_total{path="/v1/completions",status="400"} 1.0',
        'llmdistill_requests_total{path="other",status="404"} 1.0',
        "llmdistill_time_to_first_token_seconds_count 1.0",
        'llmdistill_request_seconds_count{path="/v1/completions"} 2.0',
        'llmdistill_rows_total{reason="stop"} 1.0',
        "llmdistill_active_rows 0.0",
        "llmdistill_queue_rows 0.0",
    ]:
        assert line in page.splitlines(), line
