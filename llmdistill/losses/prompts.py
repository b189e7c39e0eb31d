"""How a student is told what to write: the label of a text ("predict") or the reason for it ("explain").

Plain data, saved under `llmdistill` in config.json, so that evaluation and the server ask exactly what training taught:

    {"prefixes": {"predict": "predict: ", "explain": "explain: "}, "suffix": ""}

Source: Distilling step-by-step (Hsieh et al. 2023), section 3.2, whose student reads the task in front of its input. A causal student also needs to see
where its input ends, so its text ends in `suffix`.

In the shared-encoder form, which is ours, the encoder reads the bare text once and the decoder is told the task, by the token that it starts from:

    {"prefixes": {"predict": "", "explain": ""}, "suffix": "", "decoder_start_token_ids": {"predict": 0, "explain": 1}}

"predict" starts from the model's own start token, so that any tool that knows nothing of this gets the label; "explain" from the end token, which a decoder
otherwise never reads (transformers: `generate(..., decoder_start_token_id=1)`). Every T5 vocabulary has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREDICT, EXPLAIN = "predict", "explain"


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The text around an input and the decoder's first token, for each task."""

    prefixes: Mapping[str, str]
    suffix: str = ""
    decoder_start_token_ids: Mapping[str, int] = field(default_factory=dict)
    """Empty where the model's own start token is meant, and for causal students."""

    def text(self, task: str, text: str) -> str:
        """What the student reads."""
        return self.prefixes[task] + text + self.suffix

    def to_config(self) -> dict[str, Any]:
        """Plain data for config.json."""
        data: dict[str, Any] = {"prefixes": dict(self.prefixes), "suffix": self.suffix}
        if self.decoder_start_token_ids:
            data["decoder_start_token_ids"] = dict(self.decoder_start_token_ids)
        return data

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> Prompts:
        """Reads what `to_config` wrote."""
        return cls(prefixes=section["prefixes"], suffix=section.get("suffix", ""), decoder_start_token_ids=section.get("decoder_start_token_ids", {}))


def prefixed(*, is_encoder_decoder: bool) -> Prompts:
    """Each task reads the text behind a prefix of its own."""
    return Prompts(prefixes={PREDICT: "predict: ", EXPLAIN: "explain: "}, suffix="" if is_encoder_decoder else "\n")


def shared_encoder(*, is_encoder_decoder: bool, start_token_id: int, end_token_id: int) -> Prompts:
    """Both tasks read the bare text; the decoder is told the task by its first token."""
    if not is_encoder_decoder:
        raise ValueError("the shared-encoder form needs an encoder, and this student is causal; use form=TWO_PASS, or a T5 student")
    if start_token_id == end_token_id:
        raise ValueError(
            f"the shared-encoder form starts labels from token {start_token_id} and rationales from the end token, which is the same here; use form=TWO_PASS"
        )
    return Prompts(prefixes={PREDICT: "", EXPLAIN: ""}, decoder_start_token_ids={PREDICT: start_token_id, EXPLAIN: end_token_id})
