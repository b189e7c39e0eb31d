"""A checkpoint that is ready to answer: text to tokens, tokens to text, engines, operating points, and what the model cannot take.

A tokenizer is not safe to use from two threads, so encoding (a thread of its own: a long prompt must not hold up the event loop) and decoding (the scheduler's
thread) each have a copy.
"""

from __future__ import annotations

import copy
import enum
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmdistill.serve.engines import make_engines
from llmdistill.serve.errors import ServeError
from llmdistill.serve.offered import measure_points, offered
from llmdistill.serve.points import Points
from llmdistill.serve.predict import TaskSection
from llmdistill.serve.scheduler import BatchEngine
from llmdistill.serve.settings import ServeSettings


class Precision(enum.Enum):
    """The type that the weights are computed in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(kw_only=True)
class ServedModel:
    """What the server knows of its model."""

    name: str
    created: int  # seconds since 1970
    tokenizer: Any
    make_engine: Callable[[], BatchEngine]
    points: Points
    vocabulary_size: int
    num_positions: int  # prompt and answer together; 0 where nothing limits them
    answer_continues_prompt: bool  # causal; an encoder-decoder begins a text of its own
    task: TaskSection

    def __post_init__(self) -> None:
        self._decoder = copy.deepcopy(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, with what the tokenizer puts around one."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, by the tokenizer's chat template, up to where the assistant speaks."""
        if not self.tokenizer.chat_template:
            message = f"The model '{self.name}' has no chat template; use /v1/completions, or /v1/predict for its task"
            raise ServeError(400, message, param="messages", code="no_chat_template")
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ServeError(400, f"The chat template does not take these messages: {error}", param="messages") from None
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without the special ones; called by the scheduler's thread alone."""
        return self._decoder.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def check_prompt(self, tokens: Sequence[int], *, max_prompt_tokens: int, max_new_tokens: int) -> None:
        """400 for a prompt that is empty, too long, or made of tokens that there are not."""
        if not tokens:
            raise ServeError(400, "The prompt has no tokens", param="prompt")
        if not 0 <= min(tokens) <= max(tokens) < self.vocabulary_size:
            raise ServeError(400, f"The prompt has tokens outside the vocabulary of {self.vocabulary_size}", param="prompt")
        if len(tokens) > max_prompt_tokens:
            message = f"The longest prompt of this server is {max_prompt_tokens} tokens, but yours has {len(tokens)}; shorten it"
            raise ServeError(400, message, param="prompt", code="context_length_exceeded")
        if self.num_positions and len(tokens) + max_new_tokens > self.num_positions:
            message = (
                f"This model's maximum context length is {self.num_positions} tokens. However, you requested {len(tokens) + max_new_tokens} tokens "
                f"({len(tokens)} in the prompt, {max_new_tokens} in the answer). Please reduce either."
            )
            raise ServeError(400, message, param="prompt", code="context_length_exceeded")


def load_served_model(checkpoint: Path, *, settings: ServeSettings, device: str, precision: Precision, front: str = "") -> ServedModel:
    """Loads a checkpoint for serving, and measures how fast it is; `front` as in app.serve."""
    config_path = checkpoint / "config.json"
    if not config_path.is_file():
        raise ValueError(f"{checkpoint} has no config.json; give the folder of a checkpoint, as runs/PIPELINE/latest/STAGE")
    import torch

    from llmdistill.models.checkpoint import load

    model, tokenizer = load(checkpoint, dtype=getattr(torch, precision.value), device=device)
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    task = TaskSection.from_config(json.loads(config_path.read_text(encoding="utf-8")), is_encoder_decoder=is_encoder_decoder)
    starts = sorted(set(task.prompts.decoder_start_token_ids.values()))
    num_positions = 0 if is_encoder_decoder else int(model.config.max_position_embeddings)
    found = offered(model, front)
    make = partial(make_engines, starts=starts, max_batch_rows=settings.max_batch_rows)
    return ServedModel(
        name=settings.model_name or checkpoint.name or checkpoint.resolve().name,
        created=int(config_path.stat().st_mtime),
        tokenizer=tokenizer,
        make_engine=lambda: make({one.subnet: one.model for one in found}),
        points=measure_points(found, make, num_positions=num_positions, max_rows=settings.max_batch_rows),
        vocabulary_size=int(model.config.vocab_size),
        num_positions=num_positions,
        answer_continues_prompt=not is_encoder_decoder,
        task=task,
    )
