"""Several engines behind the one interface that the scheduler uses: one for each sub-network and each start token of the decoder.

An elastic student's sub-networks are taken out of it once, each with weights of its own, so that rows of several can decode at the same time. A student that
is told its task by the decoder's first token (llmdistill.losses.prompts, the shared-encoder form) has an engine for each start token, since an Engine reads
that from the model when it is made; a request's label and rationale decode side by side. All other students are served by one Engine.

A step moves the rows of every engine that has some, one engine after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from llmdistill.decode.decoding import Decoding, Token
from llmdistill.serve.points import LARGEST

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.decode.engine import Engine

Place: TypeAlias = tuple[str, int | None]
"""A sub-network, and a start token (None: the model's own)."""


@dataclass(frozen=True, kw_only=True)
class PlacedDecoding(Decoding):
    """A decoding that says which engine it is for."""

    subnet: str = LARGEST
    decoder_start_token_id: int | None = None  # None: the model's own

    @property
    def place(self) -> Place:
        return self.subnet, self.decoder_start_token_id


class Engines:
    """Engines by their places."""

    def __init__(self, by_place: Mapping[Place, Engine]) -> None:
        self._engines = list(dict.fromkeys(by_place.values()))  # one engine may have two places
        self._numbers = {place: self._engines.index(engine) for place, engine in by_place.items()}

    def add(self, prompt: Sequence[int], decoding: PlacedDecoding) -> int:
        number = self._numbers[decoding.place]
        return self._row(self._engines[number].add(prompt, decoding), number)

    def step(self) -> list[Token]:
        return [token._replace(row=self._row(token.row, number)) for number, engine in enumerate(self._engines) if engine.num_active for token in engine.step()]

    def drop(self, row: int) -> None:
        self._engines[row % len(self._engines)].drop(row // len(self._engines))

    def _row(self, row: int, number: int) -> int:
        return row * len(self._engines) + number


def make_engines(models: Mapping[str, PreTrainedModel], starts: Sequence[int], max_batch_rows: int) -> Engines:
    """Engines of the sub-networks, by their texts; each can begin from the model's own token and from each of `starts`."""
    from llmdistill.decode.engine import Engine

    by_place: dict[Place, Engine] = {}
    for subnet, model in models.items():
        config: Any = model.generation_config
        own = getattr(config, "decoder_start_token_id", None)
        by_place[subnet, None] = Engine(model, max_batch_rows=max_batch_rows)
        if starts and own is None:
            raise ValueError("the checkpoint names start tokens for its tasks but its generation_config.json has no decoder_start_token_id; set it")
        try:
            for start in starts:
                if start == own:
                    by_place[subnet, start] = by_place[subnet, None]
                    continue
                config.decoder_start_token_id = start
                by_place[subnet, start] = Engine(model, max_batch_rows=max_batch_rows)
        finally:
            if starts:
                config.decoder_start_token_id = own
    return Engines(by_place)
