"""What leaving out a direction of a weight does to the loss of a row, for one ranking over all layers. Which loss that is says answers_loss.py.

A layer's outputs have whatever scale they have: an error of the same size is nothing in one layer and ruin in another. On SmolLM2-135M, ranks divided by the
energy of the outputs give a higher perplexity than the same share for every layer. So directions are weighed by the loss.

Without direction k the output y of a token loses (u_k . y) u_k, and the loss falls or rises by (u_k . y)(u_k . g) to first order, with the gradient g of the
loss by that output. Over tokens these effects have either sign. The mean of their squares is twice the rise of the loss to second order, with the empirical
Fisher matrix in place of the Hessian and no correlation between tokens:

    I_k = mean over rows of the sum over tokens of ((u_k . y)(u_k . g))^2

QSVD (Wang et al. 2025, section 3.2) squares the sum over a row's tokens instead. Where we differ, and why: a row has many tokens and calibration has few
rows, so that the square of each token is the steadier estimate. Perplexity of SmolLM2-135M with 24 gradient rows, QSVD's form and this one, dense 8.33: 10.05
and 10.10 with 20% removed, 17.28 and 16.35 with 40%; by energy alone 25.0 and 103.7; uniform 16.2 and 27.2.

An embedding gives token v the row sum over k of up[v, k] down[k]: without k the loss changes by up[v, k] (down[k] . g). A matrix that is head and embedding has
both effects, and their squares are added.

Shapes: T tokens, I inputs, O outputs (of an embedding: D width), K directions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmdistill.compress.calibration import row_loss
from llmdistill.compress.svd_targets import Target
from llmdistill.models.modes import only_trained

if TYPE_CHECKING:
    from jaxtyping import Float
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration


def loss_importances(
    model: PreTrainedModel, targets: Sequence[Target], lefts: Mapping[str, Tensor], calibration: Calibration, num_rows: int
) -> dict[str, Float[Tensor, " K"]]:
    """By target, of each direction in `lefts` (orthonormal, of `Target.scaled_OI`). In float32 or above: a model in less is copied for that."""
    differentiable: Any = model
    if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters()):
        differentiable = copy.deepcopy(model).float()
    sums = {target.path: torch.zeros(lefts[target.path].shape[1], dtype=torch.float64, device=model.device) for target in targets}
    hooks = [hook for target in targets for hook in _listen(differentiable, target, lefts[target.path].float(), sums[target.path])]
    num = 0
    few = replace(calibration, examples=calibration.examples[:num_rows])
    try:
        with only_trained(differentiable):
            for num, batch in enumerate(few.batches(differentiable), start=1):
                with torch.enable_grad():
                    value = row_loss(calibration.loss, differentiable, batch)
                if not bool(torch.isfinite(value)):
                    raise ValueError(
                        f"the loss of calibration row {num - 1} is {float(value.detach())}, so it has no gradient for SVD's importance: look at the model"
                    )
                value.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return {path: sum_K / num for path, sum_K in sums.items()}


def _listen(model: Any, target: Target, left_OK: Tensor, sum_K: Tensor) -> list[Any]:
    """Hooks on the modules that hold the target."""
    root_O1 = 1.0 if target.row_weight_O is None else target.row_weight_O.sqrt().float()[:, None]
    up_OK, reading_OK = left_OK / root_O1, left_OK * root_O1  # the direction of y that is lost, and what of y says how much of it
    down_KI = reading_OK.t() @ target.weight_OI.detach().float() if target.embeddings else None
    hooks = []
    if not target.embeddings or target.head:
        hooks.append(model.get_submodule(target.head or target.path).register_forward_hook(_of_linear(up_OK, reading_OK, sum_K)))
    embeddings = {id(module): module for module in (model.get_submodule(path) for path in target.embeddings)}
    return hooks + [module.register_forward_hook(_of_embedding(up_OK, down_KI, sum_K)) for module in embeddings.values()]


def _of_linear(up_OK: Tensor, reading_OK: Tensor, sum_K: Tensor) -> Callable[..., None]:
    def see(linear: Any, _: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            product = output.detach() if linear.bias is None else output.detach() - linear.bias
            amount_TK = product.flatten(0, -2).float() @ reading_OK
            _add_when_known(output, sum_K, lambda gradient_TO: amount_TK * (gradient_TO @ up_OK))

    return see


def _of_embedding(up_OK: Tensor, down_KI: Tensor | None, sum_K: Tensor) -> Callable[..., None]:
    assert down_KI is not None

    def see(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            tokens = inputs[0].flatten()
            _add_when_known(output, sum_K, lambda gradient_TD: up_OK[tokens] * (gradient_TD @ down_KI.t()))

    return see


def _add_when_known(output: Tensor, sum_K: Tensor, effects: Callable[[Tensor], Tensor]) -> None:
    """Once the gradient by this output is known, add the squares of the effects that it gives."""
    if not output.requires_grad:  # what comes first has nothing before it that is trained
        output.requires_grad_(True)

    def add(gradient: Tensor) -> None:
        sum_K.add_(effects(gradient.detach().flatten(0, -2).float()).double().square().sum(0))

    output.register_hook(add)
