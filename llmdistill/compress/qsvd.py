"""QSVD: one decomposition of the query, key and value weights of an attention, which read the same input, with one shared down-projection.

Source: Wang et al. 2025, "QSVD: Efficient Low-Rank Approximation for Unified Query-Key-Value Weight Compression in Low-Precision Vision-Language Models",
section 3. The weights are stacked to W = [W_q; W_k; W_v], and their rank R costs R * (I + O_q + O_k + O_v) parameters: for square ones 4RI, where factors of
their own would take 6RI. In the model each of the three is a low-rank linear, and their `down.weight` is one and the same parameter.

- Importance. A singular value counts what it does to the loss: I_i = mean over rows n of (sigma_i * dL_n/dsigma_i)^2 (qsvd_maths.py derives it). One ranking
  over all layers under one budget says which are kept; those of a layer need not be its largest. L_n is the row's loss in the source, as with Importance.LOSS
  here; by default it is what the model says there (answers_loss.py), since students are compressed on rows that they know by heart.
- Exponent. sigma^beta goes into the down-projection and sigma^(1 - beta) into the up-projections, which changes nothing until they are quantized.
- Rotation. Between the factors, an orthogonal matrix and its inverse change nothing either, and spread outliers of the latent over its channels.

Where we differ: the decomposition is whitened by the inputs' Gram matrix (low_rank_maths.py) where QSVD scales channels as ASVD does, which Data.ACTIVATION
does here; outputs count as much as the loss sees of them, since what is stacked is otherwise compared by its size alone; a layer whose rank comes to
break-even stays dense and takes part in the ranking as such; the exponent is searched for each decomposition by itself, and with the rotation in place.

T5's cross-attention is no part of the source. The keys and values of all decoder layers read one tensor, the encoder's output, so that one decomposition can
serve them all (`Cross.JOINT`): a rank costs I + 2 * layers * O in place of 2 * layers * (I + O), and the engine may cache the latent alone
(decode/latent_cross.py). Cross-attention's queries, and the outputs of attentions, stay as they are: SVD does these.

No torch at import.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmdistill.compress.importance import Importance
from llmdistill.compress.ranks import Allocation, Budget
from llmdistill.compress.svd import Data

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration
    from llmdistill.compress.method import Applied


class Outputs(enum.Enum):
    """What the error of an output counts in the decomposition."""

    ANSWERS = "the root mean square of the gradient there of what the model says, softened, from row to row"
    LOSS = "the root mean square of the loss's gradient there, from row to row"
    ALIKE = "as much as that of any other"


class Cross(enum.Enum):
    """What is done with the keys and values of T5's cross-attention."""

    JOINT = "one decomposition for all layers"
    SEPARATE = "one for each layer"
    NONE = "they stay as they are"


class Rotation(enum.Enum):
    """What is put between the factors, and multiplied into them."""

    NONE = "nothing"
    HADAMARD = "Hadamard matrices of the largest power of two in the rank; a random orthogonal matrix where that is below 8"
    RANDOM = "a random orthogonal matrix"


@dataclass(frozen=True, kw_only=True)
class QSVD:
    """Keep a share of the budget of q, k and v, and of cross-attention's k and v."""

    kind: ClassVar[str] = "qsvd"
    quantizes: ClassVar[bool] = False

    keep: float = 0.5
    budget: Budget = Budget.PARAMETERS
    data: Data = Data.WHITENED
    alpha: float = 0.5
    """ASVD's exponent; only `Data.ACTIVATION` has one."""
    ranks: Allocation = Allocation.GLOBAL
    importance: Importance = Importance.ANSWERS
    outputs: Outputs = Outputs.ANSWERS
    num_gradient_rows: int = 32
    """Of the calibration rows: as many are run backwards for the importance, and half as many for the outputs."""
    cross: Cross = Cross.JOINT
    bits: int = 8
    """For which the exponent is chosen: of both factors and of the latent between them."""
    rotation: Rotation = Rotation.NONE
    seed: int = 0
    """Of the rotation."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"QSVD.keep is {self.keep}; give the share to keep, above 0 and at most 1")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"QSVD.alpha is {self.alpha}; give more than 0 and at most 1, such as ASVD's 0.5")
        if self.num_gradient_rows < 1:
            raise ValueError(f"QSVD.num_gradient_rows is {self.num_gradient_rows}; give 1 or more, better some dozens")
        if not 2 <= self.bits <= 16:
            raise ValueError(f"QSVD.bits is {self.bits}; give 2 to 16: those of the quantization that is to come, such as 8")

    def apply(self, model: PreTrainedModel, calibration: Calibration) -> Applied:
        """Factorise; what is at or above break-even stays dense. Every slot in scope must still hold a plain linear."""
        from llmdistill.compress.qsvd_apply import apply

        return apply(self, model, calibration)
