"""One request's rows between the event loop and the scheduler."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from llmdistill.serve.bodies import Budget
from llmdistill.serve.controller import Controller, Decided
from llmdistill.serve.engines import PlacedDecoding
from llmdistill.serve.errors import ServeError
from llmdistill.serve.forecast import Forecast
from llmdistill.serve.scheduler import Assignment, Event, Failure, Piece, Row, Scheduler
from llmdistill.serve.served_model import ServedModel
from llmdistill.serve.settings import ServeSettings
from llmdistill.serve.text import TextStream

NUM_CONTEXT_TOKENS = 6  # of a causal prompt, so that the answer's first space is decoded as a continuation


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How the rows of one request are to be decoded."""

    max_new_tokens: int
    may_be_fewer: bool = False  # where the model has no room for so many
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    start_token: int | None = None  # of the decoder; None: the model's own
    kind: str = ""  # of the task's answers, whose usual length is known after some

    def decoding(self, choice: int) -> PlacedDecoding:
        """What the engines are asked for one of the choices; where, the request's assignment says."""
        return PlacedDecoding(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=choice_seed(self.seed, choice),
            decoder_start_token_id=self.start_token,
        )


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens in and out of one request; a prompt counts once, however many choices were made from it."""

    prompt_tokens: int
    completion_tokens: int

    def data(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Generation:
    """The rows of a request that were submitted, and their events as they come."""

    def __init__(self, scheduler: Scheduler, timeout_seconds: float, num_prompt_tokens: int, assignment: Assignment, *, shows_tokens: bool) -> None:
        self.rows: list[Row] = []
        self.num_prompt_tokens = num_prompt_tokens
        self.assignment = assignment
        self.shows_tokens = shows_tokens
        self._scheduler = scheduler
        self._timeout_seconds = timeout_seconds
        self._deadline = asyncio.get_running_loop().time() + timeout_seconds
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._num_finished = 0

    def submit(self, rows: list[Row]) -> None:
        self.rows = rows
        self._scheduler.submit(rows)

    def deliver(self, event: Event) -> None:
        self._events.put_nowait(event)

    async def next_pieces(self) -> list[Piece]:
        """All the news there is, at least one piece; raises the error of a row that failed, or that of the request's time limit."""
        try:
            async with asyncio.timeout_at(self._deadline):
                events = [await self._events.get()]
        except TimeoutError:
            if any(row.started for row in self.rows):
                raise ServeError(504, f"the answer was not complete after {self._timeout_seconds:g} s") from None
            message = f"no place in the batch became free in {self._timeout_seconds:g} s"
            raise ServeError(503, message, code="queue_timeout", retry_after_seconds=self._scheduler.retry_after_seconds()) from None
        while not self._events.empty():
            events.append(self._events.get_nowait())
        pieces = []
        for event in events:
            if isinstance(event, Failure):
                raise event.error
            pieces.append(event)
            self._num_finished += bool(event.finish_reason)
        return pieces

    async def whole(self) -> list[Piece]:
        """Every row's text, in order, once all are done."""
        finished: dict[int, Piece] = {}
        while len(finished) < len(self.rows):
            finished.update({piece.index: piece for piece in await self.next_pieces()})
        return [finished[index] for index in range(len(self.rows))]

    def usage(self, finished: Sequence[Piece]) -> Usage:
        return Usage(prompt_tokens=self.num_prompt_tokens, completion_tokens=sum(piece.num_tokens for piece in finished))

    def made_by(self, finished: Sequence[Piece]) -> dict[str, Any]:
        """The operating point that the answer was made at, what it came to, and the tokens of each row where they are wanted."""
        point = self.assignment.decided.point
        data: dict[str, Any] = {
            "subnet": point.subnet,
            "exit_risk": point.exit_risk,
            "exit_threshold": point.exit_threshold,
            "layers_per_token": round(sum(piece.num_layers for piece in finished) / sum(piece.num_tokens for piece in finished), 4),
            "num_layers": point.num_layers,
        }
        if self.shows_tokens:
            rows = sorted(finished, key=lambda piece: piece.index)
            data["tokens"] = [[{"text": token.text, "num_layers": token.num_layers} for token in piece.tokens] for piece in rows]
        return data

    def cancel(self) -> None:
        """Frees the rows that are not done."""
        if self._num_finished < len(self.rows):
            self._scheduler.cancel(self.rows)


class Generator:
    """Turns prompts and wishes into rows that decode."""

    def __init__(self, model: ServedModel, scheduler: Scheduler, controller: Controller, settings: ServeSettings) -> None:
        self._model = model
        self._scheduler = scheduler
        self._controller = controller
        self._settings = settings
        self.forecast = Forecast(scheduler, settings.max_batch_rows)
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder")

    async def encode(self, text: str) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._encoder, self._model.encode, text)

    async def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._encoder, self._model.encode_chat, messages)

    def close(self) -> None:
        self._encoder.shutdown(wait=False, cancel_futures=True)

    def check_num_rows(self, num_rows: int) -> None:
        """400 for more rows than the queue could ever hold."""
        if num_rows > self._settings.max_queue_rows:
            raise ServeError(400, f"The request asks for {num_rows} answers at once; this server takes at most {self._settings.max_queue_rows}", param="n")

    def start(self, prompts: Sequence[list[int]], wishes: Sequence[Wish], budget: Budget, *, arrived: float) -> Generation:
        """Checks each prompt against its wish and all against the budget, and queues all rows, or raises and queues none."""
        settings = self._settings
        wishes = [self._within_limits(prompt, wish) for prompt, wish in zip(prompts, wishes, strict=True)]
        assignment = self._assignment(prompts, wishes, budget)
        num_prompt_tokens = sum(len(prompt) for prompt in prompts)
        generation = Generation(self._scheduler, settings.request_timeout_seconds, num_prompt_tokens, assignment, shows_tokens=budget.tokens)
        submitted = time.monotonic()
        rows: list[Row] = []
        for prompt, wish in zip(prompts, wishes, strict=True):
            context = prompt[-NUM_CONTEXT_TOKENS:] if self._model.answer_continues_prompt else ()
            for choice in range(wish.num_choices):
                row = Row(
                    index=len(rows),
                    prompt=prompt,
                    decoding=wish.decoding(choice),
                    assignment=assignment,
                    make_text=partial(TextStream, self._model.decode, stop=wish.stop, context=context),
                    live=wish.stream or bool(wish.stop) or budget.tokens,
                    stream=wish.stream,
                    shows_tokens=budget.tokens,
                    deliver=generation.deliver,
                    arrived=arrived,
                    submitted=submitted,
                )
                rows.append(row)
        generation.submit(rows)
        return generation

    def _assignment(self, prompts: Sequence[list[int]], wishes: Sequence[Wish], budget: Budget) -> Assignment:
        """Where the rows will decode: at the point that the budget asks for, or where the controller is when they get their place."""
        if budget.is_open:
            return Assignment(self._controller.decide)
        lengths = [
            (len(prompt), self.forecast.length(wish.kind, wish.max_new_tokens))
            for prompt, wish in zip(prompts, wishes, strict=True)
            for _ in range(wish.num_choices)
        ]
        point = self._model.points.choose(budget, lambda point: self.forecast.latency_ms(point, lengths))
        return Assignment(lambda: Decided(point))

    def _within_limits(self, prompt: list[int], wish: Wish) -> Wish:
        settings, model = self._settings, self._model
        max_new_tokens = wish.max_new_tokens
        if wish.may_be_fewer:
            room = model.num_positions - len(prompt) if model.num_positions else max_new_tokens
            max_new_tokens = max(1, min(max_new_tokens, settings.max_new_tokens, room))
        elif max_new_tokens > settings.max_new_tokens:
            message = f"max_tokens is too large: {max_new_tokens}. This server gives at most {settings.max_new_tokens} tokens"
            raise ServeError(400, message, param="max_tokens", code="invalid_value")
        model.check_prompt(prompt, max_prompt_tokens=settings.max_prompt_tokens, max_new_tokens=max_new_tokens)
        if wish.top_p == 0.0 or wish.temperature == 0.0:
            wish = replace(wish, temperature=0.0, top_p=1.0, top_k=0)  # only the likeliest token is left
        return replace(wish, max_new_tokens=max_new_tokens)


def choice_seed(seed: int, choice: int) -> int:
    """A seed for each of a request's choices: the request's own for the first, unrelated ones for the others."""
    if choice == 0:
        return seed % 2**63
    return int.from_bytes(hashlib.sha256(f"{seed}/{choice}".encode()).digest()[:8], "big") >> 1


def fresh_seed() -> int:
    """For a request that gives none."""
    return secrets.randbits(63)
