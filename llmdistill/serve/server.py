"""uvicorn with the two things that it leaves open: clients that are slow on purpose, and a shutdown that ends well.

Slow clients: uvicorn limits the time between two requests but not the time that a request's headers take to arrive, nor the time that an answer takes to be
read. The protocol below limits both, the size of the headers, and the time in which the unread body of a refused request is read and thrown away (to close
the connection on it would make the client lose the answer).

SIGTERM (and the first Ctrl-C): new work is answered 503 and /ready says no, while what is inside goes on; /health and /metrics still answer. When all are done
or `drain_seconds` are over the server closes and the process ends with status 0 (uvicorn would raise the signal again). A second signal closes at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import HANDLED_SIGNALS

from llmdistill.serve.gate import Gate
from llmdistill.serve.settings import ServeSettings

logger = logging.getLogger(__name__)
CLOSE_SECONDS = 3  # for the last bytes of answers, after the drain


def limited_protocol(settings: ServeSettings) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with our limits on headers and on readers that do not read."""

    class LimitedProtocol(HttpToolsProtocol):
        slow_timer: asyncio.TimerHandle | None = None
        write_timer: asyncio.TimerHandle | None = None
        in_headers = in_body = False
        num_header_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start_slow_timer()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.in_headers = True

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self.in_headers, self.in_body, self.num_header_bytes = False, True, 0

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self.in_body = False

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            is_leftover = self.in_body and self.cycle is not None and self.cycle.response_complete  # of a request that was refused unread
            if self.in_headers or is_leftover:
                self._start_slow_timer()
            else:
                self._stop_slow_timer()  # the app has its own limits
            if self.in_headers:
                self.num_header_bytes += len(data)
                if self.num_header_bytes > settings.max_header_bytes:
                    self.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_slow_timer()
            self._stop_write_timer()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stop_write_timer()
            self.write_timer = self.loop.call_later(settings.write_timeout_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_write_timer()

        def timeout_keep_alive_handler(self) -> None:
            if self.transport.get_write_buffer_size():
                self.transport.abort()  # close would wait for ever for the reader
            else:
                super().timeout_keep_alive_handler()

        def _start_slow_timer(self) -> None:
            if self.slow_timer is None:
                self.slow_timer = self.loop.call_later(settings.header_timeout_seconds, self.transport.abort)

        def _stop_slow_timer(self) -> None:
            if self.slow_timer is not None:
                self.slow_timer.cancel()
                self.slow_timer = None

        def _stop_write_timer(self) -> None:
            if self.write_timer is not None:
                self.write_timer.cancel()
                self.write_timer = None

    return LimitedProtocol


class Server(uvicorn.Server):
    """A uvicorn server that drains."""

    def __init__(self, gate: Gate, host: str, port: int, settings: ServeSettings, on_started: Callable[[str], None]) -> None:
        """`on_started` is told the address, once the server listens."""
        config = uvicorn.Config(
            gate,
            host=host,
            port=port,
            http=limited_protocol(settings),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            backlog=settings.max_open_requests,
            timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]  # a number of seconds for call_later
            timeout_graceful_shutdown=CLOSE_SECONDS,
            server_header=False,
        )
        super().__init__(config)
        self._gate = gate
        self._settings = settings
        self._on_started = on_started
        self._drain_deadline = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_started(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def drain(self) -> None:
        """Lets nobody in and ends the server when all are out."""
        self._gate.draining = True
        self._drain_deadline = time.monotonic() + self._settings.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if self._gate.draining and not self.should_exit:
            if not self._gate.num_working:
                self.should_exit = True
            elif time.monotonic() > self._drain_deadline:
                logger.warning("%d requests were not done %g s after the signal; closing", self._gate.num_working, self._settings.drain_seconds)
                await asyncio.to_thread(self._gate.scheduler.stop, CLOSE_SECONDS / 2)  # what is still there is answered 503
                self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.draining:
            self.should_exit = True
            self.force_exit = True
        else:
            self.drain()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn's, but the signal is not raised again: a drained server ended as it should."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self.handle_exit) for number in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
