"""Tucker and CP decompositions of the heads of attention matrices, in float64, through tensorly; the start of each is an SVD, so nothing is random.

All heads are one tensor W_MDN of model width, head width and heads (models/tensor_linear.py). Grouped-query attention has fewer heads of k and v than of q,
and that is no difficulty: a head is a slice, whichever matrix it comes from.

Tucker. Let S be the core of the full HOSVD, W in the bases of left singular vectors of its three unfoldings (De Lathauwer et al. 2000a). Its bases are
orthonormal, so cutting it to its first (R, K, P) entries leaves out exactly the energy of the others: sums of S^2 give the error of all ranks at once, and
the ranks of the least error under a budget are found by looking. A mode of full rank costs no matrix, since its basis is multiplied into the core; with only
the model width cut this is one truncated SVD of all matrices side by side. Then higher-order orthogonal iteration (De Lathauwer et al. 2000b, tensorly's
`partial_tucker`) improves the bases, which never adds to the error.

CP. Alternating least squares (tensorly's `parafac`) from the better of two starts: the truncated SVDs of all heads (each a matrix M x D), or of all channels
of the head width (each M x N), with one ranking of singular values over all of them. Each start is itself a CP of that rank, its error never grows with the
rank and is zero once all singular values are in, and no sweep adds to the error. So the result is at most that of the starts; from one rank to the next ALS
itself promises nothing. On SmolLM2's attention these starts end at 0.69 to 0.96 of the error that random ones reach in the same 60 sweeps.

Shapes: M model width, D head width, N heads of all matrices; R, K, P Tucker ranks of the three; C components of a CP.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor

RACE_SWEEPS = 5  # of each start of a CP, before the worse is given up
TOLERANCE = 1e-7  # of the relative error from one sweep to the next: further ones are left out
RIDGE = 1e-10  # on the least squares of a CP of a tensor of norm 1, where components have become parallel


@dataclass(frozen=True, kw_only=True)
class TuckerFactors:
    """W = core x width x head x mix; None stands for the identity, in a mode of full rank."""

    core_RKP: Tensor
    width_MR: Tensor | None
    head_DK: Tensor | None
    mix_NP: Tensor | None

    def dense_MDN(self) -> Tensor:
        """The tensor that they make."""
        dense = self.core_RKP
        for mode, factor in enumerate((self.width_MR, self.head_DK, self.mix_NP)):
            dense = dense if factor is None else times(dense, factor, mode)
        return dense


@dataclass(frozen=True, kw_only=True)
class CPFactors:
    """W = sum over components of width x head x mix."""

    width_MC: Tensor
    head_DC: Tensor
    mix_NC: Tensor

    def dense_MDN(self) -> Tensor:
        """The tensor that they make."""
        return torch.einsum("mc,dc,nc->mdn", self.width_MC, self.head_DC, self.mix_NC)


Factors = TuckerFactors | CPFactors


def stack_heads(weights: Sequence[tuple[Tensor, bool]], head_width: int) -> Tensor:
    """W_MDN of weights (outputs, inputs) in float64; the flag says that heads are a weight's inputs, as in o."""
    heads_NDM = [(weight.t() if reads_heads else weight).detach().double().unflatten(0, (-1, head_width)) for weight, reads_heads in weights]
    return torch.cat(heads_NDM).permute(2, 1, 0).contiguous()


def times(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Every vector along the mode, multiplied by the matrix from the left."""
    return (tensor.movedim(mode, -1) @ matrix.t()).movedim(-1, mode)


def tucker_parameters(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """The numbers that these ranks hold; a mode of full rank has no matrix."""
    return math.prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks, strict=True) if rank < size)


def cp_parameters(shape: Sequence[int], rank: int) -> int:
    """The numbers that a CP of this rank holds."""
    return rank * sum(shape)


def cp_rank(shape: Sequence[int], budget: int) -> int:
    """The largest rank that holds at most so many numbers. ValueError where not even 1 does."""
    if budget < sum(shape):
        size = " x ".join(map(str, shape))
        raise ValueError(f"{budget} parameters are too few for a CP decomposition of {size}, which takes at least {sum(shape)}: keep more")
    return budget // sum(shape)


@torch.no_grad()
def tucker_ranks(weight_MDN: Tensor, budget: int) -> tuple[int, int, int]:
    """The ranks of the least HOSVD error that hold at most so many numbers; of equal ones the cheapest. ValueError where none do."""
    num_M, num_D, num_N = weight_MDN.shape
    core_MDN, _ = _hosvd(weight_MDN)
    energy_MDN = core_MDN.square_().cumsum_(0).cumsum_(1).cumsum_(2)
    best: tuple[float, int, tuple[int, int, int]] | None = None
    enough = float(energy_MDN[-1, -1, -1]) * (1 - 1e-13)
    for head in range(1, num_D + 1):
        for mix in range(1, num_N + 1):
            left = budget - (head * num_D if head < num_D else 0) - (mix * num_N if mix < num_N else 0)
            width = num_M if head * mix * num_M <= left else min(num_M - 1, left // (head * mix + num_M), head * mix)
            least = max(1, math.ceil(head / mix) if head < num_D else 1, math.ceil(mix / head) if mix < num_N else 1)
            if width < least:
                continue
            energies_M = energy_MDN[:width, head - 1, mix - 1]
            width = max(least, int(torch.searchsorted(energies_M.contiguous(), min(float(energies_M[-1]), enough))) + 1)
            ranks = (width, head, mix)
            candidate = (float(energies_M[width - 1]), -tucker_parameters(weight_MDN.shape, ranks), ranks)
            best = candidate if best is None or (min(candidate[0], enough), candidate[1]) > (min(best[0], enough), best[1]) else best
    if best is None:
        fewest = min(tucker_parameters(weight_MDN.shape, ranks) for ranks in itertools.product(*((1, size) for size in weight_MDN.shape)))
        size = " x ".join(map(str, weight_MDN.shape))
        raise ValueError(f"{budget} parameters are too few for a Tucker decomposition of {size}, which takes at least {fewest}: keep more")
    return best[2]


@torch.no_grad()
def tucker(weight_MDN: Tensor, ranks: Sequence[int], *, sweeps: int) -> TuckerFactors:
    """By HOSVD, then at most so many sweeps over the modes. A rank above its mode's size, or above the product of the others, adds nothing and is lowered."""
    ranks = possible_ranks(weight_MDN.shape, ranks)
    modes = [mode for mode in range(3) if ranks[mode] < weight_MDN.shape[mode]]
    _, bases = _hosvd(weight_MDN)
    norm = float(weight_MDN.norm())
    factors = [bases[mode][:, : ranks[mode]].contiguous() for mode in modes]
    core = _core(weight_MDN, factors, modes)
    if len(modes) > 1 and sweeps and norm:  # with one mode the SVD is the optimum
        with _torch_backend():
            start: Any = (core, list(factors))
            (swept, better), _ = partial_tucker(weight_MDN, [ranks[mode] for mode in modes], modes=modes, n_iter_max=sweeps, init=start, tol=TOLERANCE)
        if float(swept.norm()) >= float(core.norm()):  # orthonormal factors: what the core has is what is not lost
            core, factors = swept, better
    by_mode = dict(zip(modes, factors, strict=True))
    return TuckerFactors(core_RKP=core, width_MR=by_mode.get(0), head_DK=by_mode.get(1), mix_NP=by_mode.get(2))


def possible_ranks(shape: Sequence[int], ranks: Sequence[int]) -> tuple[int, int, int]:
    """These ranks without what can add nothing: a rank is at most its mode's size, and one below that is at most the product of the others."""
    found = [min(rank, size) for rank, size in zip(ranks, shape, strict=True)]
    for _ in range(3):  # lowering one may lower another
        for mode in range(3):
            if found[mode] < shape[mode]:
                found[mode] = min(found[mode], math.prod(found) // found[mode])
    first, second, third = found
    return first, second, third


@torch.no_grad()
def cp(weight_MDN: Tensor, rank: int, *, sweeps: int) -> CPFactors:
    """By ALS with so many sweeps from the better start; at a rank at which a start is exact, that start, of the rank that it needs."""
    norm = float(weight_MDN.norm()) or 1.0
    scaled_MDN = weight_MDN / norm
    starts = [_start(scaled_MDN, rank, mode) for mode in (2, 1)]
    exact = [start for start in starts if start[0].shape[1] < rank or _error(scaled_MDN, start) < 1e-14]
    if exact or not sweeps:
        best = min(exact or starts, key=lambda start: (_error(scaled_MDN, start), start[0].shape[1]))
    else:
        raced = [_swept(scaled_MDN, start, min(sweeps, RACE_SWEEPS)) for start in starts]
        best = min(raced, key=lambda factors: _error(scaled_MDN, factors))
        best = _swept(scaled_MDN, best, sweeps - RACE_SWEEPS) if sweeps > RACE_SWEEPS else best
    return _balanced(best[0] * norm, best[1], best[2])


@torch.no_grad()
def whitener(gram_MM: Tensor) -> tuple[Tensor, Tensor]:
    """S and its inverse, with ||X W|| = ||S W|| for the inputs X of this Gram matrix, which must not be singular (low_rank_maths.floored)."""
    lower_MM = torch.linalg.cholesky(gram_MM)
    identity_MM = torch.eye(len(gram_MM), dtype=gram_MM.dtype, device=gram_MM.device)
    return lower_MM.t(), torch.linalg.solve_triangular(lower_MM.t(), identity_MM, upper=True)


@torch.no_grad()
def with_mode_times(factors: Factors, matrix: Tensor, mode: int) -> Factors:
    """The factors of the tensor that is multiplied by this matrix along a mode."""
    if isinstance(factors, CPFactors):
        three = [factors.width_MC, factors.head_DC, factors.mix_NC]
        three[mode] = matrix @ three[mode]
        return _balanced(*three)
    name = ("width_MR", "head_DK", "mix_NP")[mode]
    factor = getattr(factors, name)
    if factor is None:
        return replace(factors, core_RKP=times(factors.core_RKP, matrix, mode))
    return replace(factors, **{name: matrix @ factor})


@contextlib.contextmanager
def _torch_backend() -> Iterator[None]:
    """tensorly computes with torch within, and with what it had afterwards."""
    library: Any = tensorly
    with library.backend_context("pytorch", local_threadsafe=True):
        yield


def _core(tensor: Tensor, factors: Sequence[Tensor], modes: Sequence[int]) -> Tensor:
    for mode, factor in zip(modes, factors, strict=True):
        tensor = times(tensor, factor.t(), mode)
    return tensor.contiguous()


def _hosvd(tensor: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The full core and the bases of left singular vectors, the largest first. By eigenvectors of the Gram matrices: orthonormal whatever the rank."""
    bases = []
    for mode in range(3):
        unfolded = tensor.movedim(mode, 0).flatten(1)
        bases.append(torch.linalg.eigh(unfolded @ unfolded.t())[1].flip(1))
    return _core(tensor, bases, range(3)), bases


def _start(tensor: Tensor, rank: int, mode: int) -> list[Tensor]:
    """The largest singular components of all slices along a mode, at most `rank`: each is one component, in one slice only."""
    left_SAI, values_SI, right_SIB = torch.linalg.svd(tensor.movedim(mode, 0), full_matrices=False)
    num_slices, num_values = values_SI.shape
    chosen_C = values_SI.flatten().sort(descending=True, stable=True).indices[: min(rank, num_slices * num_values)]
    slice_C, value_C = chosen_C // num_values, chosen_C % num_values
    roots_C = values_SI[slice_C, value_C].sqrt()
    factors = [left_SAI[slice_C, :, value_C].t() * roots_C, right_SIB[slice_C, value_C].t() * roots_C]
    factors.insert(mode, torch.nn.functional.one_hot(slice_C, num_slices).t().to(tensor.dtype))
    return factors


def _swept(tensor: Tensor, factors: list[Tensor], sweeps: int) -> list[Tensor]:
    """After so many sweeps of ALS, unless rounding made them worse."""
    start: Any = (torch.ones(factors[0].shape[1], dtype=tensor.dtype, device=tensor.device), factors)
    ridge: Any = RIDGE
    with _torch_backend():
        swept: Any = parafac(tensor, factors[0].shape[1], n_iter_max=sweeps, init=start, tol=TOLERANCE, l2_reg=ridge)
    better = list(swept.factors)
    return better if _error(tensor, better) <= _error(tensor, factors) else factors


def _error(tensor: Tensor, factors: Sequence[Tensor]) -> float:
    return float((torch.einsum("mc,dc,nc->mdn", *factors) - tensor).norm())


def _balanced(width_MC: Tensor, head_DC: Tensor, mix_NC: Tensor) -> CPFactors:
    """The same components with their three vectors of one length, which suits low precision and training."""
    norms_3C = torch.stack([factor.norm(dim=0) for factor in (width_MC, head_DC, mix_NC)])
    length_C = norms_3C.prod(0) ** (1 / 3)
    scales_3C = torch.where(norms_3C > 0, length_C / norms_3C.clamp(min=torch.finfo(norms_3C.dtype).tiny), torch.zeros_like(norms_3C))
    return CPFactors(width_MC=width_MC * scales_3C[0], head_DC=head_DC * scales_3C[1], mix_NC=mix_NC * scales_3C[2])
