"""By how much the loss would rise, to second order, if one module were exchanged for another: an estimate for many at once, from one pass over a few rows.

The other module gives y' where this one gives y. With the gradient g of the loss by y, a token's loss changes by (y' - y) . g to first order, of either sign;
half the mean of its square is the rise to second order, with the empirical Fisher matrix in place of the Hessian (as loss_importance.py has it for
directions). It says which exchanges are the dear ones, not what they cost: that is for measuring.

Shapes: T tokens, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.compress.calibration import Calibration, row_loss
from llmdistill.models.modes import evaluating, only_trained


def estimated_rises(model: Any, exchanges: Sequence[Sequence[tuple[nn.Module, nn.Module]]], calibration: Calibration) -> list[float | None]:
    """Of each exchange, which is of one or several modules that are in the model; None where no gradient reaches them. Infinite where y' is."""
    sums: list[float | None] = [None] * len(exchanges)

    def listen(index: int, other: nn.Module) -> Any:
        def see(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            with torch.no_grad():
                change = other(*inputs).double() - output.double()
            if not output.requires_grad:  # what comes first has nothing before it that is differentiated
                output.requires_grad_(True)

            def add(gradient: Tensor) -> None:
                effects = (change * gradient.double()).flatten(0, -2).sum(-1).square().sum()
                sums[index] = (sums[index] or 0.0) + (float(effects) / 2 if bool(torch.isfinite(effects)) else torch.inf)

            output.register_hook(add)

        return see

    hooks = [
        this.register_forward_hook(listen(index, other))
        for index, exchange in enumerate(exchanges)
        for this, other in {id(this): (this, other) for this, other in exchange}.values()
    ]
    num_rows = 0
    try:
        with evaluating(model), only_trained(model), torch.enable_grad():
            for batch in calibration.batches(model):
                row_loss(calibration.loss, model, batch).backward()
                num_rows += 1
    finally:
        for hook in hooks:
            hook.remove()
    return [None if total is None else total / num_rows for total in sums]
