"""What a teacher is: something that completes prompts and says what that cost.

A teacher has an identity (`model`, `revision`) that is known without loading weights, since it is part of a stage's key and of the completion cache.
Its speed knobs (batch size, concurrency, devices) are not. Completions are handed over one by one as they finish, so that each is on disk before the
next is waited for; what a teacher does with batches, threads or engines is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a teacher chooses tokens; all of it is part of a completion's fingerprint.

    max_tokens: a longer completion is cut there (its finish_reason is "length").
    temperature: 0 takes the likeliest token.
    top_p: sample among the likeliest tokens that hold this much probability.
    seed: sample i of a row uses seed + i where the teacher takes seeds.
    stop: a completion ends before the first of these.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"Sampling.max_tokens is {self.max_tokens}: it must be at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"Sampling.temperature is {self.temperature}: it must be 0 (greedy) or above")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"Sampling.top_p is {self.top_p}: it must be above 0 and at most 1")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"Sampling.stop is {self.stop!r}: give a tuple of strings that are not empty")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a teacher answered, and what it took.

    text: what was generated, without the stop string.
    seconds: this completion's share of the time that the teacher worked. Completions made together divide their time, so that the seconds of all of
        them add up to the time spent, and tokens per second is their quotient.
    finish_reason: "stop" where the model or a stop string ended it, "length" where it was cut.
    """

    text: str
    tokens_in: int
    tokens_out: int
    seconds: float
    finish_reason: str

    def __post_init__(self) -> None:
        if self.finish_reason not in ("stop", "length"):
            raise ValueError(f"Completion.finish_reason is {self.finish_reason!r}: it must be 'stop' or 'length'")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion to ask for: a prompt, and which of its samples."""

    prompt: str
    sample_index: int = 0


class TeacherError(RuntimeError):
    """The teacher cannot answer; the message says what failed and what to do. Completions handed over before it are kept."""


@runtime_checkable
class Teacher(Protocol):
    """Completes prompts. Implementations: TransformersTeacher, VLLMTeacher, OpenAITeacher, Recorded."""

    @property
    def model(self) -> str:
        """Which model, for people and for the cache."""
        ...

    @property
    def revision(self) -> str:
        """Which version of it: a hub revision, or "sha256:..." of the weights for files. Weights are not loaded for this."""
        ...

    @property
    def dollars_per_million_tokens_in(self) -> float: ...

    @property
    def dollars_per_million_tokens_out(self) -> float: ...

    def render(self, prompt: str) -> str:
        """What is really sent: the prompt, or the prompt in the model's chat template, or chat messages as JSON. This is what is fingerprinted."""
        ...

    def complete(self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int, Completion], None]) -> None:
        """Answer every request; `request.prompt` is not rendered yet.

        Calls done(index, completion) as each finishes, in any order, from the calling thread. An exception raised by `done` ends the asking and passes
        through unchanged (that is how a budget stops it); requests that are already paid for may still be handed over first.
        """
        ...

    def fingerprint(self) -> dict[str, object]:
        """The identity that enters a stage's key: model, revision and whatever else changes the answers."""
        ...


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    positions = [position for position in (text.find(string) for string in stop) if position >= 0]
    return (text[: min(positions)], True) if positions else (text, False)


def dollars(teacher: Teacher, tokens_in: int, tokens_out: int) -> float:
    """What these tokens cost at the teacher's prices."""
    return (tokens_in * teacher.dollars_per_million_tokens_in + tokens_out * teacher.dollars_per_million_tokens_out) / 1e6
