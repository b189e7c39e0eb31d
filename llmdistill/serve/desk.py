"""What each endpoint does."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from llmdistill.losses.prompts import EXPLAIN, PREDICT
from llmdistill.serve.answers import ChatAnswer, TextAnswer
from llmdistill.serve.bodies import NO_BUDGET, ChatBody, CompletionBody, GenerationBody, PredictBody, parse_body, parse_json
from llmdistill.serve.connection import EventStream, read_body, unless_disconnected
from llmdistill.serve.controller import Controller
from llmdistill.serve.errors import ServeError, json_response
from llmdistill.serve.gate import ARRIVED
from llmdistill.serve.generation import Generation, Generator, Wish, fresh_seed
from llmdistill.serve.metrics import Metrics
from llmdistill.serve.playground import playground
from llmdistill.serve.scheduler import Deliver, Event, Piece, Scheduler
from llmdistill.serve.served_model import ServedModel
from llmdistill.serve.settings import ServeSettings

AnyGeneration = TypeVar("AnyGeneration", bound=GenerationBody)
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens in /v1/completions
STOP_SECONDS = 2.0


class Desk:
    """The endpoints of one model."""

    def __init__(self, model: ServedModel, scheduler: Scheduler, controller: Controller, settings: ServeSettings, metrics: Metrics) -> None:
        self._model = model
        self._scheduler = scheduler
        self._settings = settings
        self._metrics = metrics
        self._playground = playground()
        self._generator = Generator(model, scheduler, controller, settings)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncGenerator[None]:
        """Runs the scheduler for as long as the app runs."""
        loop = asyncio.get_running_loop()

        def post(events: Sequence[tuple[Deliver, Event]]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, events)

        self._scheduler.start(post)
        try:
            yield
        finally:
            self._generator.close()
            await asyncio.to_thread(self._scheduler.stop, STOP_SECONDS)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        body = await self._read(request, CompletionBody)
        wish = self._wish(body, body.max_tokens or 0, COMPLETION_TOKENS)
        self._generator.check_num_rows(len(body.prompt) * wish.num_choices)
        prompts = [await self._generator.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompt]
        answer = TextAnswer(model=self._model.name, num_choices=len(prompts) * wish.num_choices, include_usage=_include_usage(body))
        generation = self._generator.start(prompts, [wish] * len(prompts), body.llmdistill or NO_BUDGET, arrived=request.scope[ARRIVED])
        return await self._answer(request, generation, answer, wish)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        body = await self._read(request, ChatBody)
        wish = self._wish(body, body.max_completion_tokens or body.max_tokens or 0, self._settings.max_new_tokens)
        self._generator.check_num_rows(wish.num_choices)
        prompt = await self._generator.encode_chat([{"role": message.role, "content": message.content} for message in body.messages])
        answer = ChatAnswer(model=self._model.name, num_choices=wish.num_choices, include_usage=_include_usage(body))
        generation = self._generator.start([prompt], [wish], body.llmdistill or NO_BUDGET, arrived=request.scope[ARRIVED])
        return await self._answer(request, generation, answer, wish)

    async def predict(self, request: Request) -> Response:
        """POST /v1/predict: {"fields": {...}} or {"input": "..."}, and "rationale": true for the reasons."""
        body = parse_body(PredictBody, parse_json(await read_body(request, self._settings)))
        task = self._model.task
        text = task.text(body.fields) if body.fields is not None else body.input or ""
        limits = {PREDICT: self._settings.max_label_tokens} | ({EXPLAIN: self._settings.max_rationale_tokens} if body.rationale else {})
        prompts = [await self._generator.encode(task.prompt(kind, text)) for kind in limits]
        starts = task.prompts.decoder_start_token_ids
        wishes = [Wish(max_new_tokens=limit, may_be_fewer=True, start_token=starts.get(kind), kind=kind) for kind, limit in limits.items()]
        generation = self._generator.start(prompts, wishes, body.llmdistill or NO_BUDGET, arrived=request.scope[ARRIVED])
        pieces = await self._whole(request, generation)
        for kind, piece in zip(limits, pieces, strict=True):
            self._generator.forecast.saw(kind, piece.num_tokens)
        data: dict[str, Any] = {
            "id": f"pred-{uuid.uuid4().hex}",
            "object": "prediction",
            "created": int(time.time()),
            "model": self._model.name,
            "task": task.task or None,
            "label": task.label(pieces[0].text),
            "output": pieces[0].text,
        }
        if body.rationale:
            data["rationale"] = pieces[1].text.strip()
        return json_response(data | {"usage": generation.usage(pieces).data(), "llmdistill": generation.made_by(pieces)})

    async def playground(self) -> Response:
        """GET /"""
        return self._playground

    async def models(self) -> Response:
        """GET /v1/models"""
        return json_response({"object": "list", "data": [self._model_data()]})

    async def model(self, name: str) -> Response:
        """GET /v1/models/NAME"""
        self._check_model(name)
        return json_response(self._model_data())

    async def metrics(self) -> Response:
        """GET /metrics"""
        return Response(self._metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def _read(self, request: Request, body_type: type[AnyGeneration]) -> AnyGeneration:
        body = parse_body(body_type, parse_json(await read_body(request, self._settings)))
        self._check_model(body.model)
        return body

    async def _answer(self, request: Request, generation: Generation, answer: TextAnswer | ChatAnswer, wish: Wish) -> Response:
        if wish.stream:
            return EventStream(generation, answer)
        pieces = await self._whole(request, generation)
        return json_response(answer.whole(pieces, generation.usage(pieces), generation.made_by(pieces)))

    async def _whole(self, request: Request, generation: Generation) -> list[Piece]:
        try:
            return await unless_disconnected(request.receive, generation.whole())
        finally:
            generation.cancel()

    def _wish(self, body: GenerationBody, asked_tokens: int, usual_tokens: int) -> Wish:
        return Wish(
            max_new_tokens=asked_tokens or usual_tokens,
            may_be_fewer=not asked_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            seed=fresh_seed() if body.seed is None else body.seed,
            num_choices=body.n or 1,
            stop=body.stop or (),
            stream=bool(body.stream),
        )

    def _check_model(self, name: str) -> None:
        if name != self._model.name:
            raise ServeError(404, f"The model '{name}' does not exist; this server has '{self._model.name}'", param="model", code="model_not_found")

    def _model_data(self) -> dict[str, Any]:
        task = self._model.task
        about = {
            "task": task.task or None,
            "fields": task.field_names,
            "choices": list(task.choices),
            "explains": EXPLAIN in task.prompts.prefixes,
            "points": [point.data() for point in self._model.points.all],
        }
        return {"id": self._model.name, "object": "model", "created": self._model.created, "owned_by": "llmdistill", "llmdistill": about}


def _include_usage(body: GenerationBody) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _deliver(events: Sequence[tuple[Deliver, Event]]) -> None:
    for deliver, event in events:
        deliver(event)
