"""Beam search with the semantics of transformers' GenerationMixin._beam_search (5.x), each prompt for itself.

A prompt has `num_beams` running hypotheses and the best `num_beams` finished ones, scored by log-probability / length ** length_penalty. It ends when no
running one can beat the worst finished one at its present length (early_stopping False), when all finished places are taken (early_stopping True), or at
max_new_tokens. Where transformers computes all prompts of a batch to the last one's end, a prompt that has ended leaves the batch here.

Shapes: R prompts, W beams, K candidates a prompt, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from llmdistill.decode.cache import places_after
from llmdistill.decode.decoding import Decoding, FinishReason, Generated

if TYPE_CHECKING:
    from torch import Tensor

LOWEST_SCORE = -1.0e9  # what transformers gives a hypothesis that must not be chosen


class Batch(Protocol):
    """Rows that decode together, each with a slot for every beam."""

    def admit(self, prompts: Sequence[Sequence[int]]) -> list[int]: ...
    def rearrange(self, order: Sequence[int]) -> None: ...
    def reorder_slots(self, sources: Sequence[int], num_steps: int) -> None: ...
    def step(self, tokens: Sequence[int]) -> Tensor: ...


class Hypotheses:
    """The running and the finished hypotheses of all prompts."""

    def __init__(self, num_prompts: int, decoding: Decoding, limits: Sequence[int], stops: frozenset[int], device: torch.device) -> None:
        shape = (num_prompts, decoding.num_beams)
        self.decoding = decoding
        self.num_steps = 0
        self.limits_R1 = torch.tensor(limits, device=device)[:, None]
        self.stops = torch.tensor(sorted(stops), dtype=torch.long, device=device)
        self.running_RWT = torch.zeros(*shape, max(limits), dtype=torch.long, device=device)
        self.finished_RWT = self.running_RWT.clone()
        self.lengths_RW = torch.zeros(shape, dtype=torch.long, device=device)
        # Only the first beam counts at first, lest all beams be the same.
        self.running_scores_RW = torch.full(shape, LOWEST_SCORE, device=device)
        self.running_scores_RW[:, 0] = 0
        self.finished_scores_RW = torch.full(shape, LOWEST_SCORE, device=device)
        self.is_finished_RW = torch.zeros(shape, dtype=torch.bool, device=device)

    def advance(self, logits_SV: Tensor) -> tuple[Tensor, Tensor]:
        """Takes one more token a hypothesis; the beams that the running ones continue (R, W), and which prompts have ended (R)."""
        decoding, num_beams, step = self.decoding, self.decoding.num_beams, self.num_steps
        vocabulary_size = logits_SV.shape[-1]
        num_candidates = max(2, 1 + len(self.stops)) * num_beams
        scores_RWV = logits_SV.float().log_softmax(-1).view(-1, num_beams, vocabulary_size) + self.running_scores_RW[:, :, None]
        scores_RK, flat_RK = scores_RWV.flatten(1).topk(num_candidates)
        beams_RK, tokens_RK = flat_RK // vocabulary_size, flat_RK % vocabulary_size
        candidates_RKT = _take(self.running_RWT, beams_RK)
        candidates_RKT[:, :, step] = tokens_RK
        self.num_steps = num_tokens = step + 1
        ends_RK = torch.isin(tokens_RK, self.stops) | (self.limits_R1 <= num_tokens)

        running_scores_RK = scores_RK + ends_RK.float() * LOWEST_SCORE
        chosen_RW = running_scores_RK.topk(num_beams).indices
        self.running_RWT, self.running_scores_RW, sources_RW = (_take(x, chosen_RW) for x in (candidates_RKT, running_scores_RK, beams_RK))

        # Of those that end, the first num_beams candidates may join the finished ones; the others were drawn as a reserve for the running ones.
        ends_RK[:, num_beams:] = False
        end_scores_RK = scores_RK / num_tokens**decoding.length_penalty + (~ends_RK).float() * LOWEST_SCORE
        merged_scores = torch.cat([self.finished_scores_RW, end_scores_RK], 1)
        best_RW = merged_scores.topk(num_beams).indices
        self.finished_scores_RW = _take(merged_scores, best_RW)
        self.finished_RWT = _take(torch.cat([self.finished_RWT, candidates_RKT], 1), best_RW)
        self.lengths_RW = _take(torch.cat([self.lengths_RW, torch.full_like(tokens_RK, num_tokens)], 1), best_RW)
        self.is_finished_RW = _take(torch.cat([self.is_finished_RW, ends_RK], 1), best_RW)

        best_possible_R = self.running_scores_RW[:, 0] / num_tokens**decoding.length_penalty
        is_full_R = self.is_finished_RW.all(1)
        ended_R = is_full_R & (best_possible_R <= self.finished_scores_RW.amin(1)) | (self.limits_R1[:, 0] <= num_tokens)
        return sources_RW, ended_R | is_full_R if decoding.early_stopping else ended_R

    def finished(self, row: int) -> list[Generated]:
        """The prompt's finished hypotheses, the highest score first; fewer than `num_beams` where the vocabulary has no more beginnings."""
        generated, stops = [], set(self.stops.tolist())
        columns = (self.finished_RWT[row], self.lengths_RW[row], self.finished_scores_RW[row], self.is_finished_RW[row])
        for all_tokens, num_tokens, score, is_finished in zip(*(column.tolist() for column in columns), strict=True):
            logprob_sum = score * num_tokens**self.decoding.length_penalty if is_finished else LOWEST_SCORE
            if logprob_sum > LOWEST_SCORE / 2:
                tokens = all_tokens[:num_tokens]
                stopped = tokens[-1] in stops
                finish_reason: FinishReason = "stop" if stopped else "length"
                generated.append(Generated(tokens=tuple(tokens[:-1] if stopped else tokens), finish_reason=finish_reason, logprob_sum=logprob_sum))
        return generated

    def keep(self, order: Sequence[int]) -> None:
        """Keeps the prompts `order`, in that order."""
        index = torch.tensor(order, dtype=torch.long, device=self.limits_R1.device)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and value is not self.stops:
                setattr(self, name, value[index])


def beam_search(
    batch: Batch, prompts: Sequence[Sequence[int]], decoding: Decoding, limits: Sequence[int], stops: frozenset[int], device: torch.device
) -> list[list[Generated]]:
    """The hypotheses of each prompt, the best first; `limits` are the most tokens that each may get, at least 1."""
    tokens = [token for token in batch.admit(prompts) for _ in range(decoding.num_beams)]
    hypotheses = Hypotheses(len(prompts), decoding, limits, stops, device)
    rows = list(range(len(prompts)))
    generated: dict[int, list[Generated]] = {}
    while rows:
        sources_RW, ended_R = hypotheses.advance(batch.step(tokens))
        ended = ended_R.tolist()
        sources = [place * decoding.num_beams + beam for place, beams in enumerate(sources_RW.tolist()) for beam in beams]
        if sources != list(range(len(sources))):
            batch.reorder_slots(sources, hypotheses.num_steps)
        if any(ended):
            generated |= {row: hypotheses.finished(place) for place, row in enumerate(rows) if ended[place]}
            order = places_after([place for place, is_ended in enumerate(ended) if not is_ended])
            batch.rearrange(order)
            hypotheses.keep(order)
            rows = [rows[place] for place in order]
        tokens = hypotheses.running_RWT[:, :, hypotheses.num_steps - 1].flatten().tolist()
    return [generated[row] for row in range(len(prompts))]


def _take(values: Tensor, index_RK: Tensor) -> Tensor:
    """values[r, index[r, k]]."""
    return values[torch.arange(len(values), device=values.device)[:, None], index_RK]
