"""Least squares with coefficients that are not negative, by Lawson and Hanson's active set.

Source: Lawson and Hanson 1974, "Solving least squares problems", chapter 23, algorithm NNLS: coefficients are let in one by one, the one that lowers the error
fastest first, and those that an unconstrained solution among them would make negative leave again. scipy has it, but is no dependency of this package.

Shapes: N rows, F coefficients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

_TOLERANCE = 1e-11  # of gradients, with columns and targets of length 1


def nonnegative_least_squares(matrix_NF: Float[ndarray, "N F"], targets_N: Float[ndarray, " N"]) -> Float[ndarray, " F"]:
    """The coefficients, none below 0, with the least sum of squared errors, in float64."""
    matrix_NF, targets_N = np.asarray(matrix_NF, dtype=np.float64), np.asarray(targets_N, dtype=np.float64)
    if matrix_NF.ndim != 2 or targets_N.shape != matrix_NF.shape[:1] or not (np.isfinite(matrix_NF).all() and np.isfinite(targets_N).all()):
        raise ValueError(f"least squares needs a finite matrix and as many finite targets as it has rows, and has {matrix_NF.shape} and {targets_N.shape}")
    lengths_F, length = np.linalg.norm(matrix_NF, axis=0), float(np.linalg.norm(targets_N)) or 1.0
    lengths_F[lengths_F == 0] = 1.0
    return _active_set(matrix_NF / lengths_F, targets_N / length) * length / lengths_F


def _active_set(matrix_NF: Any, targets_N: Any) -> Any:
    num = matrix_NF.shape[1]
    found_F, within, tried = np.zeros(num), np.zeros(num, dtype=bool), np.zeros(num, dtype=bool)
    while True:
        gradient_F = matrix_NF.T @ (targets_N - matrix_NF @ found_F)
        gradient_F[within | tried] = 0.0
        best = int(np.argmax(gradient_F)) if num else 0
        if not num or gradient_F[best] <= _TOLERANCE:
            return found_F
        within[best] = True
        free_F = _solve(matrix_NF, targets_N, within)
        if free_F[best] <= 0:  # its gradient was rounding: a column that the others already make
            within[best] = False
            tried[best] = True
            continue
        while (free_F[within] <= 0).any():
            low = within & (free_F <= 0)
            step = float(np.min(found_F[low] / (found_F[low] - free_F[low])))
            found_F = found_F + step * (free_F - found_F)
            within &= found_F > 1e-15
            found_F[~within] = 0.0
            free_F = _solve(matrix_NF, targets_N, within)
        found_F = free_F
        tried[:] = False


def _solve(matrix_NF: Any, targets_N: Any, within: Any) -> Any:
    solution_F = np.zeros(len(within))
    solution_F[within] = np.linalg.lstsq(matrix_NF[:, within], targets_N, rcond=None)[0]
    return solution_F
