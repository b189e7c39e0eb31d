"""Int4: weights in 4 bits, with a scale and a zero for each group of neighbouring inputs; activations stay as they are.

How the codes are chosen is in int4_maths.py, how they are multiplied in models/int4_linear.py. Asymmetric (a zero beside the scale), since at equal bytes it
is the better half of the choice: at 4.5 bits a weight, groups of 64 with a zero leave 8.7% of SmolLM2-135M's weights as error (root mean square) and groups of
32 without one 9.1%; on Gaussian weights it is 8.4% and 8.7%.

No torch at import.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration
    from llmdistill.compress.method import Applied


@dataclass(frozen=True, kw_only=True)
class Int4:
    """Group-wise weight-only quantization to 4 bits: 5, 4.5 or 4.25 bits a weight with groups of 32, 64 or 128, scales included."""

    kind: ClassVar[str] = "int4"
    quantizes: ClassVar[bool] = True

    group_size: Literal[32, 64, 128] = 32
    head: bool = False
    """The output head too; where it is the embedding as well, it stays."""
    keep: tuple[str, ...] = ()
    """Paths of linears that are left as they are; * stands for anything."""
    max_loss_rise: float = 0.1
    """Nats by which the held-out loss may rise; the most sensitive layers are kept as they are where it would rise by more."""

    def __post_init__(self) -> None:
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"Int4.group_size is {self.group_size}; use 32, 64 or 128")
        check_max_loss_rise("Int4", self.max_loss_rise)

    def apply(self, model: PreTrainedModel, calibration: Calibration) -> Applied:
        """Replace the linears; the sensitive ones are kept."""
        from llmdistill.compress.int4_maths import quantize
        from llmdistill.compress.weight_only import quantize_linears
        from llmdistill.models.int4_linear import Int4Linear

        def make(linear: nn.Linear, mean_square_I: Tensor) -> Any:
            code_OI, scale_OG, zero_OG = quantize(linear.weight, mean_square_I, self.group_size)
            bias_O = None if linear.bias is None else linear.bias.detach()
            return Int4Linear.from_codes(code_OI, scale_OG, zero_OG, bias_O, group_size=self.group_size)

        return quantize_linears(model, calibration, make, kind=self.kind, head=self.head, keep=self.keep, max_loss_rise=self.max_loss_rise)


def check_max_loss_rise(name: str, value: float) -> None:
    """For every method that keeps sensitive layers."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}.max_loss_rise is {value}; give the nats by which the held-out loss may rise, 0 or more")
