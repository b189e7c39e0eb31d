"""The server: OpenAI's endpoints, and /v1/predict for the task that the student was distilled for.

    serve(Path("runs/quickstart/latest/multitask"), host="127.0.0.1", port=8000)

    GET  /                      a page to try it on
    POST /v1/completions        POST /v1/chat/completions        POST /v1/predict
    GET  /v1/models             GET  /health   alive? (503 when the engine fails)
    GET  /metrics               GET  /ready    send me work? (503 also while the server drains)

One process, two threads that matter: the event loop, which serves the clients (desk.py), and the scheduler's, which owns the engine (scheduler.py).
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from llmdistill.serve.controller import Controller
from llmdistill.serve.desk import Desk
from llmdistill.serve.errors import ServeError
from llmdistill.serve.gate import Gate
from llmdistill.serve.metrics import Metrics
from llmdistill.serve.scheduler import Scheduler
from llmdistill.serve.served_model import Precision, ServedModel, load_served_model
from llmdistill.serve.server import Server
from llmdistill.serve.settings import ServeSettings

logger = logging.getLogger(__name__)
DEFAULT_SETTINGS = ServeSettings()


def serve(
    checkpoint: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    device: str = "cpu",
    precision: Precision = Precision.FLOAT32,
    front: str = "",
    settings: ServeSettings = DEFAULT_SETTINGS,
) -> None:
    """Serve a checkpoint until SIGTERM or Ctrl-C: OpenAI's endpoints, and /v1/predict for its task.

    Args:
        checkpoint: Its folder, as runs/PIPELINE/latest/STAGE.
        host: The address to listen on; 0.0.0.0 is open to the network.
        port: 0 takes any free one; the address is printed.
        device: Of torch, as cpu or cuda.
        precision: The type that the weights are computed in.
        front: Of an elastic checkpoint: the folder of a search, whose sub-networks are offered with their accuracies; without, largest, chosen and smallest.
        settings: The limits.
    """
    run_server(load_served_model(checkpoint, settings=settings, device=device, precision=precision, front=front), host, port, settings)


def create_app(
    checkpoint: Path, settings: ServeSettings = DEFAULT_SETTINGS, *, device: str = "cpu", precision: Precision = Precision.FLOAT32, front: str = ""
) -> Gate:
    """The ASGI app of a checkpoint, for an ASGI server of the user's own (which then has to limit slow headers and slow readers itself)."""
    return build_app(load_served_model(checkpoint, settings=settings, device=device, precision=precision, front=front), settings)


def run_server(model: ServedModel, host: str, port: int, settings: ServeSettings) -> None:
    """Serves a model that is loaded; for how it ends see server.py."""
    gate = build_app(model, settings)
    Server(gate, host, port, settings, on_started=lambda address: print(f"serving {model.name} on {address}", flush=True)).run()
    if gate.scheduler.is_running:
        logger.warning("the engine is stuck in a step; leaving it there")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # an interpreter that winds up while a thread is inside the engine may crash


def build_app(model: ServedModel, settings: ServeSettings) -> Gate:
    """The ASGI app of a model that is loaded."""
    metrics = Metrics()
    controller = Controller(model.points.front, settings.target_p95_ms)
    metrics.controller_steps.set(len(model.points.front))
    scheduler = Scheduler(model.make_engine, controller, settings, metrics)
    desk = Desk(model, scheduler, controller, settings, metrics)
    app = FastAPI(openapi_url=None, lifespan=desk.lifespan)
    gate = Gate(app, scheduler=scheduler, settings=settings, metrics=metrics)
    app.add_api_route("/", desk.playground, methods=["GET"])
    app.add_api_route("/v1/completions", desk.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", desk.chat, methods=["POST"])
    app.add_api_route("/v1/predict", desk.predict, methods=["POST"])
    app.add_api_route("/v1/models", desk.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", desk.model, methods=["GET"])
    app.add_api_route("/metrics", desk.metrics, methods=["GET"])
    app.add_api_route("/health", gate.health, methods=["GET"])
    app.add_api_route("/ready", gate.ready, methods=["GET"])
    app.add_exception_handler(ServeError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_bug)
    return gate


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return error.response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    response = ServeError(error.status_code, f"{error.detail}: {request.method} {request.url.path}").response()
    response.headers.update(error.headers or {})
    return response


async def _answer_bug(request: Request, error: Exception) -> Response:
    return ServeError(500, "The server had an error while processing your request").response()
