"""What the server does with a client's connection: reads the body within limits, notices that the client left, streams events.

A row costs the same whether anyone still reads its text or not, so every wait for the engine is also a wait for the client to go away.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmdistill.serve.answers import Answer
from llmdistill.serve.errors import ServeError
from llmdistill.serve.generation import Generation
from llmdistill.serve.scheduler import Piece
from llmdistill.serve.settings import ServeSettings

Result = TypeVar("Result")


async def read_body(request: Request, settings: ServeSettings) -> bytes:
    """The body; 413 beyond the limit, 408 when it comes too slowly, 415 when it does not say that it is JSON.

    The type must be said because a web page may post anything else to any address, this machine's own included, without asking.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ServeError(415, f"The body must have the header 'Content-Type: application/json', but it has '{content_type}'", code="unsupported_content_type")
    chunks: list[bytes] = []
    num_bytes = int(request.headers.get("content-length", "0"))  # what is announced is not waited for
    try:
        async with asyncio.timeout(settings.body_timeout_seconds):
            if num_bytes <= settings.max_body_bytes:
                num_bytes = 0
                async for chunk in request.stream():
                    num_bytes += len(chunk)
                    if num_bytes > settings.max_body_bytes:
                        break
                    chunks.append(chunk)
    except TimeoutError:
        raise ServeError(408, f"The body of the request did not arrive in {settings.body_timeout_seconds:g} s", code="request_timeout") from None
    if num_bytes > settings.max_body_bytes:
        raise ServeError(413, f"The body of the request is larger than {settings.max_body_bytes} bytes", code="request_too_large")
    return b"".join(chunks)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Does the work, or stops it and raises ClientDisconnect as soon as the client is gone."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer as server-sent events.

    The status is sent with the first token: what goes wrong before is an ordinary error with its own status; what goes wrong later is an error event.
    """

    def __init__(self, generation: Generation, answer: Answer) -> None:
        super().__init__()
        self._generation = generation
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._stream(scope, receive, send))
        finally:
            self._generation.cancel()

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            pieces = await self._generation.next_pieces()
        except ServeError as error:
            await error.response()(scope, receive, send)
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        chunks = self._answer.opening()
        finished: list[Piece] = []
        try:
            while True:
                for piece in pieces:
                    chunks += self._answer.chunks(piece)
                finished += [piece for piece in pieces if piece.finish_reason]
                if len(finished) == len(self._generation.rows):
                    break
                await send({"type": "http.response.body", "body": _events(chunks), "more_body": True})
                chunks = []
                pieces = await self._generation.next_pieces()
        except ServeError as error:
            await send({"type": "http.response.body", "body": _events([error.data()]), "more_body": False})
            return
        chunks += self._answer.closing(self._generation.usage(finished))
        chunks[-1]["llmdistill"] = self._generation.made_by(finished)
        await send({"type": "http.response.body", "body": _events(chunks) + b"data: [DONE]\n\n", "more_body": False})


def _events(chunks: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n" for chunk in chunks)
