"""What transformers' generate gives for a batch of prompts, row by row, in the terms of llmdistill.decode."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from llmdistill.decode.decoding import Generated

PAD = 0


def padded(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """The prompts as generate takes them: padded on the right for T5, on the left for causal models."""
    longest = max(map(len, prompts))
    pads = [[0] * (longest - len(prompt)) for prompt in prompts]
    ids, mask = [], []
    for prompt, pad in zip(prompts, pads, strict=True):
        ones = [1] * len(prompt)
        ids.append([*prompt, *pad] if model.config.is_encoder_decoder else [*pad, *prompt])
        mask.append([*ones, *pad] if model.config.is_encoder_decoder else [*pad, *ones])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stops: Collection[int] = (), use_cache: bool = True
) -> list[Generated]:
    """Greedy, one a prompt."""
    made = _generate(model, prompts, max_new_tokens, stops, output_logits=True, use_cache=use_cache)
    logprobs_BTV = torch.stack(made.logits, 1).log_softmax(-1)
    rows = made.sequences[:, -len(made.logits) :].tolist()
    return [_row(row, stops, logprobs_TV) for row, logprobs_TV in zip(rows, logprobs_BTV, strict=True)]


def beams(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, num_beams: int, stops: Collection[int] = (), **settings: Any
) -> list[list[tuple[Generated, float]]]:
    """All `num_beams` hypotheses of each prompt, the best first, each with transformers' score of it (their logprob_sum is not filled in)."""
    made = _generate(model, prompts, max_new_tokens, stops, num_beams=num_beams, num_return_sequences=num_beams, output_scores=True, **settings)
    num_tokens_before = 1 if model.config.is_encoder_decoder else max(map(len, prompts))
    rows = [_row(row, stops) for row in made.sequences[:, num_tokens_before:].tolist()]
    scored = list(zip(rows, made.sequences_scores.tolist(), strict=True))
    return [scored[first : first + num_beams] for first in range(0, len(scored), num_beams)]


def _generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: Collection[int], **settings: Any) -> Any:
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=PAD,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        do_sample=False,
        return_dict_in_generate=True,
        **settings,
    )
    any_model: Any = model
    with torch.inference_mode():
        return any_model.generate(**padded(model, prompts), generation_config=config)


def differing_stops(rows: Sequence[Generated], num_stops: int) -> set[int]:
    """The tokens that would end these rows at the most different places."""

    def num_places(token: int) -> int:
        return len({row.tokens.index(token) if token in row.tokens else len(row.tokens) for row in rows})

    return set(sorted({token for row in rows for token in row.tokens}, key=lambda token: (-num_places(token), token))[:num_stops])


def assert_same(ours: Sequence[Generated], reference: Sequence[Generated]) -> None:
    """The same tokens and ends, and the same log-probabilities up to float32's rounding."""
    assert [(one.tokens, one.finish_reason) for one in ours] == [(one.tokens, one.finish_reason) for one in reference]
    assert [one.logprob_sum for one in ours] == pytest.approx([one.logprob_sum for one in reference], rel=1e-5, abs=1e-4)


def _row(tokens: Sequence[int], stops: Collection[int], logprobs_TV: torch.Tensor | None = None) -> Generated:
    num_tokens = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    counted = tokens[: num_tokens + 1]
    logprob_sum = 0.0 if logprobs_TV is None else float(logprobs_TV[torch.arange(len(counted)), torch.tensor(counted)].sum())
    return Generated(tokens=tuple(tokens[:num_tokens]), finish_reason="stop" if num_tokens < len(tokens) else "length", logprob_sum=logprob_sum)
