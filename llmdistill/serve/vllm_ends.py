"""Embedding and output head in vLLM, of every kind and tied or not.

Dense ones are vLLM's own. A low-rank or int8 embedding is our module as it is (models/low_rank_embedding.py, models/int8_embedding.py), and such a head is a
linear like others (vllm_linears.py). Where these two are one matrix in the checkpoint it is in memory twice here; a dense one is there once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding  # pyright: ignore[reportMissingImports]

from llmdistill.models.structure import install
from llmdistill.serve.vllm_linears import Linear, Plan, make_linears

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class Embedding(nn.Module):
    """Token ids to vectors."""

    def __init__(self, plan: Plan, num_tokens: int, width: int) -> None:
        super().__init__()
        self.num_tokens, self.is_dense = num_tokens, plan.kind(EMBEDDING) == "dense"
        self.of: Any = VocabParallelEmbedding(num_tokens, width, prefix=EMBEDDING) if self.is_dense else _ours(plan, num_tokens, width)

    def forward(self, token_N: Tensor) -> Tensor:
        return self.of(token_N)

    def places(self) -> Iterator[tuple[str, Tensor]]:
        if self.is_dense:
            yield f"{EMBEDDING}.weight", _rows(self.of, self.num_tokens)
            return
        for name, parameter in self.of.named_parameters():
            yield f"{EMBEDDING}.{name}", parameter.data


class Head(nn.Module):
    """Vectors to logits."""

    def __init__(self, plan: Plan, embedding: Embedding, num_tokens: int, width: int) -> None:
        super().__init__()
        self.num_tokens, self.is_dense = num_tokens, plan.kind(HEAD) == "dense"
        self.is_tied = self.is_dense and embedding.is_dense and plan.ties.get(f"{HEAD}.weight") == f"{EMBEDDING}.weight"
        if self.is_dense:
            head = ParallelLMHead(num_tokens, width, prefix=HEAD)
            self.of: Any = head.tie_weights(embedding.of) if self.is_tied else head
            self.logits = LogitsProcessor(num_tokens)
        else:
            self.of = make_linears(plan, [Linear(path=HEAD, inputs=width, outputs=num_tokens, bias=False)])

    def forward(self, hidden_NI: Tensor) -> Tensor:
        return self.logits(self.of, hidden_NI) if self.is_dense else self.of(hidden_NI)

    def places(self) -> Iterator[tuple[str, Tensor]]:
        if not self.is_dense:
            yield from self.of.places()
        elif not self.is_tied:
            yield f"{HEAD}.weight", _rows(self.of, self.num_tokens)


def _ours(plan: Plan, num_tokens: int, width: int) -> nn.Module:
    """Our embedding module of the structure's kind."""
    holder = nn.Module()
    holder.model = nn.Module()
    holder.model.embed_tokens = nn.Embedding(num_tokens, width)
    install(holder, {path: settings for path, settings in plan.structure.items() if path == EMBEDDING or path.startswith(f"{EMBEDDING}.")})
    return holder.get_submodule(EMBEDDING).requires_grad_(False)


def _rows(module: Any, num_tokens: int) -> Tensor:
    """The rows that tokens have; vLLM's matrices have more, which must not be noise."""
    with torch.no_grad():
        module.weight[num_tokens:] = 0
    return module.weight.data[:num_tokens]
