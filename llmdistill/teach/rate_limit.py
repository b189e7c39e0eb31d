"""Keep requests and tokens a minute under an endpoint's limits, and wait as long as it asks.

The limit is on every window of 60 seconds, not on an average: a full bucket that empties at once and then refills would send twice the limit in the
first minute.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_SECONDS = 60.0


@dataclass
class Sent:
    """A request that counts against the limits; `tokens` may be set to the true number once it is known."""

    at: float
    tokens: float


class RateLimit:
    """Shared by the threads that send.

    wait(seconds) sleeps and returns True when the asking has ended meanwhile; it and clock are passed so that tests need not wait.
    """

    def __init__(
        self, requests_per_minute: float, tokens_per_minute: float, *, wait: Callable[[float], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.requests_per_minute = requests_per_minute
        self.tokens_per_minute = tokens_per_minute
        self._wait = wait
        self._clock = clock
        self._lock = threading.Lock()
        self._sent: deque[Sent] = deque()
        self._not_before = float("-inf")

    def acquire(self, tokens: float) -> Sent | None:
        """Wait until a request of this many tokens may be sent; None when the asking has ended. One larger than the limit goes out alone."""
        while True:
            with self._lock:
                now = self._clock()
                delay = self._delay(now, tokens)
                if delay <= 0:
                    sent = Sent(at=now, tokens=tokens)
                    self._sent.append(sent)
                    return sent if not self._wait(0) else None
            if self._wait(delay):
                return None

    def pause(self, seconds: float) -> None:
        """Send nothing for this long: the endpoint asked for it."""
        with self._lock:
            self._not_before = max(self._not_before, self._clock() + seconds)

    def _delay(self, now: float, tokens: float) -> float:
        while self._sent and self._sent[0].at <= now - WINDOW_SECONDS:
            self._sent.popleft()
        if now < self._not_before:
            return self._not_before - now
        num_sent, num_tokens = len(self._sent), sum(sent.tokens for sent in self._sent)
        free_at = now
        for sent in self._sent:  # the oldest leave the window first
            if num_sent + 1 <= self.requests_per_minute and num_tokens + tokens <= self.tokens_per_minute:
                break
            num_sent, num_tokens, free_at = num_sent - 1, num_tokens - sent.tokens, sent.at + WINDOW_SECONDS
        return free_at - now
