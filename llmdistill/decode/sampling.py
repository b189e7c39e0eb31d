"""The next token of each row: the likeliest, or one drawn from what temperature, top-k and top-p leave.

The filters are those of transformers (generation/logits_process.py: TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, in this order, on float32
logits). The draw differs: one uniform number a token, taken from the row's own generator and looked up in the cumulated probabilities, where transformers
draws all rows of a batch from one global generator. So a row's tokens do not depend on its neighbours.

Shapes: B rows, V vocabulary, K rows that share their settings.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from llmdistill.decode.decoding import Decoding

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

BLOCK = 128


def row_generator(seed: int, prompt: Sequence[int]) -> random.Random:
    """A generator of its own for each seed and prompt."""
    text = f"{seed}:{','.join(map(str, prompt))}"
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))


def filter_logits(logits_BV: Float[Tensor, "B V"], decoding: Decoding) -> Float[Tensor, "B V"]:
    """Logits over temperature, minus infinity where top-k or top-p drop the token; shifted so that each row's largest is 0."""
    # The shift changes no probability and keeps the quotient finite for any temperature.
    scores_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(decoding.temperature, 1e-30)
    if 0 < decoding.top_k < scores_BV.shape[-1]:
        least_B1 = scores_BV.topk(decoding.top_k).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -torch.inf)
    if decoding.top_p < 1:
        ascending_BV, order_BV = scores_BV.sort(descending=False)
        dropped_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - decoding.top_p
        dropped_BV[:, -1] = False
        scores_BV = scores_BV.masked_fill(dropped_BV.scatter(1, order_BV, dropped_BV), -torch.inf)
    return scores_BV


def draw(scores_BV: Float[Tensor, "B V"], uniforms: Sequence[float]) -> Int[Tensor, " B"]:
    """The token whose share of [0, 1) holds the row's number; a token of probability 0 has no share."""
    cumulated_BV = scores_BV.double().softmax(-1).cumsum(-1)
    total_B1 = cumulated_BV[:, -1:]
    places_B1 = torch.tensor(uniforms, dtype=torch.float64, device=scores_BV.device)[:, None] * total_B1
    places_B1 = torch.minimum(places_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulated_BV, places_B1, right=True)[:, 0]


def likeliest(logits_BV: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
    """argmax: of the blocks' maxima, then in the best block. By itself it takes ten times as long on a CPU, where nothing vectorises it."""
    num_blocks = logits_BV.shape[-1] // BLOCK
    if logits_BV.device.type != "cpu" or num_blocks < 2:
        return logits_BV.argmax(-1)
    blocked_BV, rest_BV = logits_BV.split([num_blocks * BLOCK, logits_BV.shape[-1] - num_blocks * BLOCK], -1)
    blocks = blocked_BV.unflatten(-1, (num_blocks, BLOCK))
    largest = blocks.amax(-1)
    best_B = largest.argmax(-1)
    rows_B = torch.arange(len(logits_BV))
    tokens_B = best_B * BLOCK + blocks[rows_B, best_B].argmax(-1)
    if not rest_BV.shape[-1]:
        return tokens_B
    # A row with NaN has NaN as its largest, here as in argmax, and `choose` refuses it.
    return torch.where(rest_BV.amax(-1) > largest[rows_B, best_B], num_blocks * BLOCK + rest_BV.argmax(-1), tokens_B)


def choose(logits_BV: Float[Tensor, "B V"], decodings: Sequence[Decoding], generators: Sequence[random.Random]) -> tuple[list[int], list[float]]:
    """The next token of every row and the model's log-probability of it."""
    logits_BV = logits_BV.float()  # as transformers does, so that ties are broken alike
    tokens_B = likeliest(logits_BV)
    rows_by_filter: dict[tuple[float, int, float], list[int]] = defaultdict(list)
    for row, decoding in enumerate(decodings):
        if decoding.temperature > 0:
            rows_by_filter[decoding.temperature, decoding.top_k, decoding.top_p].append(row)
    for rows in rows_by_filter.values():
        index_K = torch.tensor(rows, device=logits_BV.device)
        scores_KV = filter_logits(logits_BV[index_K], decodings[rows[0]])
        tokens_B[index_K] = draw(scores_KV, [generators[row].random() for row in rows])
    # log_softmax is one vectorised pass; logsumexp takes twenty times as long on a CPU.
    logprobs = logits_BV.log_softmax(-1).gather(1, tokens_B[:, None])[:, 0].tolist()
    for row, logprob in enumerate(logprobs):
        if logprob != logprob:
            raise FloatingPointError(f"the logits of row {row} of {len(logprobs)} are not finite; check the weights, or load the model in a wider dtype")
    return tokens_B.tolist(), logprobs
