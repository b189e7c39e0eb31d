"""OpenAI's answer objects: whole, and as the chunks of a stream.

`TextAnswer` is /v1/completions, `ChatAnswer` /v1/chat/completions; both turn the same pieces of text into their endpoint's JSON. What the answer was made by
stands under `llmdistill`, a field that OpenAI's clients pass over; in a stream it is a field of the last chunk, whichever that is, since a chunk more without
choices would surprise them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from llmdistill.serve.generation import Usage
from llmdistill.serve.scheduler import Piece

Json = dict[str, Any]


class Answer(Protocol):
    """What a stream needs of an endpoint."""

    def opening(self) -> list[Json]:
        """The chunks that come before any text."""
        ...

    def chunks(self, piece: Piece) -> list[Json]:
        """The chunks of one piece of news."""
        ...

    def closing(self, usage: Usage) -> list[Json]:
        """The chunks after every choice has ended."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Answer:
    model: str
    num_choices: int = 1
    include_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return {"id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = self._object(self.chunk_object, choices)
        if self.include_usage:
            chunk["usage"] = None
        return chunk

    def closing(self, usage: Usage) -> list[Json]:
        return [self._object(self.chunk_object, []) | {"usage": usage.data()}] if self.include_usage else []


class TextAnswer(_Answer):
    """/v1/completions"""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def whole(self, pieces: Sequence[Piece], usage: Usage, made_by: Json) -> Json:
        choices = [_text_choice(piece.index, piece.text, piece.finish_reason) for piece in pieces]
        return self._object(self.whole_object, choices) | {"usage": usage.data(), "llmdistill": made_by}

    def opening(self) -> list[Json]:
        return []

    def chunks(self, piece: Piece) -> list[Json]:
        return [self._chunk([_text_choice(piece.index, piece.text, piece.finish_reason)])]


class ChatAnswer(_Answer):
    """/v1/chat/completions"""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, pieces: Sequence[Piece], usage: Usage, made_by: Json) -> Json:
        choices = [
            {"index": piece.index, "message": {"role": "assistant", "content": piece.text}, "logprobs": None, "finish_reason": piece.finish_reason}
            for piece in pieces
        ]
        return self._object(self.whole_object, choices) | {"usage": usage.data(), "llmdistill": made_by}

    def opening(self) -> list[Json]:
        return [self._chunk([_delta(index, {"role": "assistant", "content": ""}, "")]) for index in range(self.num_choices)]

    def chunks(self, piece: Piece) -> list[Json]:
        text = [self._chunk([_delta(piece.index, {"content": piece.text}, "")])] if piece.text else []
        end = [self._chunk([_delta(piece.index, {}, piece.finish_reason)])] if piece.finish_reason else []
        return text + end


def _text_choice(index: int, text: str, finish_reason: str) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason or None}


def _delta(index: int, delta: Json, finish_reason: str) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason or None}
