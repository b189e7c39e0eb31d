"""A linear in 8-bit integers: weight int8 with a scale for each output, inputs quantized token by token as they come, multiplied as integers.

Shapes: B L rows, I inputs, O outputs.

How the product is computed is decided in int8_product.py. The result has the dtype of the input. The weight may be that of an Int8Embedding or of another
linear too: both are parameters, so a tie is kept as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from llmdistill.models.fixed_dtypes import keeping_dtypes
from llmdistill.models.int8_product import product, quantize_weight
from llmdistill.models.kind import Settings


class Int8Linear(nn.Module):
    """y = (round(x / s_x) @ w^T) * s_x * scale + bias."""

    kind: ClassVar[str] = "int8"

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.int8, device=device), requires_grad=False)
        self.scale_O = nn.Parameter(torch.ones(out_features, dtype=torch.float32, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_settings(cls, settings: Settings, replaced: nn.Module) -> Self:
        """An empty one in place of a linear, with its sizes, bias, dtype (of the bias) and device."""
        if not isinstance(replaced, nn.Linear):
            raise ValueError(f"an int8 module replaces a linear, and this is a {type(replaced).__name__}")
        if settings:
            raise ValueError(f"an int8 module has no settings, and these are {dict(settings)}")
        weight = replaced.weight
        return cls(replaced.in_features, replaced.out_features, bias=replaced.bias is not None, dtype=weight.dtype, device=weight.device)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Rounded to the nearest of 255 steps for each output."""
        return cls.from_integers(*quantize_weight(linear.weight), None if linear.bias is None else linear.bias.detach())

    @classmethod
    def from_integers(cls, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Self:
        """From integers -127 to 127 and the scale of each output."""
        dtype = None if bias_O is None else bias_O.dtype
        module = cls(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, dtype=dtype, device=weight_OI.device)
        with torch.no_grad():
            module.weight.copy_(weight_OI)
            module.scale_O.copy_(scale_O)
            if module.bias is not None and bias_O is not None:
                module.bias.copy_(bias_O)
        return module

    def settings(self) -> Mapping[str, int]:
        """Nothing: the sizes are the replaced linear's."""
        return {}

    def dequantized_OI(self, dtype: torch.dtype) -> Tensor:
        """The weight that the integers stand for."""
        return (self.weight.float() * self.scale_O[:, None]).to(dtype)

    def forward(self, hidden_BLI: Tensor) -> Tensor:
        output_BLO = product(hidden_BLI.reshape(-1, self.in_features), self.weight, self.scale_O).view(*hidden_BLI.shape[:-1], self.out_features)
        if self.bias is not None:
            output_BLO += self.bias
        return output_BLO.to(hidden_BLI.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keeping_dtypes(fn, self.bias), recurse)
