"""What is posted to an OpenAI-compatible endpoint and how its answers are read: no sockets here, so that every case can be tested as data."""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from llmdistill.teach.teacher import Sampling

MAX_STOP_STRINGS = 4  # the most that the protocol takes; the text is cut at the others when it arrives
MAX_WAIT_SECONDS = 3_600.0
PASSING_STATUS = frozenset((408, 409, 425, 429))


class PassingError(Exception):
    """A failure that another try may cure, after at least `wait_seconds`."""

    def __init__(self, message: str, wait_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


class FatalError(Exception):
    """A failure that no further try will cure."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What the endpoint answered; tokens are None where it does not count them. was_cut: it ended by length or by the endpoint's filter."""

    text: str
    tokens_in: int | None
    tokens_out: int | None
    was_cut: bool


def request_body(model: str, prompt: str | list[dict[str, str]], sample_index: int, sampling: Sampling, *, reasoning: bool) -> dict[str, object]:
    """The JSON for one completion; a list of messages is a chat."""
    body: dict[str, object] = {"model": model, "prompt" if isinstance(prompt, str) else "messages": prompt}
    if reasoning:
        return {**body, "max_completion_tokens": sampling.max_tokens}
    body |= {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
    if sampling.top_p < 1.0:
        body["top_p"] = sampling.top_p
    if sampling.temperature > 0:
        body["seed"] = sampling.seed + sample_index
    if sampling.stop:
        body["stop"] = list(sampling.stop[:MAX_STOP_STRINGS])
    return body


def read_answer(status: int, content: bytes, *, chat: bool, wait_seconds: float) -> Answered:
    """The completion in an answer, else PassingError or FatalError with the endpoint's own words."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        data = None
    if status != 200:
        code, message = _error(data, content)
        if code == "insufficient_quota":
            raise FatalError(f"HTTP {status}: {message}")
        if status in PASSING_STATUS or status >= 500:
            raise PassingError(f"HTTP {status}: {message}", wait_seconds)
        raise FatalError(f"HTTP {status}: {message}")
    try:
        choice = data["choices"][0]  # type: ignore[index]
        text = choice["message"]["content"] if chat else choice["text"]
        finish_reason = choice.get("finish_reason")
    except (TypeError, KeyError, IndexError, AttributeError):
        raise PassingError(f"the answer holds no completion: {_excerpt(content)}") from None
    if text is None and chat:
        text = ""  # a refusal or a thought without an answer: an answer, and an empty one
    if not isinstance(text, str):
        raise PassingError(f"the answer holds no completion: {_excerpt(content)}")
    text = text.encode(errors="replace").decode()  # half of a surrogate pair, where the text was cut inside a character
    usage = data.get("usage") if isinstance(data, dict) else None
    was_cut = finish_reason in ("length", "content_filter")
    return Answered(text=text, tokens_in=_count(usage, "prompt_tokens"), tokens_out=_count(usage, "completion_tokens"), was_cut=was_cut)


def retry_after_seconds(headers: Mapping[str, str]) -> float:
    """How long the endpoint asks to wait, from `retry-after-ms` or `Retry-After` (seconds or a date); 0 where it does not say."""
    try:
        if "retry-after-ms" in headers:
            return _bounded(float(headers["retry-after-ms"]) / 1000)
        text = headers.get("retry-after", "")
        try:
            return _bounded(float(text))
        except ValueError:
            return _bounded(email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _bounded(seconds: float) -> float:
    return min(max(0.0, seconds), MAX_WAIT_SECONDS) if math.isfinite(seconds) else 0.0


def _count(usage: object, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _error(data: object, content: bytes) -> tuple[str, str]:
    """The endpoint's error code and message."""
    error = data.get("error") if isinstance(data, dict) else None
    if isinstance(error, dict):
        return str(error.get("code") or ""), str(error.get("message") or error)[:500]
    return "", str(error)[:500] if error else _excerpt(content)


def _excerpt(content: bytes) -> str:
    return repr(content[:200].decode("utf-8", errors="replace"))
