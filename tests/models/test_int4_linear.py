"""Law: both ways through an int4 linear give the product with the weight that its codes stand for, within the rounding of their dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llmdistill.models.int4_linear import MAX_PACKED_ROWS, Int4Linear, runs_packed


def random_codes(num_outputs: int, num_inputs: int, group_size: int, *, bias: bool = False) -> tuple[Int4Linear, torch.Tensor]:
    """A module and, in float64, the weight it must have."""
    generator = torch.Generator().manual_seed(0)
    num_groups = -(-num_inputs // group_size)
    code_OI = torch.randint(0, 16, (num_outputs, num_inputs), generator=generator)
    scale_OG = torch.rand(num_outputs, num_groups, generator=generator).bfloat16()
    zero_OG = torch.randn(num_outputs, num_groups, generator=generator).bfloat16()
    group_I = torch.arange(num_inputs) // group_size
    weight_OI = (code_OI.double() - 8) * scale_OG.double()[:, group_I] + zero_OG.double()[:, group_I]
    bias_O = torch.randn(num_outputs, generator=generator) if bias else None
    return Int4Linear.from_codes(code_OI, scale_OG, zero_OG, bias_O, group_size=group_size), weight_OI


SIZES = [(16, 64, 32), (48, 96, 32), (64, 128, 64), (32, 256, 128), (7, 33, 32), (30, 100, 64), (5, 24, 32), (17, 129, 128)]


@pytest.mark.parametrize("num_outputs, num_inputs, group_size", SIZES)
def test_dequantizes_exactly(num_outputs: int, num_inputs: int, group_size: int) -> None:
    module, weight_OI = random_codes(num_outputs, num_inputs, group_size)
    assert torch.equal(module.dequantized_OI(torch.float64), weight_OI)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 3, MAX_PACKED_ROWS, MAX_PACKED_ROWS + 1])
@pytest.mark.parametrize("num_outputs, num_inputs, group_size", SIZES)
def test_output_is_the_float64_product_within_rounding(
    num_outputs: int, num_inputs: int, group_size: int, num_rows: int, dtype: torch.dtype, bias: bool
) -> None:
    module, weight_OI = random_codes(num_outputs, num_inputs, group_size, bias=bias)
    module = module.to(dtype)
    hidden_BLI = torch.randn(1, num_rows, num_inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        output_BLO = module(hidden_BLI)
    expected_BLO = hidden_BLI.double() @ weight_OI.t() + (0 if module.bias is None else module.bias.double())
    magnitude_BLO = hidden_BLI.double().abs() @ weight_OI.abs().t() + 1
    unit = torch.finfo(torch.bfloat16 if runs_packed(hidden_BLI) else dtype).eps
    assert output_BLO.dtype == dtype
    assert output_BLO.shape == (1, num_rows, num_outputs)
    assert ((output_BLO.double() - expected_BLO).abs() <= 2 * unit * magnitude_BLO).all()


def test_the_way_is_chosen_by_device_dtype_rows_and_gradient() -> None:
    few, many = torch.zeros(2, 32, 8), torch.zeros(3, 32, 8)
    assert runs_packed(few)
    assert runs_packed(few.bfloat16())
    assert not runs_packed(many)
    assert not runs_packed(few.double())
    assert not runs_packed(few.to("meta"))
    assert not runs_packed(torch.zeros(0, 8))
    assert not runs_packed(few.clone().requires_grad_())


def test_the_gradient_reaches_the_input() -> None:
    module, weight_OI = random_codes(16, 64, 32)
    hidden = torch.randn(2, 64, requires_grad=True)
    module(hidden).sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), weight_OI.sum(0).expand(2, -1), rtol=1e-5, atol=1e-4)


def test_its_format_outlives_casts_and_new_weights_take_the_place_of_old_ones() -> None:
    module, _ = random_codes(16, 64, 32, bias=True)
    hidden = torch.randn(2, 64)
    before = copy.deepcopy(module.state_dict())
    first = module(hidden)
    module.to(torch.float16).to(torch.float32)
    assert {name: tensor.dtype for name, tensor in module.state_dict().items()} == {
        "packed_OJ": torch.uint8,
        "scale_OG": torch.bfloat16,
        "zero_OG": torch.bfloat16,
        "bias": torch.float32,
    }
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in ("packed_OJ", "scale_OG", "zero_OG"))
    module.load_state_dict(before | {"packed_OJ": before["packed_OJ"].flip(0)})
    assert not torch.equal(module(hidden), first)
    module.load_state_dict(before)
    assert torch.equal(module(hidden), first)


def test_takes_sizes_and_bias_from_what_it_replaces() -> None:
    module = Int4Linear.from_settings({"group_size": 64}, nn.Linear(100, 7, dtype=torch.bfloat16))
    assert (module.in_features, module.out_features, module.settings()) == (100, 7, {"group_size": 64})
    assert module.bias is not None
    assert module.bias.dtype == torch.bfloat16
    assert sum(parameter.nbytes for parameter in module.parameters()) == 7 * (50 + 2 * 2 * 2 + 2)
    assert module.weight is None


@pytest.mark.parametrize("settings", [{}, {"group_size": "32"}, {"group_size": 32, "bits": 4}])
def test_refuses_settings_that_are_not_its_own(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="settings of an int4 module"):
        Int4Linear.from_settings(settings, nn.Linear(32, 32))


def test_refuses_what_it_cannot_stand_for() -> None:
    with pytest.raises(ValueError, match=r"group_size is 48; .* 32, 64, 128"):
        Int4Linear(64, 64, 48, bias=False)
    with pytest.raises(ValueError, match="replaces a linear, and this is a Embedding"):
        Int4Linear.from_settings({"group_size": 32}, nn.Embedding(4, 4))
