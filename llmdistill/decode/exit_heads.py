"""What the engine does at an exit: how sure it is, and what it says.

The head of an exit is the model's own, or those rows of it that the exits' vocabulary names, copied together when the engine is made. Measures that need no
logits are taken first, and the head then runs for the tokens that leave, and for no others.

Shapes: N tokens, M model width, K tokens of the exits' vocabulary (or of the whole one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from llmdistill.decode import modules
from llmdistill.decode.confidence import MEASURES, Seen
from llmdistill.models.exits import exits_of
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.low_rank_linear import LowRankLinear

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmdistill.models.exit_settings import ExitSettings


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The tokens of an exit: how sure it is of each, and what it takes to say them."""

    confidence_N: Tensor
    normed_NM: Tensor
    logits_NK: Tensor | None


class ExitHeads:
    """All exits of a model."""

    def __init__(self, settings: ExitSettings, exits: Any, head: nn.Module, scale: float) -> None:
        self.settings = settings
        self.measure = MEASURES[settings.confidence]
        self.vocabulary = exits.vocabulary_K.tolist() if settings.num_vocabulary else None
        self._head = modules.head(some_outputs(head, exits.vocabulary_K) if settings.num_vocabulary else head)
        self._scale = scale
        self._norms = [modules.norm(norm) for norm in exits.norms]
        self._adapters: list[Callable[[Tensor], Tensor]] = list(exits.adapters)
        self._gates = list(exits.gates)

    @classmethod
    def of(cls, model: Any, scale: float) -> ExitHeads | None:
        """Those of a model, whose last states are multiplied by `scale` before the head; None where it has none."""
        found = exits_of(model)
        return None if found is None else cls(*found, model.lm_head, scale)

    def judge(self, place: int, state_NM: Tensor, before_NM: Tensor | None) -> Judged:
        """The tokens that have come to an exit."""
        normed_NM = self.normed(place, state_NM)
        logits_NK = self.logits(normed_NM) if self.measure.needs_logits else None
        gate = self._gates[place] if self._gates else None
        seen = Seen(state_ND=state_NM, before_ND=before_NM, normed_ND=normed_NM, logits_NK=logits_NK, gate=gate)
        return Judged(confidence_N=self.measure.confidence_N(seen), normed_NM=normed_NM, logits_NK=logits_NK)

    def normed(self, place: int, state_NM: Tensor) -> Float[Tensor, "N M"]:
        """What the head of an exit reads."""
        normed_NM = self._norms[place](state_NM)
        return self._adapters[place](normed_NM) if self._adapters else normed_NM

    def logits(self, normed_NM: Tensor) -> Float[Tensor, "N K"]:
        """What the head says."""
        return self._head(normed_NM if self._scale == 1 else normed_NM * self._scale)


def state_width(decoder: Any, slots_a_row: int) -> int:
    """How many numbers a token leaves at an exit; 0 where none leaves, as in a model without exits and in beam search."""
    return decoder.model_width if decoder.exits is not None and slots_a_row == 1 else 0


def some_outputs(head: Any, outputs_K: Tensor) -> nn.Module:
    """A linear that has these outputs of another one, in their order."""
    bias = None if getattr(head, "bias", None) is None else head.bias.detach()[outputs_K]
    if isinstance(head, LowRankLinear):
        small = LowRankLinear(head.in_features, len(outputs_K), head.rank, bias=False, device="meta")
        small.down, small.up = head.down, some_outputs(head.up, outputs_K)  # pyright: ignore[reportAttributeAccessIssue]
        return small
    if isinstance(head, Int8Linear):
        return Int8Linear.from_integers(head.weight.detach()[outputs_K], head.scale_O.detach()[outputs_K], bias)
    if type(head) is not nn.Linear:
        raise ValueError(
            f"the exits of this model have a vocabulary of their own, which is rows of its head, and the head is a {type(head).__name__}: "
            "keep the head as a linear, low-rank or int8, or make the exits with num_vocabulary=0"
        )
    small = nn.Linear(head.in_features, len(outputs_K), bias=bias is not None, device="meta")
    small.weight = nn.Parameter(head.weight.detach()[outputs_K], requires_grad=False)
    if bias is not None:
        small.bias = nn.Parameter(bias, requires_grad=False)
    return small
