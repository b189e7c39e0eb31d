"""An embedding as the product of two: a table of R numbers for each token, and one projection to the model's width.

Shapes: V vocabulary, D model width, R rank. A dense embedding holds V*D numbers, this one R*(V+D).

Where embedding and head were one matrix they stay one: the head is then a LowRankLinear whose `up.weight` is the table and whose `down.weight` is the
projection, both the same nn.Parameter (structure.py reads that off the model). That is why the projection is stored as (R, D). The table is an embedding by
itself, so that it can become int8 with the head's `up`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from llmdistill.models.low_rank_linear import LowRankLinear

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float, Int

    from llmdistill.models.kind import Settings


class LowRankEmbedding(nn.Module):
    """Row v is table.weight[v] @ project_RD."""

    kind: ClassVar[str] = "low_rank_embedding"

    def __init__(
        self, num_embeddings: int, embedding_dim: int, rank: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if rank < 1 or rank > min(num_embeddings, embedding_dim):
            raise ValueError(
                f"rank is {rank}: an embedding of {num_embeddings} tokens and width {embedding_dim} has ranks 1 to {min(num_embeddings, embedding_dim)}"
            )
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.table = nn.Embedding(num_embeddings, rank, dtype=dtype, device=device)
        self.project_RD = nn.Parameter(torch.empty(rank, embedding_dim, dtype=dtype, device=device))

    @classmethod
    def from_settings(cls, settings: Settings, replaced: nn.Module) -> Self:
        """An empty one in place of an embedding of the stock model, with its sizes, dtype and device."""
        if not isinstance(replaced, nn.Embedding):
            raise ValueError(f"a low_rank_embedding module replaces an embedding, and this is a {type(replaced).__name__}")
        rank = settings.get("rank")
        if not isinstance(rank, int) or set(settings) != {"rank"}:
            raise ValueError(f"the settings of a low_rank_embedding module are {{'rank': int}}, and these are {dict(settings)}")
        weight = replaced.weight
        return cls(replaced.num_embeddings, replaced.embedding_dim, rank, dtype=weight.dtype, device=weight.device)

    @classmethod
    def from_factors(cls, table_VR: Float[Tensor, "V R"], project_RD: Float[Tensor, "R D"]) -> Self:
        """The embedding whose matrix is table_VR @ project_RD, in the factors' dtype and on their device."""
        module = cls(table_VR.shape[0], project_RD.shape[1], table_VR.shape[1], dtype=table_VR.dtype, device=table_VR.device)
        with torch.no_grad():
            module.table.weight.copy_(table_VR)
            module.project_RD.copy_(project_RD)
        return module

    def settings(self) -> Mapping[str, int]:
        """What config.json says of it; the sizes are the replaced embedding's."""
        return {"rank": self.rank}

    def head(self, bias_V: Tensor | None = None) -> LowRankLinear:
        """The linear of the same matrix, which shares both factors with this embedding."""
        dtype, device = self.project_RD.dtype, self.project_RD.device
        head = LowRankLinear(self.embedding_dim, self.num_embeddings, self.rank, bias=bias_V is not None, dtype=dtype, device=device)
        head.up.weight, head.down.weight = self.table.weight, self.project_RD
        if bias_V is not None:
            with torch.no_grad():
                head.up.bias.copy_(bias_V)
        return head

    @property
    def weight(self) -> Tensor:
        """The projection, for those who ask an embedding's weight for its dtype or device. There is no dense weight."""
        return self.project_RD

    def forward(self, token_BL: Int[Tensor, "*B L"]) -> Float[Tensor, "*B L D"]:
        return self.table(token_BL) @ self.project_RD

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, rank={self.rank}"
