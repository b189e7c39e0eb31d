"""What a request may say, checked to the letter before anything is done with it.

The fields are OpenAI's. A field that we do not know is an error, as it is there, and so is one that would change the answer in a way that we cannot
(tools, logit_bias, ...), unless it asks for nothing; a field that changes no answer (user, metadata, ...) is checked and left alone. Our own are `top_k`,
`llmdistill` (a budget, and whether to tell of each token), and all of /v1/predict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llmdistill.serve.errors import ServeError

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MAX_CHOICES = 128
MAX_STOP_STRINGS = 4
WITHOUT_EFFECT: Mapping[str, type] = {
    "metadata": dict,
    "parallel_tool_calls": bool,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "safety_identifier": str,
    "service_tier": str,
    "store": bool,
    "user": str,
}
NEUTRAL_ONLY: Mapping[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "top_logprobs": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
BodyType = TypeVar("BodyType", bound=BaseModel)


class Body(BaseModel):
    """No field may be left unread, and no value is converted: "1" is not a number."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Budget(Body):
    """What an answer may cost: the best operating point within all that is said. Saying nothing leaves it to the server."""

    max_latency_ms: float | None = Field(default=None, gt=0)
    subnet: str | None = None
    exit_risk: float | None = Field(default=None, ge=0, le=1)
    tokens: bool = False  # no budget: the answer is to tell its tokens and the layers that each went through

    @property
    def is_open(self) -> bool:
        """Whether the server chooses."""
        return self.max_latency_ms is None and self.subnet is None and self.exit_risk is None


NO_BUDGET = Budget()


class GenerationBody(Body):
    """The fields that completions and chat share."""

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=INT64_MIN, le=INT64_MAX)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    llmdistill: Budget | None = None

    @field_validator("stop", mode="after")
    @classmethod
    def _stop(cls, value: Any) -> tuple[str, ...]:
        strings = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(strings, list) or not all(isinstance(string, str) and string for string in strings):
            raise ValueError("expected a string that is not empty, or a list of such strings")
        if len(strings) > MAX_STOP_STRINGS:
            raise ValueError(f"expected at most {MAX_STOP_STRINGS} stop strings, but got {len(strings)}")
        return tuple(strings)

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self


class CompletionBody(GenerationBody):
    prompt: Any

    @field_validator("prompt", mode="after")
    @classmethod
    def _prompt(cls, value: Any) -> list[str | list[int]]:
        """One prompt or several, as text or as tokens; always a list of prompts afterwards."""
        prompts = [value] if isinstance(value, str) or _is_tokens(value) else value
        if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) or _is_tokens(prompt) for prompt in prompts):
            raise ValueError("expected a string, a list of strings, a list of token numbers, or a list of such lists")
        return prompts


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Any
    name: str | None = None

    @field_validator("content", mode="after")
    @classmethod
    def _content(cls, value: Any) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value or not all(_is_text_part(part) for part in value):
            raise ValueError('expected a string or a list of text parts, {"type": "text", "text": ...}')
        return "".join(part["text"] for part in value)


class ChatBody(GenerationBody):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one")
        return self


class PredictBody(Body):
    """Our own: a row of the task, by its fields or as the student's input text."""

    fields: dict[str, str] | None = None
    input: str | None = None
    rationale: bool = False
    llmdistill: Budget | None = None

    @model_validator(mode="after")
    def _one_input(self) -> PredictBody:
        if (self.fields is None) == (self.input is None):
            raise ValueError("give either fields or input")
        return self


def parse_json(data: bytes) -> dict[str, Any]:
    """The JSON object of a body; 400 for all else, text that has no UTF-8 form and numbers that JSON does not have included."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_reject_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ServeError(400, f"We could not parse the JSON body of your request: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ServeError(400, "The body of the request must be a JSON object", code="invalid_json")
    return value


def parse_body(body_type: type[BodyType], value: Mapping[str, Any]) -> BodyType:
    """The checked body; the first thing wrong with it becomes OpenAI's error object, with the field's name in `param`."""
    fields = dict(value)
    if issubclass(body_type, GenerationBody):
        for name in fields.keys() & WITHOUT_EFFECT.keys():
            given = fields.pop(name)
            if given is not None and not isinstance(given, WITHOUT_EFFECT[name]):
                raise ServeError(400, f"Invalid type for '{name}': expected {WITHOUT_EFFECT[name].__name__}", param=name, code="invalid_type")
        for name in fields.keys() & NEUTRAL_ONLY.keys():
            given = fields.pop(name)
            if not any(given == neutral and isinstance(given, bool) == isinstance(neutral, bool) for neutral in NEUTRAL_ONLY[name]):
                raise ServeError(400, f"This server does not support '{name}'; leave it out", param=name, code="unsupported_parameter")
    try:
        return body_type.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _to_serve_error(first["type"], first["loc"], first["msg"]) from None


def _to_serve_error(kind: str, location: tuple[int | str, ...], message: str) -> ServeError:
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".") or None
    if kind == "missing":
        return ServeError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return ServeError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    what = "type" if kind.endswith("_type") else "value"
    of = f" for '{param}'" if param else ""
    return ServeError(400, f"Invalid {what}{of}: {message.removeprefix('Value error, ')}", param=param, code=f"invalid_{what}")


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _is_text_part(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"type", "text"} and value["type"] == "text" and isinstance(value["text"], str)


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
