"""Feed-forwards gated by channel, before they are trained: which neurons stand together in a group, and what tells which groups a token wants.

A group is only worth gating if the same tokens want all of it. So neurons are put in an order first, which leaves the function as it is: they are halved again
and again by the first principal component of how much each writes on each token, the larger loadings in one half. Then a linear is fitted (ridge regression)
to each group's share of what is written, so that training begins with winners that mean something. Gao et al. 2019 begin with saliencies of 1 for all, and find
winners as they train; Zhang et al. 2022 ("MoEfication") group neurons by their weights.

How much a neuron writes is |activation| times the norm of its column of the output.

Shapes: T tokens, D model width, N neurons, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.compress.calibration import Calibration
from llmdistill.models.anatomy import Axis, Layer, stacks
from llmdistill.models.channel_gated_feed_forward import ChannelGatedFeedForward
from llmdistill.models.feed_forward import feed_forward_of
from llmdistill.models.modes import evaluating

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MAX_TOKENS = 4096
"""Of one layer, that are looked at."""
RIDGE = 1e-2
"""Of the regression, relative to the mean square of the inputs."""
BOOST = 0.1
"""Standard deviation of the saliencies that training begins with, whose mean is 1. Larger ones distort what is kept, smaller ones choose alike."""


@dataclass(frozen=True)
class Seen:
    """What a feed-forward read and how much its neurons wrote, token by token."""

    hidden_TD: Float[Tensor, "T D"]
    written_TN: Float[Tensor, "T N"]


@torch.no_grad()
def gate_channels(model: Any, calibration: Calibration, stack_names: tuple[str, ...], *, groups: int, kept: int) -> list[ChannelGatedFeedForward]:
    """Put feed-forwards gated by channel in the place of those of these stacks, with neurons in order and saliencies fitted."""
    if groups < 2 or groups & (groups - 1):
        raise ValueError(f"there are to be {groups} groups, and neurons are halved again and again; give 2, 4, 8, 16, ...")
    layers = [layer for stack in stacks(model) if stack.name in stack_names for layer in stack.layers]
    for layer in layers:
        for place in layer.feed_forward:
            if type(place.module) is not nn.Linear:
                kind = getattr(place.module, "kind", type(place.module).__name__)
                raise ValueError(f"a {place.role} is a {kind} module, whose neurons have no order here: gate channels first, and compress afterwards")
    seen = _look(model, calibration, layers)
    made = []
    for layer, of_layer in zip(layers, seen, strict=True):
        order_N = coactivation_order(of_layer.written_TN, groups)
        permute(layer, order_N)
        holder, name = feed_forward_of(layer)
        module = ChannelGatedFeedForward(getattr(holder, name), groups=groups, kept=kept).train(model.training)
        fit(module, of_layer.hidden_TD, of_layer.written_TN[:, order_N])
        setattr(holder, name, module)
        made.append(module)
    return made


def coactivation_order(written_TN: Float[Tensor, "T N"], groups: int) -> Int[Tensor, " N"]:
    """Place i gets neuron order[i]: those that write on the same tokens side by side, in groups of one size."""
    centred_TN = written_TN.double() - written_TN.double().mean(0)
    unit_TN = centred_TN / centred_TN.norm(dim=0).clamp(min=1e-12)
    pieces = [torch.arange(written_TN.shape[1], device=written_TN.device)]
    while len(pieces) < groups:
        pieces = [half for piece in pieces for half in _halves(unit_TN, piece)]
    return torch.cat(pieces)


def permute(layer: Layer, order_N: Int[Tensor, " N"]) -> None:
    """Put the neurons of a layer in this order."""
    for place in layer.feed_forward:
        weight, bias = place.module.weight, place.module.bias
        writes_neurons = place.outputs is Axis.NEURONS
        weight.copy_(weight.index_select(0 if writes_neurons else 1, order_N))
        if writes_neurons and bias is not None:
            bias.copy_(bias[order_N])


def fit(module: ChannelGatedFeedForward, hidden_TD: Float[Tensor, "T D"], written_TN: Float[Tensor, "T N"]) -> None:
    """Let the saliencies say each group's share of what is written, about 1."""
    written_TG = written_TN.double().square().unflatten(1, (module.groups, -1)).sum(-1).sqrt()
    share_TG = written_TG / written_TG.mean(1, keepdim=True).clamp(min=1e-12)
    mean_D, mean_G = hidden_TD.double().mean(0), share_TG.mean(0)
    centred_TD = hidden_TD.double() - mean_D
    gram_DD = centred_TD.T @ centred_TD
    gram_DD.diagonal().add_(RIDGE * gram_DD.diagonal().mean() + 1e-12)
    weight_DG = torch.linalg.solve(gram_DD, centred_TD.T @ (share_TG - mean_G))
    found_TG = centred_TD @ weight_DG + mean_G
    scale = BOOST / found_TG.std().clamp(min=1e-12)
    module.saliency.weight.copy_(scale * weight_DG.T)
    module.saliency.bias.copy_(1 + scale * (mean_G - mean_D @ weight_DG - 1))


def _halves(unit_TN: Tensor, piece: Tensor) -> tuple[Tensor, Tensor]:
    of_piece_TN = unit_TN[:, piece]
    _, vectors = torch.linalg.eigh(of_piece_TN.T @ of_piece_TN)
    order = piece[vectors[:, -1].argsort(descending=True, stable=True)]
    return order[: len(order) // 2], order[len(order) // 2 :]


def _look(model: Any, calibration: Calibration, layers: list[Layer]) -> list[Seen]:
    """The first tokens of the calibration rows, as every layer sees them."""
    hidden: list[list[Tensor]] = [[] for _ in layers]
    inner: list[list[Tensor]] = [[] for _ in layers]

    def keep(into: list[Tensor], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        into.append(inputs[0].detach().flatten(0, -2).float())

    hooks = []
    for number, layer in enumerate(layers):
        holder, name = feed_forward_of(layer)
        hooks.append(getattr(holder, name).register_forward_pre_hook(partial(keep, hidden[number])))
        hooks.append(layer.feed_forward[-1].module.register_forward_pre_hook(partial(keep, inner[number])))
    try:
        with evaluating(model):
            for batch in calibration.batches(model):
                calibration.loss.sums_P(model, batch)
                if min(sum(map(len, of_layer)) for of_layer in hidden) >= MAX_TOKENS:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    seen = []
    for layer, hidden_of, inner_of in zip(layers, hidden, inner, strict=True):
        norm_N = layer.feed_forward[-1].module.weight.float().norm(dim=0)
        seen.append(Seen(hidden_TD=torch.cat(hidden_of)[:MAX_TOKENS], written_TN=torch.cat(inner_of)[:MAX_TOKENS].abs() * norm_N))
    return seen
