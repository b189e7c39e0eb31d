"""A linear as the product of two: y = up(down(x)), with R inner channels in place of a full matrix.

Shapes: I inputs, O outputs, R rank. A dense linear holds O*I numbers, this one R*(O+I): fewer where R < O*I/(O+I).

This is the module alone, the first kind that `structure` knows. How the factors are found is the business of the methods that make them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from llmdistill.models.kind import Settings


class LowRankLinear(nn.Module):
    """down: I to R without bias, then up: R to O with the replaced linear's bias if it had one."""

    kind: ClassVar[str] = "low_rank"

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if rank < 1 or rank > in_features:  # it may be above the outputs where several linears share a down-projection (grouped-query k and v)
            raise ValueError(f"rank is {rank}: a linear of {in_features} inputs and {out_features} outputs, shared or not, has ranks 1 to {in_features}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, dtype=dtype, device=device)
        self.up = nn.Linear(rank, out_features, bias=bias, dtype=dtype, device=device)

    @classmethod
    def from_settings(cls, settings: Settings, replaced: nn.Module) -> Self:
        """An empty one in place of a linear of the stock model, with its sizes, bias, dtype and device."""
        if not isinstance(replaced, nn.Linear):
            raise ValueError(f"a low_rank module replaces a linear, and this is a {type(replaced).__name__}")
        rank = settings.get("rank")
        if not isinstance(rank, int) or set(settings) != {"rank"}:
            raise ValueError(f"the settings of a low_rank module are {{'rank': int}}, and these are {dict(settings)}")
        weight = replaced.weight
        return cls(replaced.in_features, replaced.out_features, rank, bias=replaced.bias is not None, dtype=weight.dtype, device=weight.device)

    @classmethod
    def from_factors(cls, up_OR: Tensor, down_RI: Tensor, bias_O: Tensor | None) -> Self:
        """The linear whose weight is up_OR @ down_RI, in the factors' dtype and on their device."""
        module = cls(down_RI.shape[1], up_OR.shape[0], down_RI.shape[0], bias=bias_O is not None, dtype=up_OR.dtype, device=up_OR.device)
        with torch.no_grad():
            module.up.weight.copy_(up_OR)
            module.down.weight.copy_(down_RI)
            if bias_O is not None:
                module.up.bias.copy_(bias_O)
        return module

    def settings(self) -> Mapping[str, int]:
        """What config.json says of it; the sizes are the replaced linear's."""
        return {"rank": self.rank}

    @property
    def weight(self) -> Tensor:
        """The factor that reads the input. There is no dense weight; transformers' T5 asks `wo.weight` which dtype to hand over, and this is the answer."""
        return self.down.weight

    def forward(self, hidden_BLI: Tensor) -> Tensor:
        return self.up(self.down(hidden_BLI))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
