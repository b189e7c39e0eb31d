"""An engine for students that are told their task by the decoder's first token (llmdistill.losses.prompts, the shared-encoder form).

An Engine reads its start token from the model when it is made, so there is one for each start token; a request's label and rationale decode side by side, in
batches of their own. All other students are served by a plain Engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmdistill.decode.decoding import Decoding, Token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.decode.engine import Engine


@dataclass(frozen=True, kw_only=True)
class StartedDecoding(Decoding):
    """A decoding that begins with a token other than the model's own."""

    decoder_start_token_id: int


class StartTokenEngine:
    """Several engines behind the one interface that the scheduler uses."""

    def __init__(self, by_start: Mapping[int, Engine]) -> None:
        """The first one begins with the model's own token."""
        self._engines = list(by_start.values())
        self._places = {start: place for place, start in enumerate(by_start)}

    def add(self, prompt: Sequence[int], decoding: Decoding) -> int:
        place = self._places[decoding.decoder_start_token_id] if isinstance(decoding, StartedDecoding) else 0
        return self._row(self._engines[place].add(prompt, decoding), place)

    def step(self) -> list[Token]:
        return [token._replace(row=self._row(token.row, place)) for place, engine in enumerate(self._engines) if engine.num_active for token in engine.step()]

    def drop(self, row: int) -> None:
        self._engines[row % len(self._engines)].drop(row // len(self._engines))

    def _row(self, row: int, place: int) -> int:
        return row * len(self._engines) + place


def make_engine(model: PreTrainedModel, starts: Sequence[int], max_batch_rows: int) -> Engine | StartTokenEngine:
    """An engine that can begin from the model's own token and from each of `starts`."""
    from llmdistill.decode.engine import Engine

    config: Any = model.generation_config
    own = getattr(config, "decoder_start_token_id", None)
    engine = Engine(model, max_batch_rows=max_batch_rows)
    if not starts:
        return engine
    if own is None:
        raise ValueError("the checkpoint names start tokens for its tasks but its generation_config.json has no decoder_start_token_id; set it")
    by_start = {int(own): engine}
    try:
        for start in set(starts) - {own}:
            config.decoder_start_token_id = start
            by_start[start] = Engine(model, max_batch_rows=max_batch_rows)
    finally:
        config.decoder_start_token_id = own
    return StartTokenEngine(by_start)
