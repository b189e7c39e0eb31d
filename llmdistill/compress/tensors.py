"""Tucker and CP decompositions of a layer's attention weights, stacked over heads.

Heads of one attention resemble one another, and a tensor that has them as a mode can say so once. Source: TensorLLM (Gu et al. 2025, section III): W_q, W_k,
W_v and W_o of a layer, split into heads, as one tensor of model width, head width, matrix (4) and head, and a Tucker decomposition whose factor matrices all
heads share; CP in its place is the classic of Lebedev et al. 2015 for convolutions. Where we differ:
- Matrix and head are one mode, so that grouped-query attention, with fewer heads of k and v, is stacked like any other. TensorLLM cuts the matrix mode and
  never the head mode; here the least error decides which modes are cut.
- What is stacked (`Stack`) is by default what reads one tensor, so that the error can be that of the outputs (`Data.WHITENED`): the model width is multiplied
  by a root of the inputs' Gram matrix before, and by its inverse after. o reads head width and heads at once, so no mode of its tensor can be multiplied that
  way; as a matrix it can, and becomes a low-rank linear of as many parameters. (The nearest Kronecker product of two modes' matrices was tried for it: on
  SmolLM2's first three layers the outputs' error was two to eight times as large.)
- Every matrix is scaled to norm 1 before, and back after, so that what is least is the sum of their squared relative errors. In SmolLM2's first layer v has
  0.5% of the energy of q, k and v, and a decomposition of the weights as they are gives up its heads first: at 0.8 kept the loss was 8.2 nats, and so 1.6.
- The result runs in factorised form and is saved as such, where TensorLLM multiplies it out again.

Ranks are chosen under the parameters that are to be kept, for every tensor by itself (tensors_maths.py): Tucker's three by the least error of a HOSVD, CP's as
the largest that fits. A tensor that would not shrink stays dense, and its layers say so. A Tucker that cuts the model width only is a low-rank linear with a
shared inner projection, and becomes one.

What it gives (benchmarks/tensors.py: SmolLM2-135M, q, k, v and o of its first two layers, GSM8K, root mean square of the relative errors of their outputs on
held-out rows; 0.8, 0.6, 0.4 of the parameters kept). Whitened: SVD of each matrix 0.076, 0.110, 0.154; Tucker 0.035, 0.054, 0.088; CP 0.033, 0.057, 0.098.
Plain: 0.246, 0.307, 0.371; 0.210, 0.254, 0.363; 0.091, 0.152, 0.261. So CP is best where there are no rows to calibrate on; with rows Tucker is as good, in
seconds and not minutes. Parameters are not work: at 0.6 kept a token costs 0.6 of the dense products with SVD, 0.9 with Tucker, and 1.8 with CP.

Needs tensorly: pip install 'llmdistill[tensors]'.
"""

from __future__ import annotations

import enum
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration
    from llmdistill.compress.method import Applied


class Stack(enum.Enum):
    """Which matrices of an attention are one tensor."""

    INPUT = "those that read the same: q, k and v; in cross-attention k and v; the others each by themselves"
    LAYER = "q, k, v and the transposed o, as in TensorLLM"


class Data(enum.Enum):
    """Whose error is least."""

    PLAIN = "the weights'"
    WHITENED = "the outputs', on the calibration rows"


@dataclass(frozen=True, kw_only=True)
class Tucker:
    """`keep` is a share of the attention weights' parameters, or the ranks of model width, head width and heads (those above what a tensor has are lowered)."""

    kind: ClassVar[str] = "tucker"
    quantizes: ClassVar[bool] = False

    keep: float | tuple[int, int, int] = 0.5
    stack: Stack = Stack.INPUT
    data: Data = Data.WHITENED
    sweeps: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.keep, tuple) and (len(self.keep) != 3 or min(self.keep) < 1):
            raise ValueError(f"Tucker.keep is {self.keep}; give three ranks of 1 or more (model width, head width, heads), or a share such as 0.5")
        _check(self)

    def apply(self, model: PreTrainedModel, calibration: Calibration) -> Applied:
        """Every attention layer in turn; statistics, where any are taken, are those of the model as it was."""
        return _apply(self, model, calibration)


@dataclass(frozen=True, kw_only=True)
class CP:
    """`keep` is a share of the attention weights' parameters (0.5), or, as a whole number, the rank of every tensor."""

    kind: ClassVar[str] = "cp"
    quantizes: ClassVar[bool] = False

    keep: int | float = 0.5
    stack: Stack = Stack.INPUT
    data: Data = Data.WHITENED
    sweeps: int = 20

    def __post_init__(self) -> None:
        if isinstance(self.keep, int) and self.keep < 1:
            raise ValueError(f"CP.keep is {self.keep}; give a rank of 1 or more, or a share such as 0.5")
        _check(self)

    def apply(self, model: PreTrainedModel, calibration: Calibration) -> Applied:
        """Every attention layer in turn; statistics, where any are taken, are those of the model as it was."""
        return _apply(self, model, calibration)


def _check(method: Tucker | CP) -> None:
    name = type(method).__name__
    if isinstance(method.keep, float) and not 0 < method.keep < 1:
        raise ValueError(f"{name}.keep is {method.keep}; a share is above 0 and below 1")
    if method.sweeps < 0:
        raise ValueError(f"{name}.sweeps is {method.sweeps}; give 0 or more")
    if method.stack is Stack.LAYER and method.data is Data.WHITENED:
        raise ValueError(f"{name} cannot whiten a stack of a whole layer, since o does not read what q reads: use stack=INPUT or data=PLAIN")


def _apply(method: Tucker | CP, model: PreTrainedModel, calibration: Calibration) -> Applied:
    if importlib.util.find_spec("tensorly") is None:
        raise ValueError(f"{method.kind} needs tensorly, which is not installed: pip install 'llmdistill[tensors]'")
    from llmdistill.compress.tensors_apply import apply

    return apply(method, model, calibration)
