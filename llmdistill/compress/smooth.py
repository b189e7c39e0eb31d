"""SmoothQuant: outliers of the inputs are moved into the weights before int8 comes, without changing what the model computes.

A linear whose input has a few channels hundreds of times as large as the others spends its 8 bits of activations on these. Dividing each input channel j by

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

and multiplying the weight's column j by it is no change of the product, and with alpha 0.5 input and weight are then equally hard to quantize.

Source: Xiao et al. 2023, "SmoothQuant", equation 4. There the division goes into the norm that gives the input. Where we differ: it also goes into the
linear before the feed-forward output (T5's `wo`, the worst of all, has no norm before it), where nothing or a ReLU is between: wi_1 or up_proj of a gated
one, wi of T5 v1.0.

Optionally s is rounded to a power of two, so that in any dtype the model computes bitwise what it did. Measured on SmolLM2-135M in float32
(benchmarks/formats.py), that gives half of the gain away: int8 raises the held-out loss by 0.035 nats, by 0.018 after smoothing by powers of two, by 0.004
after smoothing by s itself.

No torch at import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration
    from llmdistill.compress.method import Applied


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Folds scales into norms and linears; Int8 is to come after it."""

    kind: ClassVar[str] = "smooth"
    quantizes: ClassVar[bool] = False

    alpha: float = 0.5
    """How much of the difficulty goes from inputs to weights: 0 none, 1 all."""
    feed_forward: bool = True
    """Also smooth the input of the feed-forward's output, through the linear before it."""
    powers_of_two: bool = False
    """Round scales to powers of two: then no weight is rounded, which in bfloat16 may be worth more than the nearer scale."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"SmoothQuant.alpha is {self.alpha}; give 0 (leave the inputs alone) to 1 (make all their channels equal)")

    def apply(self, model: PreTrainedModel, calibration: Calibration) -> Applied:
        """Scale norms and linears in place. Where a place cannot be smoothed, its layers say why."""
        from llmdistill.compress.smooth_maths import smooth

        return smooth(model, calibration, alpha=self.alpha, feed_forward=self.feed_forward, powers_of_two=self.powers_of_two)
