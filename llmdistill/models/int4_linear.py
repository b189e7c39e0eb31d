"""A linear whose weight is 4 bits a number, with a scale and a zero for each group of neighbouring inputs.

Shapes: B L rows, I inputs, O outputs, G groups = ceil(I / group_size), J bytes of a row = ceil(I / 2), M rows of a product.

    weight_OI = (code_OI - 8) * scale_OG + zero_OG        code 0 to 15; scale and zero bfloat16, each for the group that the input is in

Two codes are a byte, the even input in the low half. The last group may be short. With groups of 32 that is 5 bits a weight, with 128 it is 4.25.

This is the form that torch's kernel for CPUs multiplies with (aten::_weight_int4pack_mm_for_cpu), which is why the zero is a weight and no code, and the
scales are bfloat16. The kernel wants the codes in an order that depends on the machine's vector width, so the checkpoint keeps ours, and the kernel's is made
at first use and held beside it.

Which way a product takes is decided in one place, `runs_packed`. Measured on 2 threads of an AVX-512 machine, microseconds for 512 inputs, 2048 outputs and
1 / 16 / 64 / 256 rows: dense float32 89/300/850/3666, dense bfloat16 93/170/400/1300, the kernel in bfloat16 34/198/790/3100, the kernel in float32
6700/32000/111000/432000 (it is not vectorised), dequantized first 550/840/1400/4300. So with few rows the kernel is used, always in bfloat16; with more
the weight is dequantized and multiplied. A float32 input is rounded to bfloat16 for the kernel: a relative 2^-9, where the codes are off by a twelfth or so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdistill.models.fixed_dtypes import keeping_dtypes
from llmdistill.models.kind import Settings

GROUP_SIZES = (32, 64, 128)
MIDDLE = 8
MAX_PACKED_ROWS = 64  # beyond that, dequantizing costs less than the kernel loses
OUTPUTS_OF_A_TILE = 16
INNER_K_TILES = 2  # the CPU's layout does not depend on it, but the operator checks it


class Int4Linear(nn.Module):
    """Weight-only: activations stay in the model's dtype."""

    kind: ClassVar[str] = "int4"

    def __init__(
        self, in_features: int, out_features: int, group_size: int, *, bias: bool, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if group_size not in GROUP_SIZES:
            raise ValueError(f"group_size is {group_size}; the kernel has groups of {', '.join(map(str, GROUP_SIZES))} inputs")
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        num_groups, num_bytes = -(-in_features // group_size), -(-in_features // 2)
        self.packed_OJ = nn.Parameter(torch.zeros(out_features, num_bytes, dtype=torch.uint8, device=device), requires_grad=False)
        self.scale_OG = nn.Parameter(torch.zeros(out_features, num_groups, dtype=torch.bfloat16, device=device), requires_grad=False)
        self.zero_OG = nn.Parameter(torch.zeros(out_features, num_groups, dtype=torch.bfloat16, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self._for_kernel: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_settings(cls, settings: Settings, replaced: nn.Module) -> Self:
        """An empty one in place of a linear, with its sizes, bias, dtype (of the bias) and device."""
        if not isinstance(replaced, nn.Linear):
            raise ValueError(f"an int4 module replaces a linear, and this is a {type(replaced).__name__}")
        group_size = settings.get("group_size")
        if not isinstance(group_size, int) or set(settings) != {"group_size"}:
            raise ValueError(f"the settings of an int4 module are {{'group_size': int}}, and these are {dict(settings)}")
        weight = replaced.weight
        return cls(replaced.in_features, replaced.out_features, group_size, bias=replaced.bias is not None, dtype=weight.dtype, device=weight.device)

    @classmethod
    def from_codes(cls, code_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, bias_O: Tensor | None, *, group_size: int) -> Self:
        """From codes 0 to 15; scales and zeros are rounded to bfloat16, which their maker should have reckoned with."""
        (num_outputs, num_inputs), dtype = code_OI.shape, None if bias_O is None else bias_O.dtype
        module = cls(num_inputs, num_outputs, group_size, bias=bias_O is not None, dtype=dtype, device=code_OI.device)
        code_OI = F.pad(code_OI.to(torch.uint8), (0, num_inputs % 2))
        with torch.no_grad():
            module.packed_OJ.copy_(code_OI[:, 0::2] | (code_OI[:, 1::2] << 4))
            module.scale_OG.copy_(scale_OG)
            module.zero_OG.copy_(zero_OG)
            if bias_O is not None and module.bias is not None:
                module.bias.copy_(bias_O)
        return module

    def settings(self) -> Mapping[str, int]:
        """What config.json says of it; the sizes are the replaced linear's."""
        return {"group_size": self.group_size}

    @property
    def weight(self) -> None:
        """There is none to look at. transformers' T5 asks `wo.weight` which dtype to cast its input to, and no tensor means: leave it as it is."""

    def dequantized_OI(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for, reckoned in float32 or above."""
        wide = torch.promote_types(dtype, torch.float32)
        code_OGS = self._code_OI(self._padded_inputs).to(wide).sub_(MIDDLE).unflatten(1, (-1, self.group_size))
        weight_OGS = torch.addcmul(self.zero_OG.to(wide)[..., None], code_OGS, self.scale_OG.to(wide)[..., None])
        return weight_OGS.flatten(1)[:, : self.in_features].to(dtype)

    def forward(self, hidden_BLI: Tensor) -> Tensor:
        if runs_packed(hidden_BLI):
            output_BLO = self._packed_product(hidden_BLI)
            return output_BLO if self.bias is None else output_BLO + self.bias
        return F.linear(hidden_BLI, self.dequantized_OI(hidden_BLI.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}, bias={self.bias is not None}"

    @property
    def _padded_inputs(self) -> int:
        return self.scale_OG.shape[1] * self.group_size

    def _code_OI(self, num_inputs: int) -> Tensor:
        """The codes in their order, filled up to this number of inputs."""
        code_OI = torch.stack([self.packed_OJ & 15, self.packed_OJ >> 4], -1).flatten(1)
        return F.pad(code_OI, (0, num_inputs - code_OI.shape[1]))

    def _packed_product(self, hidden_BLI: Tensor) -> Tensor:
        """Through the kernel. Inputs and outputs that its tiles lack are filled up with zeros."""
        if self._for_kernel is None:
            missing = -self.out_features % OUTPUTS_OF_A_TILE
            code_OI = F.pad(self._code_OI(self._padded_inputs), (0, 0, 0, missing)).to(torch.int32)
            scale_and_zero_OG2 = F.pad(torch.stack([self.scale_OG, self.zero_OG], -1), (0, 0, 0, 0, 0, missing))
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(code_OI, INNER_K_TILES)
            self._for_kernel = packed, scale_and_zero_OG2.transpose(0, 1).contiguous()
        packed, scale_and_zero_GO2 = self._for_kernel
        rows_MI = F.pad(hidden_BLI.reshape(-1, self.in_features).to(torch.bfloat16), (0, self._padded_inputs - self.in_features)).contiguous()
        output_MO = torch.ops.aten._weight_int4pack_mm_for_cpu(rows_MI, packed, self.group_size, scale_and_zero_GO2)
        return output_MO[:, : self.out_features].unflatten(0, hidden_BLI.shape[:-1]).to(hidden_BLI.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._for_kernel = None
        return super()._apply(keeping_dtypes(fn, self.bias), recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._for_kernel = None
        super()._load_from_state_dict(*args, **kwargs)


def runs_packed(hidden_BLI: Tensor) -> bool:
    """Whether this product goes through torch's int4 kernel (see the module's text). It has no gradient, and is only for CPUs; float64 asks to be exact."""
    if hidden_BLI.device.type != "cpu" or hidden_BLI.dtype not in (torch.float32, torch.bfloat16) or (torch.is_grad_enabled() and hidden_BLI.requires_grad):
        return False
    return 0 < hidden_BLI.numel() <= MAX_PACKED_ROWS * hidden_BLI.shape[-1]
