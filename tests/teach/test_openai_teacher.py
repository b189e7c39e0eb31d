"""The teacher behind an endpoint, against a small server that behaves badly on purpose."""

import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llmdistill.teach.openai_teacher import OpenAITeacher
from llmdistill.teach.teacher import Completion, Request, Sampling, Teacher, TeacherError

KEY = "sk-very-secret"
SAMPLING = Sampling(max_tokens=8, stop=("\n",))
REQUESTS = [Request(prompt=f"prompt {number}") for number in range(12)]

Behaviour = Callable[[int, dict, BaseHTTPRequestHandler], None]


class Server:
    """Answers through `behave(number of the try, body, handler)`; keeps what it was sent."""

    def __init__(self, behave: Behaviour) -> None:
        self.bodies: list[dict] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.most_at_once = self.at_once = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.paths.append(self.path)
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                try:
                    behave(number, body, self)
                except OSError:
                    self.close_connection = True
                finally:
                    with lock:
                        outer.at_once -= 1

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def send(handler: BaseHTTPRequestHandler, data: object, status: int = 200, **headers: str) -> None:
    content = data if isinstance(data, bytes) else json.dumps(data).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def prompt_of(body: dict) -> str:
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


def echo(number: int, body: dict, handler: BaseHTTPRequestHandler, text: str = "echo {}\nmore") -> None:
    text = text.format(prompt_of(body))
    choice = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
    send(handler, {"choices": [{**choice, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour], Server]]:
    servers: list[Server] = []

    def start(behave: Behaviour) -> Server:
        servers.append(Server(behave))
        monkeypatch.setenv("OPENAI_BASE_URL", servers[-1].url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def teacher(**settings: object) -> OpenAITeacher:
    return OpenAITeacher(**{"model": "m", "backoff_seconds": 0.01, "timeout_seconds": 10.0, **settings})  # type: ignore[arg-type]


def ask(teacher: OpenAITeacher, requests: list[Request] = REQUESTS) -> dict[int, Completion]:
    completions: dict[int, Completion] = {}
    thread = threading.current_thread()

    def done(index: int, completion: Completion) -> None:
        assert threading.current_thread() is thread
        assert index not in completions
        completions[index] = completion

    teacher.complete(requests, SAMPLING, done)
    return completions


@pytest.mark.parametrize("chat", [True, False])
def test_every_request_is_answered_once_and_at_once(serve: Callable[[Behaviour], Server], chat: bool) -> None:
    def slow_echo(number: int, body: dict, handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.05)
        echo(number, body, handler)

    server = serve(slow_echo)
    start = time.perf_counter()
    completions = ask(teacher(chat=chat, concurrency=6))
    seconds = time.perf_counter() - start
    assert {index: completion.text for index, completion in completions.items()} == {index: f"echo prompt {index}" for index in range(12)}
    assert all((completion.tokens_in, completion.tokens_out, completion.finish_reason) == (3, 2, "stop") for completion in completions.values())
    assert sum(completion.seconds for completion in completions.values()) <= seconds, "shares of the time add up to it"
    assert 2 <= server.most_at_once <= 6
    assert set(server.paths) == {"/v1/chat/completions" if chat else "/v1/completions"}
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert server.bodies[0]["model"] == "m"


def test_what_is_rendered_is_what_is_sent(serve: Callable[[Behaviour], Server]) -> None:
    server = serve(echo)
    one = teacher(system="Be brief.")
    ask(one, REQUESTS[:1])
    assert json.loads(one.render("prompt 0")) == server.bodies[0]["messages"]
    assert teacher(chat=False).render("prompt 0") == "prompt 0"


def test_bad_answers_are_tried_again(serve: Callable[[Behaviour], Server]) -> None:
    tries: Counter[str] = Counter()

    def bad(number: int, body: dict, handler: BaseHTTPRequestHandler) -> None:
        tries[prompt_of(body)] += 1
        match tries[prompt_of(body)] - 1:
            case 0:
                send(handler, {"error": {"message": "slow down"}}, 429)
            case 1:
                send(handler, b"<html>oops", 500)
            case 2:
                send(handler, b'{"choices": [')
            case 3:
                handler.connection.shutdown(socket.SHUT_RDWR)
            case 4:
                send(handler, {"choices": []})
            case _:
                echo(number, body, handler)

    serve(bad)
    completions = ask(teacher(max_retries=5, concurrency=12))
    assert {completion.text for completion in completions.values()} == {f"echo prompt {index}" for index in range(12)}


def test_retry_after_is_honoured(serve: Callable[[Behaviour], Server]) -> None:
    times: list[float] = []

    def busy_once(number: int, body: dict, handler: BaseHTTPRequestHandler) -> None:
        times.append(time.monotonic())
        if number == 0:
            send(handler, {"error": {"message": "busy"}}, 429, Retry_After="0.4")
        else:
            echo(number, body, handler)

    serve(busy_once)
    ask(teacher(), REQUESTS[:1])
    assert times[1] - times[0] >= 0.4


@pytest.mark.parametrize("drips", [True, False])
def test_a_request_takes_no_longer_than_the_timeout(serve: Callable[[Behaviour], Server], drips: bool) -> None:
    release = threading.Event()

    def slow_once(number: int, body: dict, handler: BaseHTTPRequestHandler) -> None:
        if number:
            return echo(number, body, handler)
        if drips:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
        while not release.wait(0.05):
            if drips:
                handler.wfile.write(b" ")
        handler.close_connection = True
        return None

    serve(slow_once)
    completions = ask(teacher(timeout_seconds=0.3), REQUESTS[:1])
    release.set()
    assert completions[0].text == "echo prompt 0"


def test_a_wrong_key_ends_the_asking_at_once_without_being_shown(serve: Callable[[Behaviour], Server], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="llmdistill")
    caplog.set_level(logging.INFO)
    server = serve(lambda number, body, handler: send(handler, {"error": {"message": f"Incorrect API key provided: {KEY} at {server.url}"}}, 401))
    with pytest.raises(TeacherError, match="HTTP 401: Incorrect API key") as failure:
        ask(teacher(concurrency=1))
    assert len(server.bodies) == 1
    for text in (str(failure.value), repr(teacher()), json.dumps(teacher().fingerprint()), caplog.text):
        assert KEY not in text
        assert server.url not in text


def test_retries_end_and_what_was_answered_is_handed_over(serve: Callable[[Behaviour], Server], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def fails_for_one(number: int, body: dict, handler: BaseHTTPRequestHandler) -> None:
        if prompt_of(body) == "prompt 5":
            send(handler, {"error": {"message": f"overloaded {KEY}"}}, 503)
        else:
            echo(number, body, handler)

    server = serve(fails_for_one)
    completions: dict[int, Completion] = {}
    with pytest.raises(TeacherError, match="in 3 tries; the last: HTTP 503") as failure:
        teacher(max_retries=2, concurrency=1).complete(REQUESTS, SAMPLING, completions.__setitem__)
    assert set(completions) == {0, 1, 2, 3, 4}
    assert len(server.bodies) == 8
    assert KEY not in str(failure.value) + caplog.text
    assert "prompt 5" in str(failure.value)


def test_an_exception_of_done_ends_the_asking_and_passes_through(serve: Callable[[Behaviour], Server]) -> None:
    def slow_echo(number: int, body: dict, handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.03)
        echo(number, body, handler)

    server = serve(slow_echo)
    seen: list[int] = []

    def done(index: int, completion: Completion) -> None:
        seen.append(index)
        if len(seen) >= 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        teacher(concurrency=3).complete(REQUESTS, SAMPLING, done)
    assert len(seen) == len(server.bodies) <= 6, "those under way are handed over, no new ones are sent"


def test_missing_token_counts_are_estimated_with_a_warning(serve: Callable[[Behaviour], Server], caplog: pytest.LogCaptureFixture) -> None:
    serve(lambda number, body, handler: send(handler, {"choices": [{"message": {"content": "12345678"}, "finish_reason": "length"}]}))
    completions = ask(teacher())
    assert (completions[0].tokens_in, completions[0].tokens_out, completions[0].finish_reason) == (2, 2, "length")
    assert caplog.text.count("does not say how many tokens") == 1


def test_requests_per_minute_are_kept(serve: Callable[[Behaviour], Server]) -> None:
    server = serve(echo)
    seen: list[int] = []

    def done(index: int, completion: Completion) -> None:
        seen.append(index)
        if len(seen) == 5:
            time.sleep(0.3)
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        teacher(requests_per_minute=5.0).complete(REQUESTS, SAMPLING, done)
    assert len(server.bodies) == 5


def test_without_a_server_or_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(TeacherError, match="OPENAI_API_KEY is not set"):
        ask(teacher())
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(TeacherError, match="ConnectError"):
        ask(teacher(max_retries=1))
    monkeypatch.setenv("OPENAI_BASE_URL", "127.0.0.1:9")
    with pytest.raises(TeacherError, match="OPENAI_BASE_URL is not a URL"):
        ask(teacher())


def test_identity() -> None:
    one: Teacher = teacher()
    assert one.fingerprint() == teacher(concurrency=99, timeout_seconds=1.0, dollars_per_million_tokens_in=5.0).fingerprint()
    others = [teacher(model="n"), teacher(revision="2"), teacher(chat=False), teacher(system=""), teacher(reasoning=True)]
    assert all(other.fingerprint() != one.fingerprint() for other in others)


@pytest.mark.parametrize("settings", [{"model": ""}, {"concurrency": 0}, {"max_retries": -1}, {"timeout_seconds": 0.0}, {"chat": False, "reasoning": True}])
def test_settings_are_checked(settings: dict) -> None:
    with pytest.raises(ValueError, match="OpenAITeacher"):
        teacher(**settings)
