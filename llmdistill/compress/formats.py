"""Storage formats: weights in 4, 6 or 8 bits a number, made ordinary again when they are used.

BlockFloat is block floating point: 32 neighbouring weights share a power of two, as the OCP Microscaling (MX) specification v1.0 has it, so the files' codes
and exponents are MXFP4, MXFP6, MXFP8 or MXINT8. LowBitFloat is a small float with a float32 scale for each output. What each costs in accuracy is measured
(benchmarks/formats.py) and told by layer; what they save is bytes, not time.

No torch at import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmdistill.compress.int4 import check_max_loss_rise

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration
    from llmdistill.compress.method import Applied

FLOATS = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")


@dataclass(frozen=True, kw_only=True)
class BlockFloat:
    """32 weights and one shared exponent: 4.25 bits a weight with e2m1, 6.25 with e2m3 and e3m2, 8.25 with e4m3, e5m2 and int8."""

    kind: ClassVar[str] = "block_float"
    quantizes: ClassVar[bool] = True

    element: Literal["e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "int8"] = "e4m3"
    search: bool = True
    """Choose between the exponent of the specification and the one above by the squared error."""
    head: bool = False
    """The output head too; where it is the embedding as well, it stays."""
    keep: tuple[str, ...] = ()
    """Paths of linears that are left as they are; * stands for anything."""
    max_loss_rise: float = 0.1
    """Nats by which the held-out loss may rise; the most sensitive layers are kept as they are where it would rise by more."""

    def __post_init__(self) -> None:
        if self.element not in (*FLOATS, "int8"):
            raise ValueError(f"BlockFloat.element is {self.element!r}; use one of {', '.join(FLOATS)}, int8")
        check_max_loss_rise("BlockFloat", self.max_loss_rise)

    def apply(self, model: PreTrainedModel, calibration: Calibration) -> Applied:
        """Store the linears; the sensitive ones are kept."""
        from llmdistill.compress.formats_maths import by_block

        return _store(self, model, calibration, lambda weight_OI: by_block(weight_OI, self.element, search=self.search))


@dataclass(frozen=True, kw_only=True)
class LowBitFloat:
    """A float of 4, 6 or 8 bits and one float32 scale for each output."""

    kind: ClassVar[str] = "low_bit_float"
    quantizes: ClassVar[bool] = True

    element: Literal["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"] = "e4m3"
    head: bool = False
    """The output head too; where it is the embedding as well, it stays."""
    keep: tuple[str, ...] = ()
    """Paths of linears that are left as they are; * stands for anything."""
    max_loss_rise: float = 0.1
    """Nats by which the held-out loss may rise; the most sensitive layers are kept as they are where it would rise by more."""

    def __post_init__(self) -> None:
        if self.element not in FLOATS:
            raise ValueError(f"LowBitFloat.element is {self.element!r}; use one of {', '.join(FLOATS)}")
        check_max_loss_rise("LowBitFloat", self.max_loss_rise)

    def apply(self, model: PreTrainedModel, calibration: Calibration) -> Applied:
        """Store the linears; the sensitive ones are kept."""
        from llmdistill.compress.formats_maths import by_channel

        return _store(self, model, calibration, lambda weight_OI: by_channel(weight_OI, self.element))


def _store(method: BlockFloat | LowBitFloat, model: PreTrainedModel, calibration: Calibration, encode: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Applied:
    from llmdistill.compress.weight_only import quantize_linears
    from llmdistill.models.stored_linear import StoredLinear

    def make(linear: nn.Linear, _: Tensor) -> Any:
        bias_O = None if linear.bias is None else linear.bias.detach()
        return StoredLinear.from_codes(*encode(linear.weight), bias_O, element=method.element)

    return quantize_linears(model, calibration, make, kind=StoredLinear.kind, head=method.head, keep=method.keep, max_loss_rise=method.max_loss_rise)
