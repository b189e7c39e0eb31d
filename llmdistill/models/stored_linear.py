"""A linear whose weight is stored in few bits and made ordinary whenever it is used: for the disk and the memory, not for speed.

Shapes: B L rows, I inputs, O outputs, G blocks = ceil(I / 32) or 1, J bytes of a row.

    weight_OI = value(code_OI) * scale_OG

The codes are of one of the elements of number_formats.py. The scale is a power of two shared by 32 neighbouring inputs, kept as its exponent in a byte
(block scaling: with e2m1 this is MXFP4, with e4m3 MXFP8, with int8 MXINT8), or a float32 for each output (channel scaling). Everything but the float32 scale
is uint8 in the file, so no cast of the model can change it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdistill.models.fixed_dtypes import keeping_dtypes
from llmdistill.models.kind import Settings
from llmdistill.models.number_formats import BLOCK_SIZE, ELEMENTS, num_bytes, pack, shared_scales_V, unpack, values_V

Scaling: TypeAlias = Literal["block", "channel"]


class StoredLinear(nn.Module):
    """Weight-only, dequantized when used."""

    kind: ClassVar[str] = "stored"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        element: str,
        scaling: str,
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if element not in ELEMENTS or scaling not in ("block", "channel"):
            raise ValueError(f"the element is {element!r} and the scaling {scaling!r}; use one of {', '.join(ELEMENTS)}, and block or channel")
        self.in_features, self.out_features, self.element, self.scaling = in_features, out_features, element, scaling
        num_blocks, scale_dtype = (-(-in_features // BLOCK_SIZE), torch.uint8) if scaling == "block" else (1, torch.float32)
        shape = (out_features, num_bytes(in_features, ELEMENTS[element].bits))
        self.packed_OJ = nn.Parameter(torch.zeros(shape, dtype=torch.uint8, device=device), requires_grad=False)
        self.scale_OG = nn.Parameter(torch.zeros(out_features, num_blocks, dtype=scale_dtype, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_settings(cls, settings: Settings, replaced: nn.Module) -> Self:
        """An empty one in place of a linear, with its sizes, bias, dtype (of the bias) and device."""
        if not isinstance(replaced, nn.Linear):
            raise ValueError(f"a stored module replaces a linear, and this is a {type(replaced).__name__}")
        if set(settings) != {"element", "scaling"}:
            raise ValueError(f"the settings of a stored module are {{'element': str, 'scaling': str}}, and these are {dict(settings)}")
        weight, has_bias = replaced.weight, replaced.bias is not None
        names = str(settings["element"]), str(settings["scaling"])
        return cls(replaced.in_features, replaced.out_features, *names, bias=has_bias, dtype=weight.dtype, device=weight.device)

    @classmethod
    def from_codes(cls, code_OI: Tensor, scale_OG: Tensor, bias_O: Tensor | None, *, element: str) -> Self:
        """From codes (uint8) and their scales: biased exponents in uint8 by block, or float32 by channel."""
        scaling = "block" if scale_OG.dtype == torch.uint8 else "channel"
        dtype = None if bias_O is None else bias_O.dtype
        module = cls(code_OI.shape[1], code_OI.shape[0], element, scaling, bias=bias_O is not None, dtype=dtype, device=code_OI.device)
        with torch.no_grad():
            module.packed_OJ.copy_(pack(code_OI, ELEMENTS[element].bits))
            module.scale_OG.copy_(scale_OG)
            if bias_O is not None and module.bias is not None:
                module.bias.copy_(bias_O)
        return module

    def settings(self) -> Mapping[str, str]:
        """What config.json says of it; the sizes are the replaced linear's."""
        return {"element": self.element, "scaling": self.scaling}

    @property
    def weight(self) -> None:
        """There is none to look at. transformers' T5 asks `wo.weight` which dtype to cast its input to, and no tensor means: leave it as it is."""

    def dequantized_OI(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for. In float32 and float64 block scaling is exact; others are rounded from float32."""
        wide = torch.promote_types(dtype, torch.float32)
        code_OI = unpack(self.packed_OJ, ELEMENTS[self.element].bits, self.in_features)
        value_OI = values_V(self.element).to(code_OI.device, wide)[code_OI.int()]
        if self.scaling == "channel":
            return (value_OI * self.scale_OG.to(wide)).to(dtype)
        scale_OG = shared_scales_V().to(code_OI.device, wide)[self.scale_OG.int()]
        return (value_OI * scale_OG.repeat_interleave(BLOCK_SIZE, 1)[:, : self.in_features]).to(dtype)

    def forward(self, hidden_BLI: Tensor) -> Tensor:
        return F.linear(hidden_BLI, self.dequantized_OI(hidden_BLI.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, element={self.element}, scaling={self.scaling}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keeping_dtypes(fn, self.bias), recurse)
