"""Linears of an attention layer as slices of one small tensor: Tucker and CP, run in their factorised form.

A head of q, k or v is a matrix of model width by head width, and so is a head of o once transposed. All heads of the matrices that were decomposed together
make one tensor W of three modes, model width M, head width D, heads N, and each linear is some of its slices:

    Tucker   W[m, d, n] = sum over r, k, p of width[r, m] head[d, k] mix[n, p] core[p, k, r]
    CP       W[m, d, n] = sum over r       of width[r, m] head[d, r] mix[n, r]

`width`, `head` and a mixed `core` belong to all of them: the modules hold the same nn.Parameter, which a checkpoint writes once (structure.py). `mix` holds a
row for each of the linear's own heads. A mode of full rank has no matrix: it is in the core, which then holds the linear's own slices and is its own.

What that costs: a CP linear of rank R multiplies R (M + N D) times a token and holds R (M + D + N) numbers, so it can be smaller than the dense one and
still compute more. A shared factor is multiplied once in every linear that holds it.

Shapes: I inputs, O outputs, M model width, H the linear's own heads, D head width; R, K, P ranks of width, head and heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdistill.models.kind import Settings


class _HeadsLinear(nn.Module):
    """Sizes and bias. `reads_heads` says that heads are the input and the model width the output, as in o."""

    def __init__(self, *, width: int, num_heads: int, head_width: int, reads_heads: bool) -> None:
        super().__init__()
        self.width, self.num_heads, self.head_width, self.reads_heads = width, num_heads, head_width, reads_heads
        heads = num_heads * head_width
        self.in_features, self.out_features = (heads, width) if reads_heads else (width, heads)

    def _hold(self, tensors: Mapping[str, Tensor | None]) -> None:
        """As parameters. One that is a parameter already stays that very one, which ties the modules that hold it."""
        for name, tensor in tensors.items():
            self.register_parameter(name, tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class TuckerLinear(_HeadsLinear):
    """Slices of a Tucker decomposition. `width_RM`, `head_DK` and `mix_HP` are None where their mode has full rank."""

    kind: ClassVar[str] = "tucker"

    width_RM: nn.Parameter | None
    head_DK: nn.Parameter | None
    mix_HP: nn.Parameter | None
    core_PKR: nn.Parameter
    bias_O: nn.Parameter | None

    def __init__(
        self, *, core_PKR: Tensor, width_RM: Tensor | None, head_DK: Tensor | None, mix_HP: Tensor | None, bias_O: Tensor | None, reads_heads: bool
    ) -> None:
        super().__init__(
            width=core_PKR.shape[2] if width_RM is None else width_RM.shape[1],
            num_heads=core_PKR.shape[0] if mix_HP is None else mix_HP.shape[0],
            head_width=core_PKR.shape[1] if head_DK is None else head_DK.shape[0],
            reads_heads=reads_heads,
        )
        self._hold({"width_RM": width_RM, "head_DK": head_DK, "mix_HP": mix_HP, "core_PKR": core_PKR, "bias_O": bias_O})

    @classmethod
    def from_settings(cls, settings: Settings, replaced: nn.Module) -> Self:
        """An empty one in place of a linear of the stock model, with its sizes, bias, dtype and device."""
        linear, head_width, reads_heads = _common(cls.kind, settings, replaced, {"ranks": list, "mixes_heads": bool})
        width, num_heads = _width_and_heads(linear, head_width, reads_heads)
        ranks, mixes = settings["ranks"], settings["mixes_heads"]
        if not isinstance(ranks, list) or len(ranks) != 3 or not all(isinstance(rank, int) and rank >= 1 for rank in ranks):
            raise ValueError(f"the ranks of a tucker module are three whole numbers of 1 or more, and these are {ranks}")
        num_width, num_head, num_mixed = (int(rank) for rank in ranks)
        if num_width > width or num_head > head_width or (not mixes and num_mixed != num_heads):
            raise ValueError(f"the ranks of a tucker module are {ranks}, and its linear has a model width of {width} and {num_heads} heads of {head_width}")

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=linear.weight.dtype, device=linear.weight.device)

        return cls(
            core_PKR=empty(num_mixed, num_head, num_width),
            width_RM=empty(num_width, width) if num_width < width else None,
            head_DK=empty(head_width, num_head) if num_head < head_width else None,
            mix_HP=empty(num_heads, num_mixed) if mixes else None,
            bias_O=empty(linear.out_features) if linear.bias is not None else None,
            reads_heads=reads_heads,
        )

    def settings(self) -> Settings:
        """What config.json says of it: ranks of model width, head width and heads; the sizes are the replaced linear's."""
        num_mixed, num_head, num_width = self.core_PKR.shape
        ranks = [num_width, num_head, num_mixed]
        return {"head_width": self.head_width, "ranks": ranks, "reads_heads": self.reads_heads, "mixes_heads": self.mix_HP is not None}

    @property
    def weight(self) -> Tensor:
        """A factor, for those who ask a linear's weight for its dtype or device; transformers' T5 does. There is no dense weight."""
        return self.core_PKR if self.width_RM is None else self.width_RM

    def dense_OI(self, dtype: torch.dtype) -> Tensor:
        """The weight of the linear that this one is, multiplied out in this dtype."""
        slices = self.core_PKR.to(dtype)
        if self.width_RM is not None:
            slices = slices @ self.width_RM.to(dtype)
        if self.head_DK is not None:
            slices = self.head_DK.to(dtype) @ slices
        if self.mix_HP is not None:
            slices = torch.einsum("hp,pdm->hdm", self.mix_HP.to(dtype), slices)
        weight = slices.flatten(0, 1)
        return weight.t().contiguous() if self.reads_heads else weight

    def forward(self, hidden_BLI: Tensor) -> Tensor:
        num_mixed, num_head, _ = self.core_PKR.shape
        core = self.core_PKR.flatten(0, 1)
        if self.reads_heads:
            x = hidden_BLI.unflatten(-1, (self.num_heads, self.head_width))
            x = x if self.head_DK is None else x @ self.head_DK
            x = x if self.mix_HP is None else self.mix_HP.t() @ x
            x = x.flatten(-2) @ core
            x = x if self.width_RM is None else x @ self.width_RM
        else:
            x = hidden_BLI if self.width_RM is None else F.linear(hidden_BLI, self.width_RM)
            x = F.linear(x, core).unflatten(-1, (num_mixed, num_head))
            x = x if self.mix_HP is None else self.mix_HP @ x
            x = x if self.head_DK is None else F.linear(x, self.head_DK)
            x = x.flatten(-2)
        return x if self.bias_O is None else x + self.bias_O


class CPLinear(_HeadsLinear):
    """Slices of a CP decomposition."""

    kind: ClassVar[str] = "cp"

    width_RM: nn.Parameter
    head_DR: nn.Parameter
    mix_HR: nn.Parameter
    bias_O: nn.Parameter | None

    def __init__(self, *, width_RM: Tensor, head_DR: Tensor, mix_HR: Tensor, bias_O: Tensor | None, reads_heads: bool) -> None:
        super().__init__(width=width_RM.shape[1], num_heads=mix_HR.shape[0], head_width=head_DR.shape[0], reads_heads=reads_heads)
        self._hold({"width_RM": width_RM, "head_DR": head_DR, "mix_HR": mix_HR, "bias_O": bias_O})

    @classmethod
    def from_settings(cls, settings: Settings, replaced: nn.Module) -> Self:
        """An empty one in place of a linear of the stock model, with its sizes, bias, dtype and device."""
        linear, head_width, reads_heads = _common(cls.kind, settings, replaced, {"rank": int})
        width, num_heads = _width_and_heads(linear, head_width, reads_heads)
        rank = settings["rank"]
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"the rank of a cp module is {rank}: it is 1 or more")

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=linear.weight.dtype, device=linear.weight.device)

        bias = empty(linear.out_features) if linear.bias is not None else None
        return cls(width_RM=empty(rank, width), head_DR=empty(head_width, rank), mix_HR=empty(num_heads, rank), bias_O=bias, reads_heads=reads_heads)

    def settings(self) -> Settings:
        """What config.json says of it; the sizes are the replaced linear's."""
        return {"head_width": self.head_width, "rank": self.width_RM.shape[0], "reads_heads": self.reads_heads}

    @property
    def weight(self) -> Tensor:
        """A factor, for those who ask a linear's weight for its dtype or device; transformers' T5 does. There is no dense weight."""
        return self.width_RM

    def dense_OI(self, dtype: torch.dtype) -> Tensor:
        """The weight of the linear that this one is, multiplied out in this dtype."""
        weight = torch.einsum("rm,dr,hr->hdm", self.width_RM.to(dtype), self.head_DR.to(dtype), self.mix_HR.to(dtype)).flatten(0, 1)
        return weight.t().contiguous() if self.reads_heads else weight

    def forward(self, hidden_BLI: Tensor) -> Tensor:
        if self.reads_heads:
            x_BLHR = hidden_BLI.unflatten(-1, (self.num_heads, self.head_width)) @ self.head_DR
            x = (x_BLHR * self.mix_HR).sum(-2) @ self.width_RM
        else:
            x_BLHR = F.linear(hidden_BLI, self.width_RM).unsqueeze(-2) * self.mix_HR
            x = F.linear(x_BLHR, self.head_DR).flatten(-2)
        return x if self.bias_O is None else x + self.bias_O


def _common(kind: str, settings: Settings, replaced: nn.Module, own: Mapping[str, type]) -> tuple[nn.Linear, int, bool]:
    """The linear, head width and direction, once the settings have the right names and types."""
    if not isinstance(replaced, nn.Linear):
        raise ValueError(f"a {kind} module replaces a linear, and this is a {type(replaced).__name__}")
    types = {"head_width": int, "reads_heads": bool, **own}
    if set(settings) != set(types) or not all(isinstance(settings[name], expected) for name, expected in types.items()):
        listed = ", ".join(f"{name!r}: {expected.__name__}" for name, expected in types.items())
        raise ValueError(f"the settings of a {kind} module are {{{listed}}}, and these are {dict(settings)}")
    head_width, reads_heads = settings["head_width"], settings["reads_heads"]
    assert isinstance(head_width, int)
    return replaced, head_width, bool(reads_heads)


def _width_and_heads(linear: nn.Linear, head_width: int, reads_heads: bool) -> tuple[int, int]:
    """The model width, and how many heads the other side of the linear has."""
    width, heads = (linear.out_features, linear.in_features) if reads_heads else (linear.in_features, linear.out_features)
    if head_width < 1 or heads % head_width:
        raise ValueError(f"head_width is {head_width}, and the linear's {heads} {'inputs' if reads_heads else 'outputs'} are no whole number of such heads")
    return width, heads // head_width
