"""No window of a minute holds more than the limits, on a clock of our own."""

import random

from llmdistill.teach.rate_limit import WINDOW_SECONDS, RateLimit


class Clock:
    """Waiting moves it on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.is_ended = False

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.is_ended


def sent_with(clock: Clock, limit: RateLimit, tokens: list[float]) -> list[float]:
    times = []
    for num in tokens:
        assert limit.acquire(num) is not None
        times.append(clock.now)
    return times


def test_requests_per_minute() -> None:
    clock = Clock()
    times = sent_with(clock, RateLimit(10, float("inf"), wait=clock.wait, clock=clock), [1.0] * 35)
    assert times[:10] == [100.0] * 10
    assert all(later - earlier >= WINDOW_SECONDS for earlier, later in zip(times, times[10:], strict=False))
    assert clock.now == 100.0 + 3 * WINDOW_SECONDS


def test_tokens_per_minute() -> None:
    clock, chance = Clock(), random.Random(0)
    tokens = [float(chance.randrange(1, 400)) for _ in range(200)]
    times = sent_with(clock, RateLimit(float("inf"), 1_000, wait=clock.wait, clock=clock), tokens)
    for start in times:
        assert sum(num for at, num in zip(times, tokens, strict=True) if start <= at < start + WINDOW_SECONDS) <= 1_000
    assert clock.now - 100.0 < sum(tokens) / 1_000 * WINDOW_SECONDS * 1.5, "it waits no longer than it must"


def test_the_true_number_of_tokens_replaces_the_estimate() -> None:
    clock = Clock()
    limit = RateLimit(float("inf"), 1_000, wait=clock.wait, clock=clock)
    sent = limit.acquire(1_000)
    assert sent is not None
    sent.tokens = 10
    assert limit.acquire(990) is not None
    assert clock.now == 100.0


def test_a_request_larger_than_the_limit_goes_out_alone() -> None:
    clock = Clock()
    limit = RateLimit(float("inf"), 100, wait=clock.wait, clock=clock)
    assert sent_with(clock, limit, [50, 500, 50]) == [100.0, 160.0, 220.0]


def test_a_pause_and_an_end() -> None:
    clock = Clock()
    limit = RateLimit(float("inf"), float("inf"), wait=clock.wait, clock=clock)
    limit.pause(7)
    limit.pause(3)
    assert sent_with(clock, limit, [1]) == [107.0]
    clock.is_ended = True
    assert limit.acquire(1) is None
