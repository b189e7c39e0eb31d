"""An embedding in 8-bit integers, with a scale for each token.

Shapes: V vocabulary, D model width.

Where the output head was the same matrix it stays so: an Int8Linear whose weight and scale are these parameters (a token is an output of the head). T5 has
the embedding in three places, which share them too. Integers do not say in what dtype the model computes, so the module remembers it, and `to` changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdistill.models.fixed_dtypes import keeping_dtypes
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.int8_product import quantize_weight
from llmdistill.models.kind import Settings


class Int8Embedding(nn.Module):
    """Row v is weight[v] * scale[v], in the model's dtype."""

    kind: ClassVar[str] = "int8_embedding"

    def __init__(self, num_embeddings: int, embedding_dim: int, *, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.weight = nn.Parameter(torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device), requires_grad=False)
        self.scale_O = nn.Parameter(torch.ones(num_embeddings, dtype=torch.float32, device=device), requires_grad=False)

    @classmethod
    def from_settings(cls, settings: Settings, replaced: nn.Module) -> Self:
        """An empty one in place of an embedding of the stock model, with its sizes, dtype (of the rows that it gives) and device."""
        if not isinstance(replaced, nn.Embedding):
            raise ValueError(f"an int8_embedding module replaces an embedding, and this is a {type(replaced).__name__}")
        if settings:
            raise ValueError(f"an int8_embedding module has no settings, and these are {dict(settings)}")
        return cls(replaced.num_embeddings, replaced.embedding_dim, dtype=replaced.weight.dtype, device=replaced.weight.device)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Self:
        """Rounded to the nearest of 255 steps for each token."""
        weight = embedding.weight
        module = cls(*weight.shape, dtype=weight.dtype, device=weight.device)
        weight_VD, scale_V = quantize_weight(weight)
        with torch.no_grad():
            module.weight.copy_(weight_VD)
            module.scale_O.copy_(scale_V)
        return module

    def settings(self) -> Mapping[str, int]:
        """Nothing: the sizes are the replaced embedding's."""
        return {}

    def head(self, bias_V: Tensor | None = None) -> Int8Linear:
        """The linear of the same matrix, which shares weight and scale with this embedding."""
        head = Int8Linear(self.embedding_dim, self.num_embeddings, bias=bias_V is not None, dtype=self.dtype, device=self.weight.device)
        head.weight, head.scale_O = self.weight, self.scale_O
        if bias_V is not None and head.bias is not None:
            with torch.no_grad():
                head.bias.copy_(bias_V)
        return head

    def forward(self, token_BL: Tensor) -> Tensor:
        scale_BL1 = F.embedding(token_BL, self.scale_O[:, None])
        return (F.embedding(token_BL, self.weight) * scale_BL1).to(self.dtype)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(keeping_dtypes(fn, None), recurse)
