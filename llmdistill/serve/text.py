"""From tokens to text while they arrive, and where the text must end.

A token is not a piece of text: one character may be spread over several tokens, and the space before a word may hang on whether another word comes before it.
`Detokenizer` therefore decodes a short window twice, with and without the new tokens, and gives out the difference, once that difference ends in a whole
character (the method of text-generation-inference and vLLM). `StopMatcher` cuts the text at the first stop string and holds back what may yet become one, so a
stream never shows a part of a stop string.

Law: joined together, the pieces are the text that decoding everything at once and cutting it then would give, however the tokens were split into pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a decoder gives for bytes that are not (yet) a character


class Detokenizer:
    """Turns tokens that arrive a few at a time into text that never breaks a character."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        """`context`: the last tokens of a causal model's prompt, which the text continues; empty for an encoder-decoder."""
        self._decode = decode
        self._tokens = list(context)  # the window; text up to _num_read tokens was given out
        self._num_read = len(self._tokens)
        self._read_text = decode(self._tokens) if self._tokens else ""
        if self._read_text.endswith(REPLACEMENT):
            self._tokens, self._num_read, self._read_text = [], 0, ""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        self._tokens.extend(tokens)
        text = self._decode(self._tokens)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._read_text):
            return ""
        new_text = text[len(self._read_text) :]
        self._tokens = self._tokens[self._num_read :]  # the window keeps the tokens of the piece just given out
        self._num_read = len(self._tokens)
        self._read_text = self._decode(self._tokens)
        return new_text

    def close(self) -> str:
        """What is left when no more tokens come: bytes that never became a character."""
        text = self._decode(self._tokens)
        return text[len(self._read_text) :]


class StopMatcher:
    """Cuts text at the stop string that is complete first; of several that end together, the longest."""

    def __init__(self, stop: Sequence[str]) -> None:
        if not all(stop):
            raise ValueError("a stop string is empty; leave it out")
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain to stand before any stop string."""
        if self.found:
            return ""
        held = self._held + text
        ends = [(start + len(stop), start) for stop in self._stop if (start := held.find(stop)) >= 0]
        if ends:
            self.found = True
            self._held = ""
            return held[: min(ends)[1]]
        num_held = max((_num_started(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - num_held :]
        return held[: len(held) - num_held]

    def close(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """One row's text: detokenized, cut at its stop strings."""

    def __init__(self, decode: Callable[[Sequence[int]], str], *, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        self._detokenizer = Detokenizer(decode, context)
        self._matcher = StopMatcher(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; nothing more comes out."""
        return self._matcher.found

    def push(self, tokens: Sequence[int]) -> str:
        """The text that can be shown now."""
        return self._matcher.push(self._detokenizer.push(tokens))

    def close(self) -> str:
        """The rest, when the row is done."""
        return self._matcher.push(self._detokenizer.close()) + self._matcher.close()


def _num_started(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
