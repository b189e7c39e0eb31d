"""SVD: every linear becomes the product of two, of the rank that a budget gives it.

What is minimised (`data`) and why nothing is inverted for it says low_rank_maths.py; how the budget is divided (`ranks`) says ranks.py.

- `importance`: one ranking over all layers needs to know what each layer's errors do to the answers, or to the loss; loss_importance.py says how that is
  measured, answers_loss.py which of them when. A layer then keeps the directions of its outputs that matter most there, which need not be those of most
  energy. The other divisions keep those of most energy.
- `in_order`: ranks are chosen on the model as it was, then the layers are factorised in the order in which data passes them, each for the inputs that the
  compressed ones before it give: SVD-LLM's sequential update (Wang et al. 2024, section 3.2), layer by layer also within a block (block_by_block.py). Since the
  directions of the outputs are others then, each layer keeps those of most energy.
- `refine`: with that, a layer's aim is not the product of its weight and its shifted inputs but what it gave before anything was compressed, by reduced-rank
  regression. On inputs that have not shifted there is nothing to gain: whitening has the optimum already.

Embedding and head (`Scope.EMBEDDINGS`). A row of the embedding counts as often as its token is read in the calibration rows, and once more, so that tokens
that the rows happen not to hold are not given up. A row of the head counts as often as its token is to be written, and once more: to second order, the loss
rises by half the squared error of a logit times its token's probability. The head's inputs are whitened like those of any linear. Where embedding and head
are one matrix they stay one, which has one error: rows count as often as they are read and written, and inputs are the head's, since what is wrong in a logit
is wrong in the answer, whereas what is wrong in an embedding goes through all layers, and is little beside what they add to it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmdistill.compress.importance import Importance
from llmdistill.compress.ranks import Allocation, Budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration
    from llmdistill.compress.method import Applied


class Data(enum.Enum):
    """Whose error is least."""

    PLAIN = "the weights'"
    ACTIVATION = "the weights', each input channel weighed by its mean magnitude to the power of alpha (ASVD)"
    WHITENED = "the outputs', on the calibration rows (SVD-LLM)"


class Scope(enum.Enum):
    """Which linears."""

    ATTENTION = "q, k, v and o, cross-attention's too"
    FEED_FORWARD = "those of the feed-forward"
    EMBEDDINGS = "embedding and head"


@dataclass(frozen=True, kw_only=True)
class SVD:
    """Keep a share of the budget of the linears in scope."""

    kind: ClassVar[str] = "svd"
    quantizes: ClassVar[bool] = False

    keep: float = 0.5
    budget: Budget = Budget.PARAMETERS
    data: Data = Data.WHITENED
    alpha: float = 0.5
    """ASVD's exponent; only `Data.ACTIVATION` has one."""
    ranks: Allocation = Allocation.GLOBAL
    importance: Importance = Importance.ANSWERS
    """Only `Allocation.GLOBAL` asks for one."""
    num_gradient_rows: int = 64
    """Of the calibration rows: as many are run backwards for `Importance.ANSWERS` and `LOSS`."""
    scope: tuple[Scope, ...] = (Scope.ATTENTION, Scope.FEED_FORWARD)
    in_order: bool = False
    refine: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"SVD.keep is {self.keep}; give the share to keep, above 0 and at most 1")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"SVD.alpha is {self.alpha}; give more than 0 and at most 1, such as ASVD's 0.5")
        if not self.scope or len(set(self.scope)) < len(self.scope):
            raise ValueError(f"SVD.scope is {[part.name for part in self.scope]}; give one or more of {', '.join(Scope.__members__)}, each once")
        if self.num_gradient_rows < 1:
            raise ValueError(f"SVD.num_gradient_rows is {self.num_gradient_rows}; give 1 or more, better some dozens")
        if self.in_order and self.data is Data.PLAIN:
            raise ValueError("SVD.in_order looks at shifted inputs, and data=PLAIN looks at none; use data=WHITENED, or leave in_order out")
        if self.refine and not (self.in_order and self.data is Data.WHITENED):
            raise ValueError("SVD.refine corrects for inputs that have shifted, so it needs in_order=true and data=WHITENED")

    def apply(self, model: PreTrainedModel, calibration: Calibration) -> Applied:
        """Factorise the linears in scope. Those at or above break-even stay dense, and so do those that an earlier method has factorised."""
        from llmdistill.compress.svd_apply import apply

        return apply(self, model, calibration)
