"""The door of the app: counts who is inside, turns away when it is full or closing, and measures each answer.

It is plain ASGI around the whole app: starlette's own middleware base class hides a client's departure from what runs inside it.
"""

from __future__ import annotations

import logging
import time

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmdistill.serve.errors import ServeError, json_response
from llmdistill.serve.metrics import Metrics
from llmdistill.serve.scheduler import Scheduler
from llmdistill.serve.settings import ServeSettings

logger = logging.getLogger(__name__)
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/predict", "/v1/models", "/health", "/ready", "/metrics", "/")
WORK_PATHS = PATHS[:3]
CLIENT_GONE = "499"  # as nginx counts it
ARRIVED = "llmdistill.arrived"
"""In a request's scope: when it came."""


class Gate:
    """Who is inside, and whether anybody is let in."""

    def __init__(self, app: ASGIApp, *, scheduler: Scheduler, settings: ServeSettings, metrics: Metrics) -> None:
        self._app = app
        self.scheduler = scheduler
        self._settings = settings
        self._metrics = metrics
        self.num_working = 0  # requests for the engine that are inside
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        label = path if path in PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"  # else any client could grow the page
        status = CLIENT_GONE  # until an answer has begun
        is_complete = False

        async def send_measured(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        works = path in WORK_PATHS
        scope[ARRIVED] = started = time.monotonic()
        self.num_working += works
        self._metrics.open_requests.set(self.num_working)
        try:
            refusal = self._refusal() if works else None
            if refusal is not None:
                await refusal.response()(scope, receive, send_measured)
            else:
                await self._app(scope, receive, send_measured)
        except ClientDisconnect:
            status = CLIENT_GONE
            self._metrics.disconnects.inc()
        except Exception:
            logger.exception("%s failed", label)  # the app has answered 500
            if not is_complete:
                raise  # a part of the answer is out: the connection must break off
        finally:
            self.num_working -= works
            self._metrics.open_requests.set(self.num_working)
            self._metrics.requests.labels(label, status).inc()
            self._metrics.request_seconds.labels(label).observe(time.monotonic() - started)

    async def health(self) -> Response:
        """GET /health: 503 when the engine fails; a server that drains is healthy."""
        return self._state(failing=bool(self.scheduler.failure()))

    async def ready(self) -> Response:
        """GET /ready: whether to send work here."""
        return self._state(failing=self.draining or bool(self.scheduler.failure()))

    def _state(self, *, failing: bool) -> Response:
        reason = self.scheduler.failure()
        status = "failing" if reason else "draining" if self.draining else "ok"
        data = {"status": status, "reason": reason or None, "active_rows": self.scheduler.num_active, "waiting_rows": self.scheduler.num_waiting}
        return json_response(data, status=503 if failing else 200)

    def _refusal(self) -> ServeError | None:
        if self.draining:
            return ServeError(503, "the server is shutting down", code="shutting_down", retry_after_seconds=5)
        if self.num_working > self._settings.max_open_requests:
            return ServeError(503, f"{self._settings.max_open_requests} requests are open; try again later", code="overloaded", retry_after_seconds=1)
        return None
