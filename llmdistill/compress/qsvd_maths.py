"""QSVD's mathematics: what a singular value does to the loss, how it is split between the factors, and what is put between them.

Importance. With H = S S^T the Gram matrix of the inputs (S = 1 where nothing is whitened) and the SVD W S = U diag(sigma) V^T of the stacked weights, the
weight is a sum of parts, W = sum_i sigma_i u_i v_i^T S^-1. Leaving part i out sets sigma_i to 0, with U and V as they are, so sigma_i is the number to look at:

    dL/dsigma_i = <G, u_i v_i^T S^-1> = [U^T G S^-T V]_ii        G = dL/dW

In whitened coordinates this is QSVD's [U^T G' V]_ii, with G' = G S^-T the gradient of W S. And since sigma_i v_i^T S^-1 = u_i^T W,

    sigma_i * dL/dsigma_i = [U^T G W^T U]_ii

in any coordinates: U is all that differs between plain and whitened, and nothing has to be inverted. This is, to first order, what the loss of one row falls by
when the part is left out. Over rows these numbers have either sign, and near a minimum of the loss a mean near zero; the mean of their squares is twice the
rise of the loss to second order, with the empirical Fisher matrix in place of the Hessian.

Outputs. Queries, keys and values that are stacked are compared by size, and sizes say little: what is lost of a value is seen by the loss, what is lost of a
query goes through a softmax first. So each output o of the stack is multiplied by d_o, the root mean square of the loss's gradient there, before the
decomposition, and the up-projections are divided by it: the norm that is least is ||D (W - W') S||, a diagonal of the Fisher matrix on one side and the inputs
on the other. Since dL/dW = sum_t g_t x_t^T with the same x for all outputs, the norms of the gradient's rows are those of the g's up to a factor. Above, W
stands for D W then, G for D^-1 G, and u_i for the directions of the scaled outputs.

Exponent. sigma^beta goes into the down-projection, so that its latents have that size, and sigma^(1 - beta) into the up-projections. In integers the latents
have one scale a token, and a row of an up-projection has one scale: a latent or a column that is small beside the others is lost. The one asks for a small
beta and the other for a large one, about equally strongly where both have the same bits, so that 0.5 is near the best; the search decides by ||Y - Y'||^2.
The rows of the down-projection have a scale each, and do not care.

Shapes: T tokens, I inputs, O outputs of all stacked weights, K = min(I, O), R rank, N size of a Hadamard matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmdistill.compress.low_rank_maths import Spectrum, factors
from llmdistill.compress.qsvd import Rotation

if TYPE_CHECKING:
    from jaxtyping import Float

EXPONENTS = tuple(step / 10 for step in range(11))
SMALLEST_HADAMARD = 8
LEAST_OUTPUT = 1e-3
"""Of the mean: what is added to the square of each output's weight."""


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """Stacked weights, and what their outputs count."""

    weight_OI: Float[Tensor, "O I"]
    scale_O: Float[Tensor, " O"]
    """D; ones where all count alike."""

    @property
    def scaled_OI(self) -> Float[Tensor, "O I"]:
        """D W, of which the spectrum is."""
        return self.weight_OI * self.scale_O[:, None]

    def parts(self, spectrum: Spectrum) -> tuple[Float[Tensor, "O K"], Float[Tensor, "K I"]]:
        """W as a sum over directions: D^-1 U, and U^T D W."""
        return spectrum.left_OK / self.scale_O[:, None], spectrum.left_OK.t() @ self.scaled_OI


def row_effects(up_OK: Tensor, down_KI: Tensor, gradient_OI: Tensor) -> Float[Tensor, " K"]:
    """sigma_i * dL/dsigma_i of one row, of the parts of a stack."""
    return ((up_OK.t() @ gradient_OI) * down_KI).sum(1)


def output_scale(mean_square_O: Tensor) -> Float[Tensor, " O"]:
    """D from the mean squared norms of the gradient's rows. Where the loss sees next to nothing of an output, it counts a little still."""
    mean = float(mean_square_O.mean())
    return (mean_square_O / mean + LEAST_OUTPUT).sqrt() if mean else torch.ones_like(mean_square_O)


def chosen(spectrum: Spectrum, index_R: Tensor) -> Spectrum:
    """These directions only."""
    return Spectrum(energy_K=spectrum.energy_K[index_R], left_OK=spectrum.left_OK[:, index_R])


def split(stacked: Stacked, kept: Spectrum, beta: float, rotation_RR: Tensor | None) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
    """up and down of the kept directions, in float64, with sigma^beta in down, and the rotation between them."""
    # factors() gives up the fourth root of the energy, the root of sigma: of energy^(2 - 2 beta) this is sigma^(1 - beta)
    powered = Spectrum(energy_K=kept.energy_K.double() ** (2 - 2 * beta), left_OK=kept.left_OK)
    up_OR, down_RI = factors(stacked.scaled_OI, powered, len(kept.energy_K))
    up_OR = up_OR / stacked.scale_O.double()[:, None]
    return (up_OR, down_RI) if rotation_RR is None else (up_OR @ rotation_RR.t(), rotation_RR @ down_RI)


def best_exponent(stacked: Stacked, kept: Spectrum, rotation_RR: Tensor | None, inputs_TI: Tensor, bits: int) -> tuple[float, dict[float, float]]:
    """The beta of the least error once factors and latent are quantized, and the errors of all that were tried: the grid, and beside the best of it."""
    outputs_TO = inputs_TI @ stacked.weight_OI.to(inputs_TI.dtype).t()
    errors: dict[float, float] = {}

    def best_of(betas: Sequence[float]) -> float:
        for beta in betas:
            up_OR, down_RI = (factor.to(inputs_TI.dtype) for factor in split(stacked, kept, beta, rotation_RR))
            errors[beta] = float((quantized_outputs(up_OR, down_RI, inputs_TI, bits) - outputs_TO).square().sum())
        return min(errors, key=lambda beta: (errors[beta], abs(beta - 0.5)))

    coarse = best_of(EXPONENTS)
    return best_of([round(beta, 2) for beta in (coarse - 0.05, coarse + 0.05) if 0 <= beta <= 1]), errors


def quantized_outputs(up_OR: Tensor, down_RI: Tensor, inputs_TI: Tensor, bits: int) -> Float[Tensor, "T O"]:
    """With weights rounded for each output channel, and the latent for each token. The inputs' own rounding is the same for any split, and left out."""
    latent_TR = rounded(inputs_TI @ rounded(down_RI, bits).t(), bits)
    return latent_TR @ rounded(up_OR, bits).t()


def rounded(matrix_AB: Tensor, bits: int) -> Float[Tensor, "A B"]:
    """Each row to signed integers of so many bits, symmetric, and back."""
    most = 2 ** (bits - 1) - 1
    scale_A1 = matrix_AB.abs().amax(1, keepdim=True) / most
    return (matrix_AB / scale_A1.clamp(min=torch.finfo(matrix_AB.dtype).tiny)).round() * scale_A1


def rotation(kind: Rotation, rank: int, seed: int) -> Float[Tensor, "R R"] | None:
    """An orthogonal matrix in float64, to be multiplied to the latent from the left."""
    if kind is Rotation.NONE:
        return None
    generator = torch.Generator().manual_seed(seed)
    size = rank & -rank  # the largest power of two that divides it
    if kind is Rotation.RANDOM or size < SMALLEST_HADAMARD:
        orthogonal_RR, upper_RR = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=generator))
        return orthogonal_RR * upper_RR.diagonal().sign()  # the QR that is unique, which makes it uniform
    # Each block mixes every (rank / size)th channel, so all of them get large and small ones; the signs keep channels of like sign from adding up.
    signs_R = torch.randint(2, (rank,), generator=generator).double() * 2 - 1
    return torch.kron(_hadamard(size), torch.eye(rank // size, dtype=torch.float64)) * signs_R


def _hadamard(size: int) -> Float[Tensor, "N N"]:
    """Sylvester's, orthonormal."""
    matrix_NN = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix_NN) < size:
        matrix_NN = torch.cat([torch.cat([matrix_NN, matrix_NN], 1), torch.cat([matrix_NN, -matrix_NN], 1)])
    return matrix_NN / math.sqrt(size)
