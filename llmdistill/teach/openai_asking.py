"""One run of questions to an OpenAI-compatible endpoint: threads that send and try again, and the calling thread that hands over what arrives.

Threads, because each spends its time waiting for the endpoint, and because a plain call from any program then works, inside an event loop or not.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from llmdistill.teach.openai_protocol import Answered, FatalError, PassingError, read_answer, retry_after_seconds
from llmdistill.teach.rate_limit import RateLimit
from llmdistill.teach.teacher import Completion, Request, Sampling, TeacherError, cut_at_stop

if TYPE_CHECKING:
    import httpx

    from llmdistill.teach.openai_teacher import OpenAITeacher

logger = logging.getLogger(__name__)

DEFAULT_BASE_URL = "https://api.openai.com/v1"
MAX_BACKOFF_SECONDS = 60.0
MAX_ANSWER_BYTES = 16_000_000
CHARACTERS_PER_TOKEN = 4.0  # rule of thumb, for the rate limit before the true number is known


class Asking:
    """One call of `complete`: threads that send, and the calling thread that hands over what arrives."""

    def __init__(self, teacher: OpenAITeacher, requests: Sequence[Request], sampling: Sampling) -> None:
        self.teacher, self.requests, self.sampling = teacher, requests, sampling
        self.base_url = (os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL).rstrip("/")
        self.api_key = os.environ.get("OPENAI_API_KEY", "")
        if not self.api_key and self.base_url == DEFAULT_BASE_URL:
            raise TeacherError("OPENAI_API_KEY is not set: export it, or set OPENAI_BASE_URL to an endpoint that needs none")
        self.ended = threading.Event()
        self.limit = RateLimit(teacher.requests_per_minute, teacher.tokens_per_minute, wait=self.ended.wait)
        self.results: queue.Queue[tuple[int, Answered] | Exception | None] = queue.Queue()
        self.waiting = iter(range(len(requests)))
        self.lock = threading.Lock()
        self.jitter = random.Random()  # timing only: no answer depends on it
        self.warned_of_usage = False

    def run(self, done: Callable[[int, Completion], None]) -> None:
        try:
            import httpx
        except ImportError as error:
            raise TeacherError("an OpenAI-compatible teacher needs the package httpx: pip install 'llmdistill[openai]'") from error

        quiet = logging.getLogger("httpx")  # it writes every URL at level INFO
        if quiet.level == logging.NOTSET:
            quiet.setLevel(logging.WARNING)
        num_threads = min(self.teacher.concurrency, len(self.requests))
        timeout = self.teacher.timeout_seconds
        limits = httpx.Limits(max_connections=num_threads, max_keepalive_connections=num_threads)
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        with httpx.Client(timeout=timeout, limits=limits, headers=headers) as client:
            for number in range(num_threads):
                threading.Thread(target=self._work, args=(client,), name=f"ask-{number}", daemon=True).start()
            try:
                self._hand_over(num_threads, done)
            finally:
                self.ended.set()

    def _hand_over(self, num_threads: int, done: Callable[[int, Completion], None]) -> None:
        """Give every answer to `done`; after a failure, the answers that were still under way too, for they are paid for."""
        failure: Exception | None = None
        last = time.perf_counter()
        while num_threads:
            result = self.results.get()
            if result is None:
                num_threads -= 1
            elif isinstance(result, Exception):
                failure = failure or result
                self.ended.set()
            else:
                index, answered = result
                now = time.perf_counter()
                completion, last = self._completion(index, answered, now - last), now
                try:
                    done(index, completion)
                except Exception as error:
                    failure = failure or error
                    self.ended.set()
        if failure is not None:
            raise failure

    def _completion(self, index: int, answered: Answered, seconds: float) -> Completion:
        text, stopped = cut_at_stop(answered.text, self.sampling.stop)
        tokens_in, tokens_out = answered.tokens_in, answered.tokens_out
        if tokens_in is None or tokens_out is None:
            if not self.warned_of_usage:
                logger.warning("the endpoint does not say how many tokens it used: counting one for every %g characters", CHARACTERS_PER_TOKEN)
                self.warned_of_usage = True
            tokens_in = math.ceil(len(self.requests[index].prompt) / CHARACTERS_PER_TOKEN) if tokens_in is None else tokens_in
            tokens_out = math.ceil(len(answered.text) / CHARACTERS_PER_TOKEN) if tokens_out is None else tokens_out
        return Completion(
            text=text, tokens_in=tokens_in, tokens_out=tokens_out, seconds=seconds, finish_reason="stop" if stopped or not answered.was_cut else "length"
        )

    def _work(self, client: httpx.Client) -> None:
        try:
            while not self.ended.is_set():
                with self.lock:
                    index = next(self.waiting, None)
                if index is None:
                    break
                answered = self._ask(client, index)
                if answered is not None:
                    self.results.put((index, answered))
        except Exception as error:  # TeacherError, or a mistake of ours: either way the calling thread must hear of it
            self.results.put(error)
        finally:
            self.results.put(None)

    def _ask(self, client: httpx.Client, index: int) -> Answered | None:
        """One request until it is answered; None when the asking has ended meanwhile."""
        request = self.requests[index]
        body = self.teacher.body(request, self.sampling)
        expected_tokens = len(request.prompt) / CHARACTERS_PER_TOKEN + self.sampling.max_tokens
        for attempt in range(self.teacher.max_retries + 1):
            sent = self.limit.acquire(expected_tokens)
            if sent is None:
                return None
            try:
                answered = self._post(client, body)
                if answered.tokens_in is not None and answered.tokens_out is not None:
                    sent.tokens = answered.tokens_in + answered.tokens_out
                return answered
            except FatalError as failure:
                raise TeacherError(self._without_secrets(f"the endpoint refuses request {index} ({_end(request.prompt)}): {failure}")) from None
            except PassingError as failure:
                if attempt == self.teacher.max_retries:
                    raise TeacherError(
                        self._without_secrets(
                            f"the endpoint did not answer request {index} ({_end(request.prompt)}) in {attempt + 1} tries; the last: {failure}. "
                            "All completions so far are kept: run again later, or with a larger max_retries or timeout_seconds"
                        )
                    ) from None
                delay = min(MAX_BACKOFF_SECONDS, self.teacher.backoff_seconds * 2**attempt) * self.jitter.uniform(0.5, 1.5)
                if failure.wait_seconds > 0:
                    self.limit.pause(failure.wait_seconds)
                    delay = failure.wait_seconds + self.jitter.uniform(0.0, self.teacher.backoff_seconds)
                logger.info("%s", self._without_secrets(f"request {index}: {failure}; again in {delay:.1f} s"))
                if self.ended.wait(delay):
                    return None
        raise AssertionError("the loop returns or raises")

    def _post(self, client: httpx.Client, body: Mapping[str, object]) -> Answered:
        import httpx

        path = "/chat/completions" if self.teacher.chat else "/completions"
        deadline = time.monotonic() + self.teacher.timeout_seconds
        content = bytearray()
        try:
            with client.stream("POST", self.base_url + path, json=body) as response:
                for part in response.iter_bytes():
                    content += part
                    if time.monotonic() > deadline:
                        raise PassingError(f"no whole answer after {self.teacher.timeout_seconds:g} s")
                    if len(content) > MAX_ANSWER_BYTES:
                        raise PassingError(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
        except httpx.TimeoutException:
            raise PassingError(f"no answer after {self.teacher.timeout_seconds:g} s") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise FatalError(f"OPENAI_BASE_URL is not a URL that can be asked ({type(error).__name__}): it looks like https://host/v1") from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise PassingError(f"{type(error).__name__}: {error}") from None
        return read_answer(response.status_code, bytes(content), chat=self.teacher.chat, wait_seconds=retry_after_seconds(response.headers))

    def _without_secrets(self, message: str) -> str:
        for secret, name in ((self.api_key, "OPENAI_API_KEY"), (self.base_url, "OPENAI_BASE_URL")):
            if secret:
                message = message.replace(secret, f"${name}")
        return message


def _end(prompt: str) -> str:
    """The end of a prompt is where rows differ."""
    return repr(prompt[-60:])
