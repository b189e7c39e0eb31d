"""Tucker and CP on a model: which heads are one tensor, how large its ranks are, and the modules that take the linears' places (tensors.py says why so).

Shapes: M model width, D head width, N heads of all matrices of a tensor, R, K, P ranks of the three; H heads, I inputs and O outputs of one linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.compress import tensors_maths as maths
from llmdistill.compress.low_rank_maths import Gram, floored, output_error, spectrum
from llmdistill.compress.low_rank_maths import factors as low_rank_factors
from llmdistill.compress.method import Applied, Layer
from llmdistill.compress.slots import Role, Slot, plain, slots
from llmdistill.compress.statistics import input_statistics
from llmdistill.compress.tensors import CP, Data, Stack, Tucker
from llmdistill.compress.tensors_maths import CPFactors, Factors, TuckerFactors
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.tensor_linear import CPLinear, TuckerLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration


RANK_NAMES = ("rank", "head_width_rank", "heads_rank")


@dataclass(frozen=True)
class _Part:
    """A linear of a tensor. `heads` are its slices of the tensor."""

    slot: Slot
    linear: nn.Linear
    reads_heads: bool
    heads: slice


@dataclass(frozen=True)
class _Stacked:
    """A tensor, and what is to be done with it; it is made when it is asked for, since those of all layers would not fit beside a large model."""

    parts: list[_Part]
    head_width: int
    gram: Gram | None
    """Of the inputs, where the tensor is to be whitened."""

    def weight_MDN(self) -> Tensor:
        return maths.stack_heads([(part.linear.weight, part.reads_heads) for part in self.parts], self.head_width)

    @property
    def is_whitened_matrix(self) -> bool:
        """o, to be fitted to its outputs: what it reads is head width and heads at once."""
        return self.gram is not None and self.parts[0].reads_heads

    def prepared(self) -> tuple[Tensor, list[tuple[Tensor, int]]]:
        """The tensor to decompose, whitened and with every matrix of norm 1, and what its modes are to be multiplied by afterwards."""
        weight_MDN, undo = self.weight_MDN(), []
        if self.gram is not None:
            root_MM, inverse_MM = maths.whitener(self.gram.matrix_II)
            weight_MDN = maths.times(weight_MDN, root_MM, 0)
            undo.append((inverse_MM, 0))
        norm_N = torch.ones(weight_MDN.shape[2], dtype=weight_MDN.dtype, device=weight_MDN.device)
        for part in self.parts:
            norm_N[part.heads] = float(weight_MDN[..., part.heads].norm()) or 1.0
        return weight_MDN / norm_N, [(torch.diag(norm_N), 2), *undo]


@torch.no_grad()
def apply(method: Tucker | CP, model: PreTrainedModel, calibration: Calibration) -> Applied:
    """Decompose every attention. What cannot be done is found before anything is changed."""
    stacked = _stacks(method, model, calibration)
    planned = [(tensor, *_ranks(method, tensor)) for tensor in stacked]
    layers: list[Layer] = []
    num_before = num_after = 0
    for tensor, ranks, num_kept in planned:
        num_dense = sum(part.linear.weight.numel() for part in tensor.parts)
        num_before += num_dense
        num_after += min(num_kept, num_dense)
        if num_kept < num_dense:
            layers += _replace(method, model, tensor, ranks)
        else:
            note = f"ranks {' x '.join(map(str, ranks))} would take {num_kept} parameters, and the dense weights have {num_dense}"
            layers += [Layer(path=part.slot.path, kind="kept", note=note) for part in tensor.parts]
    replaced = [layer.figures["relative_weight_error"] for layer in layers if layer.kind != "kept"]
    return Applied(
        figures={
            "attention_parameters_before": num_before,
            "attention_parameters_after": num_after,
            "num_tensors": len(stacked),
            "num_linears_kept_dense": len(layers) - len(replaced),
            "mean_relative_weight_error": sum(replaced) / len(replaced) if replaced else 0.0,
        },
        layers=tuple(layers),
    )


def _stacks(method: Tucker | CP, model: PreTrainedModel, calibration: Calibration) -> list[_Stacked]:
    """Every tensor, in the order of the data."""
    groups: dict[str, list[_Part]] = {}
    for slot in slots(model):
        if slot.role.is_attention:
            linear, attention, reads_heads = plain(model, slot, method.kind), slot.path.rpartition(".")[0], slot.role in (Role.ATTENTION_OUT, Role.CROSS_OUT)
            group = groups.setdefault(attention if method.stack is Stack.LAYER else f"{attention} {slot.input}", [])
            first = group[-1].heads.stop if group else 0
            num_heads = (linear.in_features if reads_heads else linear.out_features) // _head_width(model, slot)
            group.append(_Part(slot, linear, reads_heads, slice(first, first + num_heads)))
    readers = [group[0].slot for group in groups.values()] if method.data is Data.WHITENED else []
    statistics = input_statistics(model, readers, calibration) if readers else {}
    grams = {name: floored(one.gram_II) for name, one in statistics.items()}
    return [_Stacked(group, _head_width(model, group[0].slot), grams.get(group[0].slot.input)) for group in groups.values()]


def _ranks(method: Tucker | CP, tensor: _Stacked) -> tuple[tuple[int, ...], int]:
    """The ranks of a tensor, and the parameters that they hold."""
    shape = tensor.weight_MDN().shape
    if tensor.is_whitened_matrix:
        rows, columns = shape[0], shape[1] * shape[2]
        rank = _budget(method, shape) // (rows + columns)
        if rank < 1:
            raise ValueError(
                f"{_budget(method, shape)} parameters are too few for a low-rank {rows} x {columns} linear, which takes {rows + columns}: keep more"
            )
        return (rank,), rank * (rows + columns)
    if isinstance(method, CP):
        rank = method.keep if isinstance(method.keep, int) else maths.cp_rank(shape, _budget(method, shape))
        return (rank,), maths.cp_parameters(shape, rank)
    if isinstance(method.keep, tuple):
        ranks = maths.possible_ranks(shape, method.keep)
    else:
        ranks = maths.tucker_ranks(tensor.prepared()[0], _budget(method, shape))
    return ranks, maths.tucker_parameters(shape, ranks)


def _budget(method: Tucker | CP, shape: Sequence[int]) -> int:
    """The parameters that a tensor may have: a share, or what it has at the ranks that are given."""
    if isinstance(method.keep, tuple):
        return maths.tucker_parameters(shape, maths.possible_ranks(shape, method.keep))
    return maths.cp_parameters(shape, method.keep) if isinstance(method.keep, int) else int(method.keep * math.prod(shape))


def _replace(method: Tucker | CP, model: PreTrainedModel, tensor: _Stacked, ranks: tuple[int, ...]) -> Iterator[Layer]:
    """Put the modules of one tensor in their places, and say so."""
    for part, module in zip(tensor.parts, _modules(method, tensor, ranks), strict=True):
        weight_OI, ours_OI = part.linear.weight.double(), _dense_OI(module)
        figures = {name: float(rank) for name, rank in zip(RANK_NAMES, ranks, strict=False)}
        figures["relative_weight_error"] = float((ours_OI - weight_OI).norm()) / (float(weight_OI.norm()) or 1.0)
        if tensor.gram is not None:
            figures["relative_error"] = output_error(weight_OI, ours_OI, tensor.gram.matrix_II)
        model.set_submodule(part.slot.path, module.train(part.linear.training))
        yield Layer(path=part.slot.path, kind=module.kind, note=_note(tensor.gram), figures=figures)


def _modules(method: Tucker | CP, tensor: _Stacked, ranks: tuple[int, ...]) -> list[Any]:
    """What takes the places of a tensor's linears."""
    dtype, device = tensor.parts[0].linear.weight.dtype, tensor.parts[0].linear.weight.device

    def parameter(factor: Tensor) -> nn.Parameter:
        return nn.Parameter(factor.to(dtype=dtype, device=device).contiguous())

    if tensor.gram is not None and tensor.is_whitened_matrix:
        (part,) = tensor.parts
        up_OR, down_RI = low_rank_factors(part.linear.weight, spectrum(part.linear.weight, tensor.gram.matrix_II), ranks[0])
        return [LowRankLinear.from_factors(parameter(up_OR), parameter(down_RI), _bias(part))]
    prepared_MDN, undo = tensor.prepared()
    factors: Factors
    if isinstance(method, Tucker):
        factors = maths.tucker(prepared_MDN, ranks, sweeps=method.sweeps)
    else:
        factors = maths.cp(prepared_MDN, ranks[0], sweeps=method.sweeps)
    for matrix, mode in undo:
        factors = maths.with_mode_times(factors, matrix, mode)
    return _cp_modules(factors, tensor.parts, parameter) if isinstance(factors, CPFactors) else _tucker_modules(factors, tensor.parts, parameter)


def _note(gram: Gram | None) -> str:
    """What had to be done to the statistics of its inputs."""
    if gram is None or not gram.floor:
        return ""
    return f"the rows do not span all input channels ({gram.num_dead_channels} are always zero), so a floor of {gram.floor} was added: more rows may help"


def _tucker_modules(factors: TuckerFactors, parts: Sequence[_Part], parameter: Any) -> list[Any]:
    """With one set of shared parameters. Where only the model width is cut, and that below the smallest matrix, low-rank linears are the same thing."""
    width_MR, smallest = factors.width_MR, min(min(part.linear.weight.shape) for part in parts)
    is_whole = factors.head_DK is None and factors.mix_NP is None and len({part.reads_heads for part in parts}) == 1
    if is_whole and width_MR is not None and width_MR.shape[1] <= smallest:  # a down-projection cannot be tied to an up-projection
        return _low_rank_modules(factors, width_MR, parts, parameter)
    core_PKR = factors.core_RKP.permute(2, 1, 0)
    width_RM = None if factors.width_MR is None else parameter(factors.width_MR.t())
    head_DK = None if factors.head_DK is None else parameter(factors.head_DK)
    shared_PKR = None if factors.mix_NP is None else parameter(core_PKR)
    return [
        TuckerLinear(
            core_PKR=parameter(core_PKR[part.heads]) if shared_PKR is None else shared_PKR,
            width_RM=width_RM,
            head_DK=head_DK,
            mix_HP=None if factors.mix_NP is None else parameter(factors.mix_NP[part.heads]),
            bias_O=_bias(part),
            reads_heads=part.reads_heads,
        )
        for part in parts
    ]


def _low_rank_modules(factors: TuckerFactors, width_MR: Tensor, parts: Sequence[_Part], parameter: Any) -> list[Any]:
    shared = parameter(width_MR if parts[0].reads_heads else width_MR.t())
    modules = []
    for part in parts:
        slices_OR = factors.core_RKP[..., part.heads].permute(2, 1, 0).flatten(0, 1).to(shared.dtype)
        if part.reads_heads:
            module = LowRankLinear.from_factors(shared, slices_OR.t(), _bias(part))
            module.up.weight = shared
        else:
            module = LowRankLinear.from_factors(slices_OR, shared, _bias(part))
            module.down.weight = shared
        modules.append(module)
    return modules


def _cp_modules(factors: CPFactors, parts: Sequence[_Part], parameter: Any) -> list[Any]:
    width_RM, head_DR = parameter(factors.width_MC.t()), parameter(factors.head_DC)
    return [
        CPLinear(width_RM=width_RM, head_DR=head_DR, mix_HR=parameter(factors.mix_NC[part.heads]), bias_O=_bias(part), reads_heads=part.reads_heads)
        for part in parts
    ]


def _bias(part: _Part) -> Tensor | None:
    return None if part.linear.bias is None else part.linear.bias.detach().clone()


def _dense_OI(module: Any) -> Tensor:
    """The weight that a module stands for, of its factors as they are stored, multiplied in float64."""
    if isinstance(module, LowRankLinear):
        return module.up.weight.double() @ module.down.weight.double()
    return module.dense_OI(torch.float64)


def _head_width(model: Any, slot: Slot) -> int:
    return model.config.d_kv if model.config.is_encoder_decoder else model.get_submodule(slot.path.rpartition(".")[0]).head_dim
