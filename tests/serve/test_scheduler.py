"""Rows join, leave and fail without touching each other."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest

from llmdistill.serve.controller import Controller, Decided
from llmdistill.serve.engines import PlacedDecoding
from llmdistill.serve.errors import ServeError
from llmdistill.serve.metrics import Metrics
from llmdistill.serve.pace import Pace
from llmdistill.serve.points import OperatingPoint
from llmdistill.serve.scheduler import Assignment, BatchEngine, Deliver, Event, Failure, Piece, Row, Scheduler
from llmdistill.serve.settings import ServeSettings
from llmdistill.serve.text import TextStream

EOS = 0
POINT = OperatingPoint(num_layers=4, weight_bytes=1, pace=Pace(beginning=0.0, per_prompt_token=0.0, per_step=0.001, per_neighbour=0.0))


def decode(tokens: Sequence[int]) -> str:
    return "".join(chr(token) for token in tokens)


class Client:
    """One row and what it was told."""

    def __init__(self, text: str, *, stop: tuple[str, ...] = (), stream: bool = False, decode: Callable[[Sequence[int]], str] = decode) -> None:
        self.events: list[Event] = []
        self.done = threading.Event()
        self.row = Row(
            index=0,
            prompt=[ord(character) for character in text],
            decoding=PlacedDecoding(max_new_tokens=100),
            assignment=Assignment(lambda: Decided(POINT)),
            make_text=partial(TextStream, decode, stop=stop),
            live=stream or bool(stop),
            stream=stream,
            deliver=self.deliver,
            arrived=0.0,
        )

    def deliver(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Failure) or event.finish_reason:
            self.done.set()

    def wait(self) -> Event:
        assert self.done.wait(5)
        return self.events[-1]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))


class Rig:
    """A scheduler at work on engines that the test made."""

    def __init__(self, engines: Sequence[BatchEngine], settings: ServeSettings) -> None:
        self.metrics = Metrics()
        made = iter(engines)
        self.scheduler = Scheduler(lambda: next(made), Controller([POINT], math.inf), settings, self.metrics)
        self.num_posts = 0
        self.scheduler.start(self.post)

    def post(self, events: Sequence[tuple[Deliver, Event]]) -> None:
        self.num_posts += 1
        for deliver, event in events:
            deliver(event)

    def ask(self, *clients: Client) -> list[Event]:
        self.scheduler.submit([client.row for client in clients])
        return [client.wait() for client in clients]

    def value(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(name, labels)
        assert value is not None, name
        return value


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(*engines: BatchEngine, **settings: int | float) -> Rig:
        rigs.append(Rig(engines, ServeSettings(**settings)))  # type: ignore[arg-type]
        return rigs[-1]

    yield make
    for made in rigs:
        made.scheduler.stop(5)
        assert not made.scheduler.is_running


def test_rows_join_a_batch_that_decodes_and_give_their_place_on(rig, scripted_engine) -> None:
    engine = scripted_engine(EOS, step_seconds=0.001)
    running = rig(engine, max_batch_rows=3)
    clients = [Client("abcdefgh"[: 2 + i % 5] * 2, stream=bool(i % 2)) for i in range(20)]
    for client in clients:
        running.scheduler.submit([client.row])
    for client in clients:
        ended = client.wait()
        num_tokens, text = len(client.row.prompt) + 1, "" if client.row.stream else client.text
        assert ended == Piece(index=0, text=text, finish_reason="stop", num_tokens=num_tokens, num_layers=4 * num_tokens)
        assert client.text == decode(client.row.prompt)
    assert engine.most_rows == 3
    assert running.value("llmdistill_rows_total", reason="stop") == 20
    assert running.value("llmdistill_prompt_tokens_total") == sum(len(client.row.prompt) for client in clients)


def test_a_plain_row_is_told_once_and_a_stream_as_it_comes(rig, scripted_engine) -> None:
    running = rig(scripted_engine(EOS))
    plain, stream = Client("hello"), Client("hello", stream=True)
    running.ask(plain, stream)
    assert len(plain.events) == 1
    assert [event.text for event in stream.events if isinstance(event, Piece)] == [*"hello", ""]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_row_in_the_engine_too(rig, scripted_engine, stream: bool) -> None:
    engine = scripted_engine(EOS)
    running = rig(engine)
    client = Client("one two three", stop=("two", "x"), stream=stream)
    assert running.ask(client)[0].finish_reason == "stop"
    assert client.text == "one "
    assert not engine.prompts
    length = Client("aaaa")
    length.row.decoding = PlacedDecoding(max_new_tokens=2)
    assert running.ask(length) == [Piece(index=0, text="aa", finish_reason="length", num_tokens=2, num_layers=8)]


def test_a_cancelled_row_leaves_the_batch_and_the_queue(rig, scripted_engine) -> None:
    engine = scripted_engine(EOS, step_seconds=0.005)
    running = rig(engine, max_batch_rows=1)
    gone, waiting, last = Client("a" * 90, stream=True), Client("b" * 90), Client("c")
    running.scheduler.submit([gone.row])
    running.scheduler.submit([waiting.row])
    running.scheduler.cancel([waiting.row])
    running.scheduler.cancel([gone.row])
    running.ask(last)
    assert last.text == "c"
    assert not gone.done.is_set()
    assert not waiting.events
    assert running.value("llmdistill_rows_total", reason="cancelled") == 2
    assert engine.num_added <= 2


def test_a_full_queue_says_when_to_come_back(rig, scripted_engine) -> None:
    running = rig(scripted_engine(EOS, step_seconds=0.02), max_batch_rows=1, max_queue_rows=2)
    first = Client("a" * 50)
    running.scheduler.submit([first.row])
    while not first.row.started:
        pass
    running.scheduler.submit([Client("b").row, Client("b").row])
    with pytest.raises(ServeError) as raised:
        running.scheduler.submit([Client("c").row])
    assert raised.value.status == 429
    assert raised.value.retry_after_seconds >= 1


def test_a_row_that_fails_fails_alone(rig, scripted_engine) -> None:
    engine = scripted_engine(EOS, step_seconds=0.002, poison=ord("x"))
    running = rig(engine)

    def broken(tokens: Sequence[int]) -> str:
        raise RuntimeError("no text")

    fine, poisoned, textless = Client("hello" * 5), Client("xyz"), Client("abc", stream=True, decode=broken)
    running.ask(fine, poisoned, textless)
    assert fine.text == "hello" * 5
    for client in (poisoned, textless):
        failure = client.events[-1]
        assert isinstance(failure, Failure)
        assert failure.error.status == 500
    assert not engine.prompts
    assert running.scheduler.failure() == ""


def test_an_engine_that_fails_is_replaced_and_health_says_so(rig, scripted_engine) -> None:
    running = rig(scripted_engine(EOS, fail_steps=1), scripted_engine(EOS, fail_steps=1), scripted_engine(EOS))
    for _ in range(2):
        failures = running.ask(Client("a"), Client("b"))
        assert [isinstance(failure, Failure) and failure.error.status for failure in failures] == [500, 500]
        assert "RuntimeError" in running.scheduler.failure()
    client = Client("c")
    running.ask(client)
    assert client.text == "c"
    assert running.scheduler.failure() == ""


def test_a_stuck_step_fails_health_and_stop_gives_up_on_it(rig, scripted_engine) -> None:
    running = rig(scripted_engine(EOS, step_seconds=0.4), stall_seconds=0.05)
    client = Client("a")
    running.scheduler.submit([client.row])
    while "has taken more than" not in running.scheduler.failure():
        pass
    running.scheduler.stop(0.01)
    assert running.scheduler.is_running
    failure = client.wait()
    assert isinstance(failure, Failure)
    assert failure.error.status == 503
    with pytest.raises(ServeError, match="not decoding"):
        running.scheduler.submit([Client("b").row])
