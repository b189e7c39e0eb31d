"""Laws of one matrix, against SVD-LLM's formula by Cholesky and SVD in float64; and inputs on which that formula fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmdistill.compress import low_rank_maths as maths

SIZES = [(7, 12), (12, 7), (9, 9)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_and_inputs(num_outputs: int, num_inputs: int, num_tokens: int = 60) -> tuple[Tensor, Tensor]:
    """Inputs that are correlated, with channels of very different sizes."""
    mix_II = normal(num_inputs, num_inputs, seed=1) * torch.logspace(0, -2, num_inputs, dtype=torch.float64)
    return normal(num_outputs, num_inputs), normal(num_tokens, num_inputs, seed=2) @ mix_II


def truncated(weight_OI: Tensor, gram_II: Tensor | None, rank: int) -> Tensor:
    up_OR, down_RI = maths.factors(weight_OI, maths.spectrum(weight_OI, gram_II), rank)
    assert torch.isfinite(up_OR).all()
    assert torch.isfinite(down_RI).all()
    return up_OR @ down_RI


def asvd(weight_OI: Tensor, x_TI: Tensor, rank: int) -> Tensor:
    """By ASVD's own formula: scale, cut, scale back."""
    scale_I = x_TI.abs().mean(0) ** 0.5
    left, values, right = torch.linalg.svd(weight_OI * scale_I, full_matrices=False)
    return left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank] / scale_I


@pytest.mark.parametrize("size", SIZES)
def test_is_svd_llms_formula(size: tuple[int, int]) -> None:
    weight_OI, x_TI = weight_and_inputs(*size)
    gram_II = x_TI.t() @ x_TI
    root_II = torch.linalg.cholesky(gram_II)
    left, values, right = torch.linalg.svd(weight_OI @ root_II, full_matrices=False)
    for rank in range(1, min(size) + 1):
        expected = left[:, :rank] @ torch.diag(values[:rank]) @ torch.linalg.solve_triangular(root_II, right[:rank], upper=False, left=False)
        torch.testing.assert_close(truncated(weight_OI, gram_II, rank), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", SIZES)
def test_is_asvds_formula_and_the_truncated_svd(size: tuple[int, int]) -> None:
    weight_OI, x_TI = weight_and_inputs(*size)
    left, values, right = torch.linalg.svd(weight_OI, full_matrices=False)
    for rank in range(1, min(size) + 1):
        scaled = truncated(weight_OI, maths.activation_gram(x_TI.abs().mean(0), 0.5).matrix_II, rank)
        torch.testing.assert_close(scaled, asvd(weight_OI, x_TI, rank), rtol=1e-7, atol=1e-9)
        plain = left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]
        torch.testing.assert_close(truncated(weight_OI, None, rank), plain, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_the_whitened_error_is_the_closed_form_and_no_other_is_less(size: tuple[int, int]) -> None:
    weight_OI, x_TI = weight_and_inputs(*size)
    gram_II, total = x_TI.t() @ x_TI, float((x_TI @ weight_OI.t()).norm())
    gram = maths.floored(gram_II)
    assert (gram.num_dead_channels, gram.floor) == (0, 0.0)
    spectrum = maths.spectrum(weight_OI, gram.matrix_II)
    errors = []
    for rank in range(1, min(size) + 1):
        whitened = truncated(weight_OI, gram.matrix_II, rank)
        errors.append(maths.output_error(weight_OI, whitened, gram_II))
        assert errors[-1] * total == pytest.approx(float((x_TI @ (weight_OI - whitened).t()).norm()), rel=1e-6, abs=1e-6 * total)
        assert errors[-1] * total == pytest.approx(maths.least_error(weight_OI, gram_II, rank), rel=1e-6, abs=1e-6 * total)
        assert errors[-1] == pytest.approx(spectrum.relative_error(rank), rel=1e-6, abs=1e-6)
        for other in (truncated(weight_OI, None, rank), asvd(weight_OI, x_TI, rank)):
            assert errors[-1] <= maths.output_error(weight_OI, other, gram_II) + 1e-6
    assert errors == sorted(errors, reverse=True)
    torch.testing.assert_close(truncated(weight_OI, gram.matrix_II, min(size)), weight_OI, rtol=1e-9, atol=1e-9)


def few_tokens(x_TI: Tensor) -> Tensor:
    return x_TI[:3]


def dead_channels(x_TI: Tensor) -> Tensor:
    return torch.cat([x_TI[:, :-2], torch.zeros_like(x_TI[:, :2])], 1)


def duplicates(x_TI: Tensor) -> Tensor:
    return torch.cat([x_TI[:, :-3], x_TI[:, :3]], 1)


def no_input(x_TI: Tensor) -> Tensor:
    return torch.zeros_like(x_TI)


def outlier(x_TI: Tensor) -> Tensor:
    return torch.cat([x_TI[:, :-1], x_TI[:, -1:] * 1e6], 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spoil, num_dead", [(few_tokens, 0), (dead_channels, 2), (duplicates, 0), (no_input, -1)])
def test_a_singular_gram_gives_the_optimum_and_is_told(size: tuple[int, int], spoil: Callable[[Tensor], Tensor], num_dead: int) -> None:
    weight_OI, x_TI = weight_and_inputs(*size)
    x_TI = spoil(x_TI)
    gram_II, total = x_TI.t() @ x_TI, float((x_TI @ weight_OI.t()).norm())
    gram = maths.floored(gram_II)
    assert gram.num_dead_channels == (size[1] if num_dead < 0 else num_dead)
    assert gram.floor == maths.FLOOR
    best = torch.linalg.svdvals(x_TI @ weight_OI.t())
    for rank in range(1, min(size) + 1):
        lost = float((x_TI @ (weight_OI - truncated(weight_OI, gram.matrix_II, rank)).t()).norm())
        assert lost == pytest.approx(float(best[rank:].norm()), abs=2e-3 * total)  # the floor is a millionth of the squares
    torch.testing.assert_close(truncated(weight_OI, gram.matrix_II, min(size)), weight_OI, rtol=1e-9, atol=1e-9)


def test_without_any_input_it_is_the_truncated_svd() -> None:
    weight_OI = normal(6, 8)
    gram = maths.floored(torch.zeros(8, 8))
    torch.testing.assert_close(truncated(weight_OI, gram.matrix_II, 3), truncated(weight_OI, None, 3))


def test_what_the_rows_never_showed_is_kept_as_far_as_ranks_are_left() -> None:
    """Inputs of two dimensions need rank 2; the third rank goes to the rest of the weight as its plain SVD has it, and none is lost."""
    weight_OI = normal(6, 6)
    x_TI = normal(50, 2, seed=3) @ normal(2, 6, seed=4)
    gram = maths.floored(x_TI.t() @ x_TI)
    rest = [float((weight_OI - truncated(weight_OI, gram.matrix_II, rank)).norm()) for rank in range(2, 7)]
    assert rest == sorted(rest, reverse=True)
    assert rest[-1] < 1e-9


def test_one_huge_channel_does_not_hide_the_others() -> None:
    weight_OI, x_TI = weight_and_inputs(6, 9)
    x_TI = outlier(x_TI)
    gram_II = x_TI.t() @ x_TI
    lost = float((x_TI @ (weight_OI - truncated(weight_OI, maths.floored(gram_II).matrix_II, 4)).t()).norm())
    assert lost == pytest.approx(float(torch.linalg.svdvals(x_TI @ weight_OI.t())[4:].norm()), rel=1e-2)


def test_a_zero_weight_stays_zero() -> None:
    weight_OI = torch.zeros(5, 4, dtype=torch.float64)
    spectrum = maths.spectrum(weight_OI, torch.eye(4))
    assert spectrum.relative_error(1) == 0
    assert not truncated(weight_OI, None, 2).any()


def test_inputs_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="infinite or no numbers"):
        maths.floored(torch.full((3, 3), torch.nan))


def test_factors_are_balanced_and_do_not_depend_on_the_number_of_tokens() -> None:
    weight_OI, x_TI = weight_and_inputs(7, 12)
    gram_II = x_TI.t() @ x_TI
    up_OR, down_RI = maths.factors(weight_OI, maths.spectrum(weight_OI, gram_II), 5)
    assert float(up_OR.norm()) == pytest.approx(float(down_RI.norm()))
    inner_R = (x_TI @ down_RI.t()).norm(dim=0) / up_OR.norm(dim=0)
    torch.testing.assert_close(inner_R, inner_R[:1].expand(5), rtol=1e-6, atol=0)
    twice = maths.factors(weight_OI, maths.spectrum(weight_OI, 2 * gram_II), 5)
    torch.testing.assert_close(twice[0] @ twice[1], up_OR @ down_RI)
    assert float(twice[0].norm()) == pytest.approx(float(up_OR.norm()))


@pytest.mark.parametrize("size", SIZES)
def test_on_fixed_inputs_there_is_nothing_to_correct(size: tuple[int, int]) -> None:
    weight_OI, x_TI = weight_and_inputs(*size)
    for x in (x_TI, few_tokens(x_TI), dead_channels(x_TI), no_input(x_TI)):
        gram_II = x.t() @ x
        assert torch.equal(maths.corrected(weight_OI, gram_II, gram_II.clone()), weight_OI)


@pytest.mark.parametrize("size", SIZES)
def test_on_shifted_inputs_the_correction_is_the_least_squares_optimum(size: tuple[int, int]) -> None:
    weight_OI, x_TI = weight_and_inputs(*size)
    shifted_TI = x_TI @ (torch.eye(size[1], dtype=torch.float64) + 0.2 * normal(size[1], size[1], seed=5)) + 0.3 * normal(*x_TI.shape, seed=6)
    moments = maths.ShiftedMoments(gram_II=shifted_TI.t() @ shifted_TI, cross_II=shifted_TI.t() @ x_TI, original_II=x_TI.t() @ x_TI)
    target_TO = x_TI @ weight_OI.t()
    fitted_OI = maths.corrected(weight_OI, moments.gram_II, moments.cross_II)
    best_IO = torch.linalg.lstsq(shifted_TI, target_TO).solution
    assert float((shifted_TI @ fitted_OI.t() - target_TO).norm()) <= float((shifted_TI @ best_IO - target_TO).norm()) * (1 + 1e-3)
    for rank in range(1, min(size) + 1):
        refined, whitened = truncated(fitted_OI, moments.gram_II, rank), truncated(weight_OI, moments.gram_II, rank)
        error = maths.shifted_error(weight_OI, refined, moments)
        assert error == pytest.approx(float((target_TO - shifted_TI @ refined.t()).norm() / target_TO.norm()), rel=1e-6)
        assert error < maths.shifted_error(weight_OI, whitened, moments)
        assert error < maths.shifted_error(weight_OI, truncated(weight_OI, moments.original_II, rank), moments)


def test_works_on_weights_in_bfloat16_and_grams_in_float32() -> None:
    weight_OI, x_TI = weight_and_inputs(7, 12)
    low = weight_OI.bfloat16()
    low_product = truncated(low, maths.floored((x_TI.t() @ x_TI).float()).matrix_II, 7)
    torch.testing.assert_close(low_product, low.double(), rtol=1e-9, atol=1e-9)
