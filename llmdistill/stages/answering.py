"""A student that is asked: its checkpoint, the way it was taught to be asked (config.json, `llmdistill`), and the decode engine."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdistill.decode.decoding import Decoding, Generated
from llmdistill.losses.prompts import EXPLAIN, PREDICT, Prompts, prefixed
from llmdistill.tasks.answers.answer import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["EXPLAIN", "PREDICT", "Answering"]


@dataclass(frozen=True, kw_only=True)
class Answering:
    """A loaded student and how it is asked for a label ("predict") or a reason ("explain")."""

    model: "PreTrainedModel"
    tokenizer: Any
    prompts: Prompts
    taught: tuple[str, ...] = (PREDICT, EXPLAIN)
    max_batch_rows: int = 32

    @staticmethod
    def load(folder: Path, *, device: str, max_batch_rows: int = 32) -> "Answering":
        """From a checkpoint. One that we did not train is asked with the usual prefixes."""
        from llmdistill.models import checkpoint

        model, tokenizer = checkpoint.load(folder, device=device)
        section = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("llmdistill")
        prompts = Prompts.from_config(section) if section else prefixed(is_encoder_decoder=bool(model.config.is_encoder_decoder))
        taught = tuple((section or {}).get("taught", prompts.prefixes))
        return Answering(model=model, tokenizer=tokenizer, prompts=prompts, taught=taught, max_batch_rows=max_batch_rows)

    def can(self, task: str) -> bool:
        """Whether the student was taught this task."""
        return task in self.taught

    def tokens(self, task: str, texts: Sequence[str]) -> list[list[int]]:
        """What the student reads, in tokens, as in training: the input alone, with what the tokenizer puts around one."""
        return self.tokenizer([self.prompts.text(task, text) for text in texts], return_attention_mask=False, verbose=False)["input_ids"] if texts else []

    def answers(self, task: str, texts: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """The likeliest answer to each text."""
        return [self.decoded(row) for row in self.generated(task, texts, decoding=Decoding(max_new_tokens=max_new_tokens))]

    def decoded(self, row: Generated) -> str:
        """An answer as text."""
        return self.tokenizer.decode(list(row.tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def accuracy(self, answer: Answer, texts: Sequence[str], labels: Sequence[str]) -> float:
        """The share of these texts whose label it gives, as the task's kind of answer is read and compared."""
        longest = max(len(tokens) for tokens in self.tokenizer(list(labels), add_special_tokens=False)["input_ids"])
        parsed = [answer.parse(text) for text in self.answers(PREDICT, texts, max_new_tokens=longest + 1)]
        return sum(one is not None and answer.same(one, label) for one, label in zip(parsed, labels, strict=True)) / len(texts)

    def generated(self, task: str, texts: Sequence[str], *, decoding: Decoding) -> list[Generated]:
        """The answer to each text, in tokens."""
        from llmdistill.decode.engine import Engine

        with _StartToken(self.model, self.prompts.decoder_start_token_ids.get(task)):
            return Engine(self.model, max_batch_rows=self.max_batch_rows).generate(self.tokens(task, texts), decoding)


class _StartToken:
    """Has the decoder begin with another token for as long as this is entered; None leaves the model's own."""

    def __init__(self, model: "PreTrainedModel", token: int | None) -> None:
        self._config: Any = model.generation_config
        self._token, self._own = token, getattr(self._config, "decoder_start_token_id", None)

    def __enter__(self) -> None:
        if self._token is not None:
            self._config.decoder_start_token_id = self._token

    def __exit__(self, *_: object) -> None:
        self._config.decoder_start_token_id = self._own
