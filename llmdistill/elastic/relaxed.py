"""The whole model with choices that are probabilities: what differentiable searches take gradients of.

DARTS (Liu et al. 2019, section 2.2, equation 2) replaces a choice by the mean of its outcomes under a softmax. Sub-networks here are nested prefixes of one
model, so that this mean takes one pass. Measured on a T5 of 4 and 4 layers and width 128, on a CPU: 1.5 times the plain pass, 2.8 times with gradients; 1.7 and
4.2 times where the model width is open too.

- neurons and heads: the linear that reads them (ffn_out, o, cross_o) is linear, so the mean of its outputs is its output for an input that is multiplied by
  the probability that each neuron or head stays, sum_i p_i prefix_i.
- rank: the same between the factors of a low-rank linear. How many singular values stay depends on rank, model width, heads and neurons together
  (StackShape.cut_ranks), so the probabilities are those of all combinations.
- depth: what a layer adds to the residual stream is multiplied by the probability that it stays. The layers' additions are gated (the outputs of o, cross_o and
  ffn_out) and not the layer as a whole, which for probabilities of 0 and 1 is the same and leaves the fast forward of T5 in use.
- model width: a prefix alone would be wrong, since a root mean square norm takes its mean over fewer channels. But the residual stream is read through norms
  only, so the mean is taken of what each norm gives: sum_i p_i norm_i(x), each with the mean square of its own prefix and zeros behind it. The last norm of a
  T5 that scales its output by width^-0.5 takes the other scales upon itself. So the width is one decision like the others, with no search of its own for each.

With probabilities of 0 and 1 the relaxed model is the sub-network (to rounding), whatever the decisions.

Everything is done by hooks that last as long as `running`. Weights take no gradients within; nothing of the model is changed.

Shapes: B rows, L tokens, D model width, R rank.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.elastic.decisions import Decisions
from llmdistill.elastic.shape import StackShape
from llmdistill.elastic.subnet import whole
from llmdistill.models.anatomy import Axis, Layer, stacks
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.modes import evaluating

if TYPE_CHECKING:
    from jaxtyping import Float


class RelaxedModel:
    """A model whose decisions are random. What does not depend on the probabilities is worked out here, once."""

    def __init__(self, model: Any, decisions: Decisions) -> None:
        self.model, self.decisions = model, decisions
        self._counts = {
            (shape.name, number): self._kept_ranks(shape, layer, number)
            for shape, stack in zip(decisions.space.shape.stacks, stacks(model), strict=True)
            for number, layer in enumerate(stack.layers)
            if any(isinstance(place.module, LowRankLinear) for place in layer.places)
        }

    @contextlib.contextmanager
    def running(self, probabilities: Sequence[Float[Tensor, " _"]]) -> Iterator[None]:
        """The model computes the mean within, in eval mode, with gradients to the probabilities alone: one vector for each open decision, in their order."""
        self._check(probabilities)
        with whole(self.model), evaluating(self.model), _frozen(self.model), contextlib.ExitStack() as hooks:
            _Hooks(self, probabilities, hooks).put()
            yield

    def _check(self, probabilities: Sequence[Tensor]) -> None:
        sizes, expected = [tuple(one.shape) for one in probabilities], [(len(decision.values),) for decision in self.decisions.open]
        if sizes != expected:
            raise ValueError(f"probabilities have the shapes {sizes}: give a vector for each open decision, of {expected}")

    def _kept_ranks(self, shape: StackShape, layer: Layer, number: int) -> dict[str, Tensor]:
        """For each low-rank linear, by role, how many singular values stay for each combination of width, heads, neurons and rank."""
        values = [self.decisions.values(axis, shape.name, number) for axis in ("width", "heads", "ffn", "rank")]
        cuts = [
            shape.cut_ranks(number, fraction, width=width, heads=heads, ffn_width=ffn_width) for width, heads, ffn_width, fraction in itertools.product(*values)
        ]
        roles = [place.role for place in layer.places if isinstance(place.module, LowRankLinear)]
        return {role: torch.tensor([cut[role] for cut in cuts]) for role in roles}


class _Hooks:
    """Those of one run."""

    def __init__(self, relaxed: RelaxedModel, probabilities: Sequence[Tensor], hooks: contextlib.ExitStack) -> None:
        self.relaxed, self.decisions, self.probabilities, self.hooks = relaxed, relaxed.decisions, probabilities, hooks
        self.model, self.space = relaxed.model, relaxed.decisions.space

    def put(self) -> None:
        for stack, shape in zip(stacks(self.model), self.space.shape.stacks, strict=True):
            for number, layer in enumerate(stack.layers):
                self._layer(layer, shape, number)
                for norm in layer.norms:
                    self._norm(norm)
            is_last = stack.name == "decoder"
            self._norm(stack.norm, scales=is_last and getattr(self.model.config, "scale_decoder_outputs", False))
        head = self.model.lm_head
        if isinstance(head, LowRankLinear) and self.decisions.place("width") is not None:
            counts = [min(head.rank, width) for width in self.space.widths]
            self._mask_input(head.up, _prefixes(counts, head.rank, self._of("width")))

    def _layer(self, layer: Layer, shape: StackShape, number: int) -> None:
        of = {axis: self._of(axis, shape.name, number) for axis in ("width", "heads", "ffn", "rank")}
        if self.decisions.place("depth", shape.name) is not None:
            gate = self._of("depth", shape.name) @ torch.tensor(self.decisions.kept_at(shape.name, number), dtype=torch.float64)
        else:
            gate = None
        for place in layer.places:
            if place.inputs in (Axis.HEADS, Axis.NEURONS):  # the linears that write to the residual stream
                axis, size = ("heads", shape.head_width) if place.inputs is Axis.HEADS else ("ffn", 1)
                if self.decisions.place(axis, shape.name, number) is not None:
                    counts = [value * size for value in self.decisions.values(axis, shape.name, number)]
                    self._mask_input(place.module, _prefixes(counts, place.module.in_features, of[axis]))
                if gate is not None:
                    self._gate_output(place.module, gate)
            if isinstance(place.module, LowRankLinear):
                counts_of = self.relaxed._counts[shape.name, number][place.role].tolist()
                if set(counts_of) != {place.module.rank}:
                    joint = torch.cartesian_prod(*of.values()).prod(-1)
                    self._mask_input(place.module.up, _prefixes(counts_of, place.module.rank, joint))

    def _of(self, axis: str, stack: str | None = None, layer: int | None = None) -> Tensor:
        """The probabilities of the values of an axis; those of closed ones are 1."""
        place = self.decisions.place(axis, stack, layer)
        return torch.ones(1, dtype=torch.float64) if place is None else self.probabilities[place].double()

    def _mask_input(self, module: nn.Module, mask: Tensor) -> None:
        mask = mask.to(self.model.device, self.model.dtype)

        def masked(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return inputs[0] * mask, *inputs[1:]

        self._until_the_end(module.register_forward_pre_hook(masked))

    def _gate_output(self, module: nn.Module, gate: Tensor) -> None:
        gate = gate.to(self.model.device, self.model.dtype)

        def gated(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
            return output * gate

        self._until_the_end(module.register_forward_hook(gated))

    def _norm(self, norm: nn.Module, *, scales: bool = False) -> None:
        if self.decisions.place("width") is None:
            return
        widths, p_W = self.space.widths, self._of("width")
        if scales:
            p_W = p_W * torch.tensor([math.sqrt(widths[-1] / width) for width in widths], dtype=torch.float64)
        p_W = p_W.to(self.model.device, torch.promote_types(self.model.dtype, torch.float32))
        self._until_the_end(norm.register_forward_hook(lambda module, inputs, output: _mean_norm(module, inputs[0], widths, p_W).to(output.dtype)))

    def _until_the_end(self, handle: Any) -> None:
        self.hooks.callback(handle.remove)


def _mean_norm(norm: Any, hidden_BLD: Tensor, widths: Sequence[int], p_W: Tensor) -> Tensor:
    """The mean of root mean square norms over the first channels, each with zeros behind them."""
    hidden_BLD = hidden_BLD.to(p_W.dtype)
    squares = hidden_BLD.square()
    edges = [0, *widths]
    sums = torch.stack([squares[..., first:last].sum(-1) for first, last in itertools.pairwise(edges)], -1).cumsum(-1)
    means = sums / torch.tensor(widths, dtype=p_W.dtype, device=p_W.device)
    factors = p_W * torch.rsqrt(means + norm.variance_epsilon)
    from_here = factors.flip(-1).cumsum(-1).flip(-1)  # a channel is in its own prefix and in all longer ones
    lengths = torch.tensor([last - first for first, last in itertools.pairwise(edges)], device=p_W.device)
    return norm.weight * (hidden_BLD * from_here.repeat_interleave(lengths, -1, output_size=widths[-1]))


def _prefixes(counts: Sequence[int], size: int, p: Tensor) -> Float[Tensor, " size"]:
    """The probability that each of `size` is among those that stay, where the i-th count stays with p[i]."""
    stays = torch.arange(size) < torch.tensor(counts)[:, None]
    return p @ stays.to(p.dtype)


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No weight takes a gradient within."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
