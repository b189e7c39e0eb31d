"""What is asked of the decode engine and what it gives back; no torch, so that settings and stages can hold these."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length"]


class StopTokens(enum.Enum):
    """Stop tokens that are named by the model instead of by the caller."""

    OF_MODEL = "the end-of-sequence tokens of the model's generation config"


class ExitThreshold(enum.Enum):
    """A threshold that is named by the model instead of by the caller."""

    OF_MODEL = "that of the smallest delta which the model's exits were calibrated for; where they were not, no token leaves"


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the tokens of one row are chosen.

    Temperature 0 takes the likeliest token. Above 0 the logits are divided by it, cut to the `top_k` likeliest (0: no cut) and to the smallest set that
    holds `top_p` of the probability, in this order, and one token is drawn; the draws of a row depend on `seed` and on its prompt and on nothing else, so
    ask for several answers to one prompt with several seeds. `num_beams` above 1 is transformers' beam search; `length_penalty` and `early_stopping` are
    its parameters of these names.

    In a model with exits, a token leaves where the confidence is above `exit_threshold` (1 for never, which is the full model); in others it does nothing.
    `draft_tokens` above 0 is speculative decoding by the model itself: so many tokens are drafted at exit number `draft_exit` and verified by the full
    model at once, which gives the tokens of the full model. Beam search goes the whole depth.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    seed: int = 0
    stop_token_ids: tuple[int, ...] | StopTokens = StopTokens.OF_MODEL
    exit_threshold: float | ExitThreshold = ExitThreshold.OF_MODEL
    draft_tokens: int = 0
    draft_exit: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; give 0 or more")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}; give 0 for the likeliest token or a finite number above it")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number above 0 and at most 1 (1 keeps every token)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give 0 to keep every token, or how many to keep")
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}; give 1 for no beam search, or more")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(f"beam search does not sample: num_beams is {self.num_beams} and temperature {self.temperature}; set num_beams=1 or temperature=0")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty is {self.length_penalty}; give a finite number")
        if not isinstance(self.exit_threshold, ExitThreshold) and not 0 <= self.exit_threshold <= 1:
            raise ValueError(f"exit_threshold is {self.exit_threshold}; give 0 to 1, where 1 never leaves")
        if min(self.draft_tokens, self.draft_exit) < 0:
            raise ValueError(f"draft_tokens is {self.draft_tokens} and draft_exit {self.draft_exit}; give 0 or more")
        if self.draft_tokens and (self.temperature > 0 or self.num_beams > 1):
            raise ValueError(
                f"drafts are verified against the likeliest token: temperature is {self.temperature} and num_beams {self.num_beams}; "
                "set temperature=0 and num_beams=1, or draft_tokens=0"
            )


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One finished row.

    `tokens` are the model's own, without the prompt, the decoder's start token and the stop token. `logprob_sum` adds up the model's log-probabilities (of
    its whole distribution at temperature 1) of the tokens and of the stop token if there was one.
    """

    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprob_sum: float
    layers: tuple[int, ...] = field(default=(), compare=False)
    """How many decoder layers each token went through, the stop token's last where there was one; nothing of beams."""
    encoder_layers: int = field(default=0, compare=False)
    """How many encoder layers the prompt went through; 0 where none can leave early."""


class Token(NamedTuple):
    """One step of one row. With finish_reason "stop" the token is the stop token, which is not part of the answer."""

    row: int
    token: int
    finished: bool
    finish_reason: FinishReason | None
    logprob: float
    num_layers: int = 0
    """Of the decoder, that it went through."""
