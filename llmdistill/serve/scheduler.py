"""Continuous batching: one thread owns the engine; rows join it and leave it between two steps.

    event loop --submit/cancel--> [waiting rows] --add--> engine --step--> tokens --post--> event loop

The event loop never touches the engine and the thread never touches a socket. What a step brought is posted to the loop in one call. A row leaves as soon as it
is done, hits a stop string, or its client goes away, and the next waiting row takes its place; the other rows do not notice (the engine promises that).

A row is told at which operating point it decodes when it gets its place, not when it is queued: what waits moves along the front with the controller.

Failures stay as small as they can be: a row that the engine refuses, or whose text cannot be made, fails alone. When `step` itself raises, nobody can tell
which row was to blame nor what state the engine is in: the rows in it get an error, a fresh engine is made, and `failure` says so until a step succeeds again.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Protocol

from llmdistill.decode.decoding import Token
from llmdistill.serve.controller import Controller, Decided
from llmdistill.serve.engines import PlacedDecoding
from llmdistill.serve.errors import ServeError
from llmdistill.serve.metrics import Metrics
from llmdistill.serve.settings import ServeSettings
from llmdistill.serve.text import TextStream

logger = logging.getLogger(__name__)


class BatchEngine(Protocol):
    """What the scheduler needs of llmdistill.serve.engines.Engines."""

    def add(self, prompt: Sequence[int], decoding: PlacedDecoding) -> int: ...
    def step(self) -> Sequence[Token]: ...
    def drop(self, row: int) -> None: ...


class ShownToken(NamedTuple):
    """A token as the text that it completed, empty where that is not yet a whole character, and how many layers it went through."""

    text: str
    num_layers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """News of one row: more text, or its end, where `finish_reason` is "stop" or "length" and what follows is of the whole row."""

    index: int
    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    num_layers: int = 0  # that its tokens went through, added up
    tokens: tuple[ShownToken, ...] = ()  # where they are wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A row that ended in an error."""

    index: int
    error: ServeError


Event = Piece | Failure
Deliver = Callable[[Event], None]


class Assignment:
    """Where the rows of one request decode, all of them at the same point; decided when the first one gets its place."""

    def __init__(self, decide: Callable[[], Decided]) -> None:
        self._decide = decide

    @cached_property
    def decided(self) -> Decided:
        """Read by the scheduler's thread first."""
        return self._decide()


@dataclass(eq=False, kw_only=True)
class Row:
    """One sequence to be decoded; made by the event loop, then owned by the scheduler."""

    index: int  # which choice of its request it is
    prompt: Sequence[int]
    decoding: PlacedDecoding  # but for its sub-network and exit threshold, which are those of the assignment
    assignment: Assignment
    make_text: Callable[[], TextStream]
    live: bool  # text is wanted as it comes: for a stream, because a stop string may end the row, or to show each token
    stream: bool
    shows_tokens: bool = False
    deliver: Deliver
    arrived: float  # when its request came to the door
    submitted: float = field(default_factory=time.monotonic)
    started: bool = False
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    num_layers: int = 0
    pieces: list[str] = field(default_factory=list)
    shown: list[ShownToken] = field(default_factory=list)

    @cached_property
    def text(self) -> TextStream:
        """The row's text; made by the scheduler's thread, which alone may decode."""
        return self.make_text()


class Scheduler:
    """Decodes the rows of all requests together, in the order in which they came."""

    def __init__(self, make_engine: Callable[[], BatchEngine], controller: Controller, settings: ServeSettings, metrics: Metrics) -> None:
        self._make_engine = make_engine
        self._controller = controller
        self._engine = make_engine()
        self._settings = settings
        self._metrics = metrics
        self._wake = threading.Condition()  # guards what follows, up to the blank line
        self._waiting: deque[Row] = deque()
        self._stopping = False
        self._cancelled_any = False
        self._finish_times: deque[float] = deque(maxlen=64)

        self._active: dict[int, Row] = {}  # by the engine's row id; only the thread touches it
        self._outbox: list[tuple[Deliver, Event]] = []
        self._failure = ""
        self._step_started = 0.0
        self._thread = threading.Thread(target=self._main, name="scheduler", daemon=True)

    def start(self, post: Callable[[Sequence[tuple[Deliver, Event]]], None]) -> None:
        """`post` hands the events of one step to the thread that serves the clients, which calls each `deliver(event)`."""
        self._post = post
        self._thread.start()

    def stop(self, timeout_seconds: float) -> None:
        """Ends the thread and waits for it. If it is stuck in a step (`is_running`), its rows are told in its place."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            self._post([(row.deliver, Failure(index=row.index, error=_shut_down())) for row in [*self._waiting, *self._active.values()]])

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def submit(self, rows: Sequence[Row]) -> None:
        """Queues the rows of one request, all or none; 429 when the queue has no room."""
        with self._wake:
            if self._stopping or not self._thread.is_alive():
                raise ServeError(503, "the server is not decoding", retry_after_seconds=5)
            num_free = self._settings.max_queue_rows - len(self._waiting)
            if len(rows) > num_free:
                message = f"{len(self._waiting)} rows are waiting; try again later"
                raise ServeError(429, message, code="queue_full", retry_after_seconds=self.retry_after_seconds())
            self._waiting.extend(rows)
            self._metrics.queue_rows.set(len(self._waiting))
            self._wake.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Frees the rows of a client that went away; rows that are done already are left alone."""
        with self._wake:
            for row in rows:
                row.cancelled = True
            num_before = len(self._waiting)
            self._waiting = deque(row for row in self._waiting if not row.cancelled)
            self._metrics.queue_rows.set(len(self._waiting))
            self._metrics.rows.labels("cancelled").inc(num_before - len(self._waiting))
            self._cancelled_any = True
            self._wake.notify()

    def failure(self) -> str:
        """Why the server is not healthy; empty when it is."""
        if not self._thread.is_alive():
            return "the scheduler is not running"
        started = self._step_started
        if started and time.monotonic() - started > self._settings.stall_seconds:
            return f"one step of the engine has taken more than {self._settings.stall_seconds:g} s"
        return self._failure

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        return len(self._active)

    def wait_seconds(self) -> float:
        """When the queue will be empty, judged by the last rows that finished."""
        if len(self._finish_times) < 2:
            return 0.0
        seconds_per_row = (time.monotonic() - self._finish_times[0]) / (len(self._finish_times) - 1)
        return seconds_per_row * len(self._waiting)

    def retry_after_seconds(self) -> int:
        """What a client is told to wait for."""
        return min(60, max(1, math.ceil(self.wait_seconds())))

    # ---- the thread ----

    def _main(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_cancelled()
                self._admit()
                if self._active:
                    self._step()
                self._flush()
        except BaseException:
            self._failure = "the scheduler stopped on an error of its own"
            logger.exception(self._failure)
        finally:
            with self._wake:
                self._stopping = True
                rows = [*self._active.values(), *self._waiting]
                self._waiting.clear()
            self._active.clear()
            for row in rows:
                self._fail(row, _shut_down())
            self._flush()

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._stopping or self._waiting or self._active):
                self._wake.wait()
            return not self._stopping

    def _drop_cancelled(self) -> None:
        if not self._cancelled_any:
            return
        self._cancelled_any = False
        for row_id in [row_id for row_id, row in self._active.items() if row.cancelled]:
            self._metrics.rows.labels("cancelled").inc()
            self._leave(row_id, drop=True)

    def _admit(self) -> None:
        while len(self._active) < self._settings.max_batch_rows:
            with self._wake:
                row = self._waiting.popleft() if self._waiting else None
                self._metrics.queue_rows.set(len(self._waiting))
            if row is None:
                break
            point = row.assignment.decided.point
            try:
                row_id = self._engine.add(row.prompt, replace(row.decoding, subnet=point.subnet, exit_threshold=point.exit_threshold))
            except ValueError as error:
                self._fail(row, ServeError(400, str(error)))
            except Exception:
                logger.exception("the engine could not take a row of %d prompt tokens", len(row.prompt))
                self._fail(row, ServeError(500, "the engine could not take this prompt"))
            else:
                row.started = True
                self._active[row_id] = row
                self._metrics.rows_at_point.labels(point.subnet, f"{point.exit_risk:g}").inc()
                self._metrics.prompt_tokens.inc(len(row.prompt))
                self._metrics.queue_seconds.observe(time.monotonic() - row.submitted)
        self._metrics.active_rows.set(len(self._active))

    def _step(self) -> None:
        self._step_started = time.monotonic()
        try:
            tokens = self._engine.step()
        except Exception as error:
            self._recover(error)
            return
        finally:
            seconds = time.monotonic() - self._step_started
            self._step_started = 0.0
        self._failure = ""
        self._metrics.step_seconds.observe(seconds)
        self._metrics.step_rows.observe(len(tokens))
        self._metrics.generated_tokens.inc(len(tokens))
        for token in tokens:
            row = self._active.get(token.row)
            if row is None:
                continue
            try:
                self._take(row, token)
            except Exception:
                logger.exception("the text of a row could not be made")
                self._leave(token.row, drop=not token.finished)
                self._fail(row, ServeError(500, "the answer could not be turned into text"))
        self._metrics.active_rows.set(len(self._active))

    def _take(self, row: Row, token: Token) -> None:
        """One new token of one row: text for the client if any is due, and the end if this was it."""
        if not row.tokens:
            self._metrics.first_token_seconds.observe(time.monotonic() - row.submitted)
        row.tokens.append(token.token)
        row.num_layers += token.num_layers
        is_text = not (token.finished and token.finish_reason == "stop")  # the token that says stop has no text
        if row.live:
            text = row.text.push([token.token]) if is_text else ""
            self._show(row, text)
            if row.shows_tokens:
                row.shown.append(ShownToken(text, token.num_layers))
        if not (token.finished or row.text.stopped):
            return
        self._leave(token.row, drop=not token.finished)
        if not row.live:
            self._show(row, row.text.push(row.tokens if is_text else row.tokens[:-1]))
        rest = row.text.close()
        self._show(row, rest)
        if row.shown:
            row.shown[-1] = ShownToken(row.shown[-1].text + rest, token.num_layers)
        self._end(row, "stop" if row.text.stopped or token.finish_reason == "stop" else "length")

    def _end(self, row: Row, finish_reason: str) -> None:
        """The last news of a row that went well, for its client, the controller and the metrics."""
        piece = Piece(
            index=row.index,
            text="".join(row.pieces),
            finish_reason=finish_reason,
            num_tokens=len(row.tokens),
            num_layers=row.num_layers,
            tokens=tuple(row.shown),
        )
        self._outbox.append((row.deliver, piece))
        now = time.monotonic()
        self._controller.observe(row.assignment.decided.epoch, 1000 * (now - row.arrived))
        self._metrics.controller_position.set(self._controller.position)
        self._metrics.layers_per_token.observe(row.num_layers / len(row.tokens))
        self._metrics.rows.labels(finish_reason).inc()
        with self._wake:
            self._finish_times.append(now)

    def _show(self, row: Row, text: str) -> None:
        """Sends text on if the client reads a stream, keeps it for the end if not."""
        if not text:
            return
        if row.stream:
            self._outbox.append((row.deliver, Piece(index=row.index, text=text)))
        else:
            row.pieces.append(text)

    def _leave(self, row_id: int, *, drop: bool) -> None:
        """The row is no longer ours; `drop` tells the engine, which knows of the rows that it finished itself."""
        if self._active.pop(row_id, None) is None or not drop:
            return
        try:
            self._engine.drop(row_id)
        except Exception as error:
            self._recover(error)

    def _recover(self, error: Exception) -> None:
        """The engine is broken: its rows fail, a fresh one takes its place."""
        logger.error("the engine failed", exc_info=error)
        self._failure = f"the engine failed: {type(error).__name__}"
        rows = list(self._active.values())
        self._active.clear()
        self._metrics.active_rows.set(0)
        for row in rows:
            self._fail(row, ServeError(500, "the engine failed while this answer was decoded"))
        self._engine = self._make_engine()

    def _fail(self, row: Row, error: ServeError) -> None:
        self._outbox.append((row.deliver, Failure(index=row.index, error=error)))
        self._metrics.rows.labels("failed").inc()

    def _flush(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._post(outbox)


def _shut_down() -> ServeError:
    return ServeError(503, "the server shut down before the answer was complete", code="shutting_down", retry_after_seconds=5)
