"""Parity: integers alone come within one unit of what rounding in floating point gives."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.compress.integer_only import INT32_MAX, INT32_MIN, IntegerLinear, Range, doubling_high_multiply, fixed_point, multiply, rounding_shift

INT32 = st.integers(INT32_MIN, INT32_MAX)


def nearest_away(value: Fraction) -> int:
    """Ties away from zero."""
    size = abs(value) + Fraction(1, 2)
    return int(size) if value >= 0 else -int(size)


@given(INT32, INT32)
def test_doubling_high_multiply_is_the_rounded_product(a: int, b: int) -> None:
    expected = min(nearest_away(Fraction(a * b, 2**31)), INT32_MAX)
    assert int(doubling_high_multiply(torch.tensor(a), torch.tensor(b))) == expected


def test_doubling_high_multiply_saturates_where_the_product_is_too_large() -> None:
    least = torch.tensor(INT32_MIN)
    assert int(doubling_high_multiply(least, least)) == INT32_MAX


@given(INT32, st.integers(0, 31))
def test_rounding_shift_is_the_rounded_quotient(x: int, bits: int) -> None:
    assert int(rounding_shift(torch.tensor(x), torch.tensor(bits))) == nearest_away(Fraction(x, 2**bits))


@given(st.floats(1e-9, 1e4))
def test_a_multiplier_is_a_fraction_of_31_bits_and_a_shift(value: float) -> None:
    whole, shift = (int(part) for part in fixed_point(torch.tensor(value, dtype=torch.float64)))
    assert 2**30 <= whole < 2**31
    assert abs(Fraction(whole, 2**31) / Fraction(2) ** shift / Fraction(value) - 1) <= Fraction(1, 2**31)


@given(st.integers(-(2**24), 2**24), st.floats(1e-6, 100.0))
def test_multiplying_by_it_is_within_a_unit_of_the_real_product(accumulated: int, value: float) -> None:
    whole, shift = fixed_point(torch.tensor(value, dtype=torch.float64))
    exact = max(min(accumulated * Fraction(value), Fraction(INT32_MAX)), Fraction(INT32_MIN))
    assert abs(int(multiply(torch.tensor(accumulated), whole, shift)) - exact) <= 1 + abs(exact) * Fraction(1, 2**30)


def test_a_left_shift_saturates() -> None:
    whole, shift = fixed_point(torch.tensor(64.0))
    assert multiply(torch.tensor([2**30, -(2**30)]), whole, shift).tolist() == [INT32_MAX // 2 + 1, INT32_MIN // 2]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_multipliers_that_no_scales_have(value: float) -> None:
    with pytest.raises(ValueError, match="a multiplier is"):
        fixed_point(torch.tensor([value]))


@pytest.mark.parametrize("low, high", [(-3.0, 5.0), (0.5, 5.0), (-3.0, -1.0), (0.0, 0.0)])
def test_zero_is_one_of_the_numbers_of_a_range(low: float, high: float) -> None:
    range_ = Range.of(low, high)
    assert 0 <= range_.zero <= 255
    assert float(range_.real(range_.quantize(torch.zeros(1)))) == 0.0
    ends = torch.tensor([low, high])
    assert ((range_.real(range_.quantize(ends)) - ends).abs() <= range_.scale).all()


def random_linear(seed: int, num_inputs: int, num_outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(num_outputs, num_inputs, generator=generator, dtype=torch.float64) * num_inputs**-0.5
    weight_OI[0] *= 100  # rows of very different sizes, as a scale for each allows
    weight_OI[1] /= 100
    return weight_OI, torch.randn(num_outputs, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("input_ends", [(-3.0, 4.0), (0.0, 2.0)])
@pytest.mark.parametrize("output_size", [0.05, 1.0, 30.0])
def test_a_linear_in_integers_is_within_one_unit_of_rounding_in_floating_point(
    output_size: float, input_ends: tuple[float, float], has_bias: bool, relu: bool
) -> None:
    weight_OI, bias_O = random_linear(0, 200, 30)
    input_range, output_range = Range.of(*input_ends), Range.of(-output_size, output_size)
    linear = IntegerLinear.of(weight_OI, bias_O if has_bias else None, input_range, output_range, relu=relu)
    code_MI = torch.randint(0, 256, (50, 200), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    weight_range = Range.of_rows(weight_OI)
    real_MO = input_range.real(code_MI) @ weight_range.real(linear.code_OI).t()
    real_MO = real_MO + (bias_O if has_bias else 0)
    expected = output_range.quantize(real_MO.clamp(min=0) if relu else real_MO).int()
    got = linear(code_MI)
    assert got.dtype == torch.uint8
    assert (got.int() - expected).abs().max() <= 1
    assert (got.int() == expected).double().mean() > 0.97
    assert not relu or int(got.min()) >= output_range.zero


def test_the_sums_are_those_of_codes_without_their_zeros() -> None:
    weight_OI, bias_O = random_linear(0, 64, 8)
    linear = IntegerLinear.of(weight_OI, bias_O, Range.of(-1, 2), Range.of(-5, 5), relu=False)
    code_MI = torch.randint(0, 256, (9, 64), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    expected = (code_MI.long() - linear.input_zero) @ (linear.code_OI.long() - linear.weight_zero).t() + linear.bias_O
    assert torch.equal(linear.accumulated(code_MI), expected)


def test_linear_relu_linear_in_integers_follows_the_floating_point_one() -> None:
    """The second linear reads what the first one wrote, and nothing in between is real. Its unit may differ, since the first one's may by one."""
    first, second = random_linear(0, 64, 96), random_linear(1, 96, 16)
    first[0][0] /= 100
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    hidden = (x @ first[0].t() + first[1]).clamp(min=0)
    output = hidden @ second[0].t() + second[1]
    ranges = [Range.of(float(values.min()), float(values.max())) for values in (x, hidden, output)]
    layers = [IntegerLinear.of(*first, ranges[0], ranges[1], relu=True), IntegerLinear.of(*second, ranges[1], ranges[2], relu=False)]
    code = layers[1](layers[0](ranges[0].quantize(x)))

    real = ranges[0].real(ranges[0].quantize(x))  # the same steps, rounded in floating point
    for layer, (weight_OI, bias_O), out in zip(layers, (first, second), ranges[1:], strict=True):
        real = out.real(out.quantize(real @ Range.of_rows(weight_OI).real(layer.code_OI).t() + bias_O))
        real = real.clamp(min=0) if layer.relu else real
    assert (code.int() - ranges[2].quantize(real).int()).abs().max() <= 1
    error = (ranges[2].real(code) - output).norm() / output.norm()
    assert error < 0.03


def test_refuses_a_bias_that_no_32_bits_hold() -> None:
    with pytest.raises(ValueError, match="beyond 32 bits"):
        IntegerLinear.of(torch.full((1, 4), 1e-9), torch.ones(1), Range.of(-1, 1), Range.of(-1, 1), relu=False)
