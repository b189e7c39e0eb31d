"""A teacher behind any OpenAI-compatible endpoint: chat or plain completions, many requests at once.

The endpoint and its key come from the environment (`OPENAI_BASE_URL`, `OPENAI_API_KEY`): they are no part of a key or a fingerprint and are struck out of every
message. What can pass is tried again (no connection, a timeout, 408, 409, 425, 429, 5xx, an answer that is not what was agreed) after an exponentially growing,
jittered wait, or after as long as `Retry-After` says; what cannot pass (a wrong key, an unknown model, an empty purse) ends the asking at once with the
endpoint's own words. Failures are not completions: whoever asks again asks only for what is missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from llmdistill.core.stage import speed
from llmdistill.teach.openai_protocol import request_body
from llmdistill.teach.teacher import Completion, Request, Sampling


@dataclass(frozen=True, kw_only=True)
class OpenAITeacher:
    """A model of an OpenAI-compatible endpoint.

    model: the name that the endpoint knows.
    revision: a name for this version of it; change it when the endpoint serves other weights under the same name, and completions are asked anew.
    chat: the prompt is one user message of /chat/completions; false sends it as it is to /completions.
    system: the system message of a chat; empty for none.
    reasoning: for models that think first and refuse temperature and stop: they are sent max_completion_tokens alone, and their text is cut here.
    timeout_seconds: for one request, whole.
    max_retries: after the first try.
    """

    kind: ClassVar[str] = "openai"

    model: str
    revision: str = "endpoint"
    chat: bool = True
    system: str = "Continue the text in the same form. Write only what comes next, on one line."
    reasoning: bool = False
    concurrency: int = speed(16)
    requests_per_minute: float = speed(math.inf)
    tokens_per_minute: float = speed(math.inf)
    timeout_seconds: float = speed(120.0)
    max_retries: int = speed(6)
    backoff_seconds: float = speed(0.5)
    dollars_per_million_tokens_in: float = speed(0.0)
    dollars_per_million_tokens_out: float = speed(0.0)

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("OpenAITeacher.model is empty: give the name that the endpoint knows, such as openai:gpt-4o-mini")
        if self.reasoning and not self.chat:
            raise ValueError("OpenAITeacher.reasoning is for chat endpoints: leave chat on")
        if self.concurrency < 1 or self.max_retries < 0:
            raise ValueError(f"OpenAITeacher has concurrency {self.concurrency} and max_retries {self.max_retries}: at least 1 and 0 are needed")
        for name in ("requests_per_minute", "tokens_per_minute", "timeout_seconds", "backoff_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"OpenAITeacher.{name} is {getattr(self, name)}: it must be above 0")

    def render(self, prompt: str) -> str:
        """The chat messages as JSON, or the prompt itself."""
        return json.dumps(self._messages(prompt), ensure_ascii=False) if self.chat else prompt

    def fingerprint(self) -> dict[str, object]:
        """Model, revision and the form in which it is asked."""
        form: dict[str, object] = {"chat": {"system": self.system, "reasoning": self.reasoning}} if self.chat else {"chat": False}
        return {"model": self.model, "revision": self.revision, **form}

    def complete(self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Completion], None]) -> None:
        """Ask the endpoint, `concurrency` requests at a time; `done` is called from this thread."""
        from llmdistill.teach.openai_asking import Asking

        if requests:
            Asking(self, requests, sampling).run(done)

    def body(self, request: Request, sampling: Sampling) -> dict[str, object]:
        """The JSON that is posted for a request."""
        prompt = self._messages(request.prompt) if self.chat else request.prompt
        return request_body(self.model, prompt, request.sample_index, sampling, reasoning=self.reasoning)

    def _messages(self, prompt: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": prompt}]
