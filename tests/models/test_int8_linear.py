"""Laws: the integer product is exact, the output is within the bound of its scales, and what is loaded is what was saved."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llmdistill.models import int8_product
from llmdistill.models.int8_embedding import Int8Embedding
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.int8_product import PackedWeight, integer_product, product, quantize_rows, quantize_weight, quantized

SIZES = st.integers(1, 40)


def drawn(num_rows: int, num_inputs: int, num_outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_inputs, generator=generator), torch.randn(num_outputs, num_inputs, generator=generator)


@given(SIZES, st.integers(1, 300), SIZES, st.integers(0, 99), st.booleans())
def test_the_integer_product_is_exact(num_rows: int, num_inputs: int, num_outputs: int, seed: int, extreme: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, weight = (torch.randint(-127, 128, (num, num_inputs), generator=generator).to(torch.int8) for num in (num_rows, num_outputs))
    if extreme:
        rows = torch.full_like(rows, 127)
        weight = torch.where(weight > 0, 127, -127).to(torch.int8)
    assert torch.equal(integer_product(rows, weight).long(), rows.long() @ weight.long().t())


@given(SIZES, SIZES, SIZES, st.integers(0, 99))
def test_the_output_is_within_the_bound_of_its_scales(num_rows: int, num_inputs: int, num_outputs: int, seed: int) -> None:
    x_MI, weight_OI = drawn(num_rows, num_inputs, num_outputs, seed)
    integer_OI, scale_O = quantize_weight(weight_OI)
    _, scale_M1 = quantize_rows(x_MI)
    exact = x_MI.double() @ weight_OI.double().t()
    # |x w - x' w'| <= |x| |w - w'| + |x - x'| |w'|, each rounding half a step at most.
    of_weights = x_MI.double().abs().sum(1, keepdim=True) * scale_O.double() / 2
    of_rows = scale_M1.double() / 2 * (integer_OI.double() * scale_O.double()[:, None]).abs().sum(1)
    off = (product(x_MI, integer_OI, scale_O).double() - exact).abs()
    assert (off <= (of_weights + of_rows) * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_outputs_of_zeros_are_zeros(dtype: torch.dtype) -> None:
    linear = nn.Linear(6, 4, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight[1] = 0
    hidden = torch.randn(2, 3, 6, dtype=dtype)
    hidden[0, 1] = 0
    output = Int8Linear.from_linear(linear)(hidden)
    assert output.dtype == dtype
    assert output.shape == (2, 3, 4)
    assert (output[0, 1] == 0).all()
    assert (output[..., 1] == 0).all()
    assert output.isfinite().all()


def test_no_rows_give_no_rows() -> None:
    assert Int8Linear.from_linear(nn.Linear(6, 4))(torch.zeros(0, 6)).shape == (0, 4)


def test_a_bias_is_added() -> None:
    linear = nn.Linear(6, 4)
    hidden = torch.randn(5, 6)
    bare = Int8Linear.from_integers(*quantize_weight(linear.weight), None)
    torch.testing.assert_close(Int8Linear.from_linear(linear)(hidden), bare(hidden) + linear.bias)


def test_an_embeddings_rows_are_off_by_half_a_step_at_most_and_its_head_is_the_same_matrix() -> None:
    embedding = nn.Embedding(50, 8)
    quantized = Int8Embedding.from_embedding(embedding)
    tokens = torch.randint(0, 50, (2, 7))
    off = (quantized(tokens) - embedding(tokens)).abs()
    assert (off <= quantized.scale_O[tokens][..., None] / 2 * (1 + 1e-5)).all()
    head = quantized.head()
    assert head.weight is quantized.weight
    assert head.scale_O is quantized.scale_O
    torch.testing.assert_close(head.dequantized_OI(torch.float32)[tokens], quantized(tokens))


def test_a_change_of_dtype_leaves_integers_and_scales_alone() -> None:
    linear, embedding = Int8Linear.from_linear(nn.Linear(6, 4)), Int8Embedding.from_embedding(nn.Embedding(5, 6))
    scale = linear.scale_O.clone()
    module = nn.ModuleList([linear, embedding]).to(torch.bfloat16)
    assert {name: parameter.dtype for name, parameter in module.named_parameters()} == {
        "0.weight": torch.int8,
        "0.scale_O": torch.float32,
        "0.bias": torch.bfloat16,
        "1.weight": torch.int8,
        "1.scale_O": torch.float32,
    }
    assert torch.equal(linear.scale_O, scale)
    assert embedding(torch.tensor([1])).dtype == torch.bfloat16


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="replaces a linear, and this is a Embedding"):
        Int8Linear.from_settings({}, nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="has no settings"):
        Int8Linear.from_settings({"bits": 8}, nn.Linear(3, 4))
    with pytest.raises(ValueError, match="replaces an embedding, and this is a Linear"):
        Int8Embedding.from_settings({}, nn.Linear(3, 4))
    with pytest.raises(ValueError, match="has no settings"):
        Int8Embedding.from_settings({"bits": 8}, nn.Embedding(3, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_rows, num_inputs, num_outputs", [(1, 13, 7), (3, 512, 30), (40, 64, 65)])
def test_cuda_multiplies_the_same_integers(num_rows: int, num_inputs: int, num_outputs: int) -> None:
    x_MI, weight_OI = drawn(num_rows, num_inputs, num_outputs, 0)
    integer_OI, scale_O = quantize_weight(weight_OI)
    rows, _ = quantize_rows(x_MI)
    assert torch.equal(integer_product(rows.cuda(), integer_OI.cuda()).cpu(), integer_product(rows, integer_OI))
    torch.testing.assert_close(product(x_MI.cuda(), integer_OI.cuda(), scale_O.cuda()).cpu(), product(x_MI, integer_OI, scale_O), rtol=1e-3, atol=1e-3)


@pytest.fixture(params=["unsigned", "signed"])
def format_of_codes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both formats of rows, whatever this processor would choose."""
    if request.param == "signed":
        monkeypatch.setattr(int8_product, "unsigned_is_exact", lambda: False)
    elif not int8_product.unsigned_is_exact():
        pytest.skip("no exact product of unsigned rows here")
    return request.param


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 33])
@pytest.mark.parametrize("num_inputs, num_outputs", [(1, 1), (1, 17), (3, 17), (300, 40), (64, int8_product.MANY_OUTPUTS + 1)])
def test_a_packed_weight_multiplies_the_integers_exactly(format_of_codes: str, num_inputs: int, num_outputs: int, num_rows: int, nonnegative: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randint(-127, 128, (num_outputs, num_inputs), generator=generator).to(torch.int8)
    weight_OI[: num_outputs // 2] = -127
    x_MI = torch.randint(0 if nonnegative else -127, 128, (num_rows, num_inputs), generator=generator).float()
    x_MI[:, 0] = 127  # so that the scale is 1 and x are the codes
    packed = PackedWeight(weight_OI, torch.full((num_outputs,), 2.0))
    rows = quantized(x_MI, nonnegative=nonnegative)
    assert rows.codes_MI.dtype == (torch.uint8 if format_of_codes == "unsigned" else torch.int8)
    exact_MO = 2 * (x_MI.double() @ weight_OI.double().t())
    assert torch.equal(packed.product(rows).double(), exact_MO)
    assert torch.equal(packed.unscaled(rows, relu=True).double(), exact_MO.clamp(min=0))
    assert torch.equal(packed.add_to(torch.ones(num_rows, num_outputs), rows).double(), exact_MO + 1)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_rows_have_the_modules_codes_and_a_factor_is_in_their_scale_alone(format_of_codes: str, num_rows: int) -> None:
    x_MI, weight_OI = drawn(num_rows, 50, 8, 3)
    x_MI[0, :9] = 0
    integer_OI, scale_O = quantize_weight(weight_OI)
    codes_MI, scale_M1 = quantize_rows(x_MI)
    factor = 3.0 if num_rows == 1 else torch.linspace(0.5, 3, num_rows)[:, None]
    rows = quantized(x_MI, factor)
    assert torch.equal(rows.codes_MI.int() - rows.offset, codes_MI.int())
    torch.testing.assert_close(torch.as_tensor(rows.scale).expand(num_rows, 1), scale_M1 * factor)
    torch.testing.assert_close(PackedWeight(integer_OI, scale_O).product(rows), product(x_MI, integer_OI, scale_O) * factor)
    of_zeros = PackedWeight(integer_OI, scale_O).product(quantized(torch.zeros(num_rows, 50)))
    assert torch.equal(of_zeros, torch.zeros(num_rows, 8))


def test_not_a_number_stays_one(format_of_codes: str) -> None:
    x_MI, weight_OI = drawn(2, 16, 4, 0)
    x_MI[1, 3] = torch.nan
    packed = PackedWeight(*quantize_weight(weight_OI))
    assert packed.product(quantized(x_MI))[1].isnan().all()
    assert packed.product(quantized(x_MI[1:])).isnan().all()
