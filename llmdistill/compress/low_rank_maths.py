"""Low rank of one matrix, in float64: plain, by activations, whitened; and what to aim at when the inputs have shifted.

All three forms minimise ||(W - W') S||_F over the W' of rank R, for a matrix S that says how much of what the inputs hold:

    plain       S = 1                                                   the truncated SVD (Eckart and Young 1936)
    activation  S = diag(mean |x| ^ alpha)                              ASVD (Yuan et al. 2023, section 3.2)
    whitened    S S^T = H = X^T X, so the norm is ||X W^T - X W'^T||    SVD-LLM (Wang et al. 2024, section 3.1)

SVD-LLM takes S from a Cholesky decomposition of H and sets W' = U_R diag(s) V_R^T S^-1 with the SVD W S = U diag(s) V^T. Both steps fail where H is singular:
fewer tokens than channels, a channel that is always zero, two that are the same. Where we differ: since diag(s) V^T S^-1 = U^T W, it is W' = U_R U_R^T W.
So all that is needed are the leading eigenvectors U of W H W^T, the covariance of the outputs, which always exist; nothing is inverted, and what the
calibration rows never showed is projected like all the rest. The least error is the sum of the eigenvalues that are left out.

What a singular H leaves open is the order of directions in which the rows have no output at all. There a floor decides: where the smallest eigenvalue of H is
below FLOOR times the median of the diagonal of its live channels, that much is added to the diagonal, so that these directions come in the order of the plain
SVD, after all others. A dead channel (zero on every token) thus weighs FLOOR of a usual one. Where all channels are dead, the result is the plain SVD.

Shifted inputs. Once earlier layers are compressed, a layer reads X' in place of X, and what it should give is still Y = X W^T. The best full-rank weight for
that is B = Y^T X' (X'^T X')^-1, and the best one of rank R is the projection of B on the leading eigenvectors of B X'^T X' B^T (reduced-rank regression,
Izenman 1975): the same truncation as above, of B with the Gram matrix of X'. It takes the place of SVD-LLM's fine-tuning of the factors by gradient descent
with the optimum of its objective. A ridge towards W keeps what the rows do not determine. On inputs that have not shifted, B is W.

Shapes: I inputs, O outputs, K = min(I, O), R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

FLOOR = 1e-6
RIDGE = 1e-4
"""Of the median diagonal of X'^T X': how strongly B is drawn to W."""
LEAST_SCALE = 1e-3
"""Of the largest: no inner channel is scaled by less, so that directions of no output get no huge factors."""


@dataclass(frozen=True, kw_only=True)
class Gram:
    """X^T X, ready to use, and what had to be done for that."""

    matrix_II: Float[Tensor, "I I"]
    num_dead_channels: int
    floor: float
    """Added to the diagonal, relative to the median of the live channels; 0 where nothing was."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The directions of a weight's outputs, the ones with most energy first."""

    energy_K: Float[Tensor, " K"]
    """Squared singular values of W S: what leaving out each direction adds to the squared error."""
    left_OK: Float[Tensor, "O K"]
    """U, orthonormal."""

    def relative_error(self, rank: int) -> float:
        """||(W - W') S|| / ||W S|| of this rank; 0 for a weight that gives nothing."""
        total = float(self.energy_K.sum())
        return (float(self.energy_K[rank:].sum()) / total) ** 0.5 if total else 0.0


def floored(gram_II: Tensor) -> Gram:
    """The Gram matrix with the floor where it is singular, or near to it."""
    gram_II = gram_II.double()
    diagonal_I = gram_II.diagonal()
    if not bool(torch.isfinite(diagonal_I).all()):
        raise ValueError("inputs of a linear are infinite or no numbers on the calibration rows: look at the model's weights, or use a wider dtype")
    live_I = diagonal_I > 0
    num_dead = int((~live_I).sum())
    if num_dead == len(live_I):
        return Gram(matrix_II=torch.eye(len(live_I), dtype=gram_II.dtype, device=gram_II.device), num_dead_channels=num_dead, floor=FLOOR)
    added = torch.eye(len(live_I), dtype=gram_II.dtype, device=gram_II.device) * (FLOOR * diagonal_I[live_I].median())
    if num_dead == 0 and int(torch.linalg.cholesky_ex(gram_II - added).info) == 0:  # its smallest eigenvalue is above the floor
        return Gram(matrix_II=gram_II, num_dead_channels=0, floor=0.0)
    return Gram(matrix_II=gram_II + added, num_dead_channels=num_dead, floor=FLOOR)


def activation_gram(mean_magnitude_I: Tensor, alpha: float) -> Gram:
    """ASVD's S S^T, a diagonal one."""
    return floored(torch.diag(mean_magnitude_I.double() ** (2 * alpha)))


def spectrum(weight_OI: Tensor, gram_II: Tensor | None) -> Spectrum:
    """By the eigenvectors of W H W^T; without a Gram matrix of W W^T. Where outputs are more than inputs, within the space that W's columns span."""
    weight_OI = weight_OI.detach().double()
    num_outputs, num_inputs = weight_OI.shape
    basis_OK, within_KI = torch.linalg.qr(weight_OI) if num_outputs > num_inputs else (None, weight_OI)
    covariance_KK = within_KI @ within_KI.t() if gram_II is None else within_KI @ gram_II.double() @ within_KI.t()
    energy_K, left_KK = torch.linalg.eigh((covariance_KK + covariance_KK.t()) / 2)
    left_KK = left_KK.flip(1)
    return Spectrum(energy_K=energy_K.flip(0).clamp(min=0), left_OK=left_KK if basis_OK is None else basis_OK @ left_KK)


def lost_energy(weight_OI: Tensor, spectrum: Spectrum, gram_II: Tensor) -> Float[Tensor, " K"]:
    """What leaving out each direction of a spectrum, of whatever form, adds to the squared error of the outputs on these inputs."""
    down_KI = spectrum.left_OK.t() @ weight_OI.detach().double()
    return ((down_KI @ gram_II.double()) * down_KI).sum(1).clamp(min=0)


def factors(weight_OI: Tensor, spectrum: Spectrum, rank: int) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
    """up and down, with up @ down = U_R U_R^T W, in float64.

    Each inner channel is scaled by the root of its singular value, as in SVD-LLM: its activations and its column of `up` then have the same size, which suits
    quantization. One more factor for all channels gives `up` and `down` the same norm, which suits training, and makes the result independent of the number
    of tokens.
    """
    up_OR = spectrum.left_OK[:, :rank].double()
    down_RI = up_OR.t() @ weight_OI.detach().double()
    scale_R = spectrum.energy_K[:rank].double() ** 0.25
    scale_R = scale_R.clamp(min=LEAST_SCALE * float(scale_R.max())) if float(scale_R.max()) else torch.ones_like(scale_R)
    up_OR, down_RI = up_OR * scale_R, down_RI / scale_R[:, None]
    if float(down_RI.norm()):
        both = (down_RI.norm() / up_OR.norm()) ** 0.5
        up_OR, down_RI = up_OR * both, down_RI / both
    return up_OR, down_RI


def corrected(weight_OI: Tensor, gram_II: Tensor, cross_II: Tensor) -> Float[Tensor, "O I"]:
    """The weight B that gives on the shifted inputs X' what `weight_OI` gives on X. `gram_II` is X'^T X', `cross_II` is X'^T X."""
    weight_OI, gram_II = weight_OI.detach().double(), gram_II.double()
    diagonal_I = gram_II.diagonal()
    live_I = diagonal_I > 0
    if not bool(live_I.any()):
        return weight_OI
    ridge_II = torch.eye(len(live_I), dtype=gram_II.dtype, device=gram_II.device) * (RIDGE * diagonal_I[live_I].median())
    # B = W + (what is missing), so that inputs that have not shifted give W itself and not W up to rounding
    missing_IO = (cross_II.double() - gram_II) @ weight_OI.t()
    return weight_OI + torch.linalg.solve(gram_II + ridge_II, missing_IO).t()


def output_error(weight_OI: Tensor, other_OI: Tensor, gram_II: Tensor) -> float:
    """||X (W - W')^T||_F / ||X W^T||_F, in float64; 0 where W gives nothing."""
    weight_OI, difference_OI, gram_II = weight_OI.detach().double(), (weight_OI.detach().double() - other_OI.detach().double()), gram_II.double()
    return _root_ratio(_energy(difference_OI, gram_II), _energy(weight_OI, gram_II))


def shifted_error(weight_OI: Tensor, other_OI: Tensor, moments: ShiftedMoments) -> float:
    """||X W^T - X' W'^T||_F / ||X W^T||_F, in float64."""
    weight_OI, other_OI = weight_OI.detach().double(), other_OI.detach().double()
    total = _energy(weight_OI, moments.original_II)
    together = float(((other_OI @ moments.cross_II) * weight_OI).sum())
    return _root_ratio(total - 2 * together + _energy(other_OI, moments.gram_II), total)


def least_error(weight_OI: Tensor, gram_II: Tensor, rank: int) -> float:
    """The least ||X (W - W')^T||_F of this rank: the root of the sum of the squared singular values of W S that are left out, S by Cholesky."""
    values_K = torch.linalg.svdvals(weight_OI.detach().double() @ torch.linalg.cholesky(gram_II.double()))
    return float(values_K[rank:].square().sum().sqrt())


@dataclass
class ShiftedMoments:
    """Of the inputs that a layer reads now, X', and those that it read before anything was compressed, X."""

    gram_II: Float[Tensor, "I I"]
    """X'^T X'"""
    cross_II: Float[Tensor, "I I"]
    """X'^T X"""
    original_II: Float[Tensor, "I I"]
    """X^T X"""


def _energy(weight_OI: Tensor, gram_II: Tensor) -> float:
    return float(((weight_OI @ gram_II) * weight_OI).sum())


def _root_ratio(part: float, total: float) -> float:
    return (max(0.0, part) / total) ** 0.5 if total > 0 else 0.0
