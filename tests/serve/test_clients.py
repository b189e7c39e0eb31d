"""Clients that are many, slow, gone, or mad; and the end of the server."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmdistill.serve.settings import ServeSettings


@pytest.fixture
def start(start_server, served_model, scripted_engine, tokenizers) -> Callable:
    """A server around a scripted engine, and the engine."""
    tokenizer = tokenizers["byte_level"]

    def make(engine_options: dict | None = None, **limits):
        engine = scripted_engine(tokenizer.eos_token_id, **(engine_options or {}))
        return start_server(served_model(tokenizer, engine, causal=True), ServeSettings(**limits)), engine

    return make


class RawClient:
    """A connection on which a test writes what it likes."""

    def __init__(self, url: str, *, receive_bytes: int = 0) -> None:
        self.socket = socket.socket()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(5)
        self.socket.connect((urlsplit(url).hostname, urlsplit(url).port))

    def post(self, path: str, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send(f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_all(self) -> bytes:
        chunks = []
        try:
            while chunk := self.socket.recv(65536):
                chunks.append(chunk)
        except ConnectionResetError:
            pass
        return b"".join(chunks)


@pytest.fixture
def raw_client() -> Iterator[Callable[..., RawClient]]:
    clients: list[RawClient] = []

    def make(url: str, **options) -> RawClient:
        clients.append(RawClient(url, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.socket.close()


LONG = {"model": "student", "prompt": "a" * 400, "max_tokens": 400, "temperature": 0}


def test_two_hundred_at_once_all_get_their_own_answer(start) -> None:
    running, engine = start()

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as client:

            async def ask(i: int) -> str:
                options = {"model": "student", "prompt": f"request {i}", "temperature": 0, "max_tokens": 30}
                if i % 2:
                    return (await client.completions.create(**options)).choices[0].text
                return "".join([chunk.choices[0].text async for chunk in await client.completions.create(**options, stream=True)])

            return await asyncio.gather(*(ask(i) for i in range(200)))

    assert asyncio.run(ask_all()) == [f"request {i}" for i in range(200)]
    assert 2 < engine.most_rows <= 32


def test_overload_is_429_or_503_with_retry_after(start, raw_client, http) -> None:
    running, _ = start({"step_seconds": 0.05}, max_batch_rows=1, max_queue_rows=3, max_open_requests=6)
    scheduler = running.gate.scheduler

    def refusal(status: int, code: str) -> None:
        response = http.post(f"{running.url}/v1/completions", json=LONG)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert int(response.headers["retry-after"]) >= 1

    clients = [raw_client(running.url) for _ in range(6)]
    for number, client in enumerate(clients[:4], 1):
        client.post("/v1/completions", LONG)
        running.wait_until(lambda number=number: scheduler.num_active + scheduler.num_waiting == number)
    refusal(429, "queue_full")
    for client in clients[4:]:  # inside, but not yet asking for anything
        client.send(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
    running.wait_until(lambda: running.gate.num_working == 6)
    refusal(503, "overloaded")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(start, raw_client, stream: bool) -> None:
    running, engine = start({"step_seconds": 0.01}, max_batch_rows=1)
    decoding, waiting = raw_client(running.url), raw_client(running.url)
    decoding.post("/v1/completions", LONG | {"stream": stream})
    running.wait_until(lambda: running.gate.scheduler.num_active == 1)
    waiting.post("/v1/completions", LONG | {"stream": stream})
    running.wait_until(lambda: running.gate.scheduler.num_waiting == 1)
    waiting.socket.close()
    running.wait_until(lambda: running.gate.scheduler.num_waiting == 0)
    decoding.socket.close()
    running.wait_until_idle()
    assert engine.num_added == 1
    assert not engine.prompts
    page = running.gate.scheduler._metrics.registry
    assert page.get_sample_value("llmdistill_disconnects_total") == 2
    assert page.get_sample_value("llmdistill_requests_total", {"path": "/v1/completions", "status": "499"}) == 2


def test_openais_client_comes_again_when_it_is_told_to(start, raw_client, connect) -> None:
    running, _ = start({"step_seconds": 0.002}, max_batch_rows=1, max_queue_rows=1)
    for number in (1, 2):
        raw_client(running.url).post("/v1/completions", LONG | {"prompt": "a" * 200})
        running.wait_until(lambda number=number: running.gate.scheduler.num_active + running.gate.scheduler.num_waiting == number)
    client = connect(running.url)
    options = {"model": "student", "prompt": "patience", "temperature": 0}
    with pytest.raises(openai.RateLimitError):
        client.completions.create(**options)
    assert client.with_options(max_retries=5).completions.create(**options).choices[0].text == "patience"


def test_requests_that_take_too_long(start, http) -> None:
    running, _ = start({"step_seconds": 0.01}, max_batch_rows=1, request_timeout_seconds=0.3)

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient() as client:
            first = asyncio.create_task(client.post(f"{running.url}/v1/completions", json=LONG))
            await asyncio.sleep(0.1)
            streams = client.post(f"{running.url}/v1/completions", json=LONG | {"stream": True})
            return [*await asyncio.gather(first, streams)]

    plain, late = asyncio.run(ask_all())
    assert (plain.status_code, plain.json()["error"]["type"]) == (504, "timeout_error")
    # The second waited for the first to give up its place, then had its text cut off.
    assert late.status_code in (200, 503)
    running.wait_until_idle()
    stream = http.post(f"{running.url}/v1/completions", json=LONG | {"stream": True})
    assert stream.status_code == 200
    assert '"error":{"message":"the answer was not complete after 0.3 s"' in stream.text
    assert "[DONE]" not in stream.text
    running.wait_until_idle()


def test_slow_bodies_and_slow_headers_are_cut_off(start, raw_client) -> None:
    running, _ = start(body_timeout_seconds=0.2, header_timeout_seconds=0.2, keep_alive_seconds=0.2, max_header_bytes=2000)
    slow_body, slow_headers, silent, long_headers = (raw_client(running.url) for _ in range(4))
    slow_body.send(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
    slow_headers.send(b"POST /v1/completions HTTP/1.1\r\nhost")
    long_headers.send(b"GET /health HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(1000)))
    answer = slow_body.read_all()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive in 0.2 s" in answer
    assert slow_headers.read_all() == silent.read_all() == long_headers.read_all() == b""
    second = raw_client(running.url)
    second.send(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
    assert second.socket.recv(1000).startswith(b"HTTP/1.1 200 ")
    second.send(b"GET /heal")  # slow in its second request
    assert second.read_all().count(b"HTTP/1.1") == 0


def test_a_reader_that_does_not_read_is_cut_off_and_holds_no_row(start, raw_client) -> None:
    running, engine = start(write_timeout_seconds=0.3, max_prompt_tokens=4000)
    client = raw_client(running.url, receive_bytes=4096)
    client.post("/v1/completions", LONG | {"n": 60, "max_tokens": 500, "stream": True})
    running.wait_until(lambda: running.gate.num_working == 1)
    running.wait_until_idle()
    assert not engine.prompts
    running.wait_until(lambda: not running.server.server_state.connections)


def test_oversize_bodies(start, raw_client, http) -> None:
    running, _ = start(max_body_bytes=1000)
    path = f"{running.url}/v1/completions"
    headers = {"content-type": "application/json"}
    assert http.post(path, content=b"a" * 1001, headers=headers).status_code == 413
    assert http.post(path, content=(b"a" * 100 for _ in range(20)), headers=headers).status_code == 413  # chunked: no length is given
    assert http.post(path, content=b"a" * 15_000, headers=headers).json()["error"]["code"] == "request_too_large"
    boaster = raw_client(running.url)
    boaster.send(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n{")
    assert boaster.socket.recv(1000).startswith(b"HTTP/1.1 413 ")
    big = raw_client(running.url)
    big.send(
        b"POST /nothing HTTP/1.1\r\nhost: a\r\ncontent-length: 300000\r\n\r\n"
        + b"a" * 300_000
        + b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    )
    answers = big.read_all()
    assert answers.startswith(b"HTTP/1.1 404 ")
    assert b"HTTP/1.1 200 " in answers


def test_a_failing_engine_is_500_for_its_rows_and_fails_health(start, http) -> None:
    running, engine = start({"fail_steps": 1})
    assert http.post(f"{running.url}/v1/completions", json=LONG).status_code == 500
    assert (http.get(f"{running.url}/health").status_code, http.get(f"{running.url}/ready").status_code) == (503, 503)
    assert "RuntimeError" in http.get(f"{running.url}/health").json()["reason"]
    engine.fail_steps = 1
    answer = http.post(f"{running.url}/v1/completions", json=LONG | {"stream": True})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert http.post(f"{running.url}/v1/completions", json=LONG).status_code == 200
    assert http.get(f"{running.url}/health").status_code == 200


def test_a_drain_finishes_what_runs_and_lets_nobody_in(start, http) -> None:
    running, _ = start({"step_seconds": 0.005})
    with http.stream("POST", f"{running.url}/v1/completions", json=LONG | {"stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        running.server.drain()
        refused = http.post(f"{running.url}/v1/completions", json=LONG)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert http.get(f"{running.url}/ready").status_code == 503
        health = http.get(f"{running.url}/health")
        assert (health.status_code, health.json()["status"]) == (200, "draining")
        assert running.server.started
        assert [line for line in lines if line][-1] == "data: [DONE]"
    running.wait_until(lambda: not running.gate.scheduler.is_running)


def test_a_drain_has_an_end(start, http) -> None:
    running, _ = start({"step_seconds": 0.05}, drain_seconds=0.2)
    with http.stream("POST", f"{running.url}/v1/completions", json=LONG | {"stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        running.server.drain()
        assert "shut down before the answer was complete" in [line for line in lines if line][-1]
    running.wait_until(lambda: not running.gate.scheduler.is_running)


NO_HTTP = {
    "garbage": bytes(range(256)),
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a length that is none": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: many\r\n\r\n{}",
    "two lengths": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "a length and chunks": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "broken chunks": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}",
}


def test_what_is_no_http_is_refused_and_harms_nobody(start, raw_client, http) -> None:
    running, _ = start()
    for name, data in NO_HTTP.items():
        client = raw_client(running.url)
        client.send(data)
        assert client.read_all().startswith(b"HTTP/1.1 400 "), name
    assert http.get(f"{running.url}/health").json()["status"] == "ok"
    running.wait_until_idle()


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=4)
NAMES = [
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "llmdistill",
    "fields",
    "input",
    "rationale",
]


def test_no_body_gets_a_5xx(start, http) -> None:
    running, _ = start(max_new_tokens=20)
    valid = st.sampled_from([LONG | {"max_tokens": 3}, {"model": "student", "messages": [{"role": "user", "content": "a"}]}, {"input": "a"}])
    changes = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=2)
    bodies = st.binary(max_size=30) | st.builds(lambda body, change: json.dumps(body | change).encode(), valid, changes)
    paths = st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/predict"])

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(path=paths, body=bodies)
    def check(path: str, body: bytes) -> None:
        response = http.post(f"{running.url}{path}", content=body, headers={"content-type": "application/json"})
        assert response.status_code < 500, (body, response.text)

    check()
    running.wait_until_idle()
