"""Law: the product of the factors is the dense linear."""

import pytest
import torch
from torch import nn

from llmdistill.models.low_rank_linear import LowRankLinear


@pytest.mark.parametrize("has_bias", [False, True])
def test_is_the_dense_linear_of_its_factors_product(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    up_OR, down_RI = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 3), (3, 5)))
    bias_O = torch.randn(7, generator=generator, dtype=torch.float64) if has_bias else None
    hidden_BLI = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    module = LowRankLinear.from_factors(up_OR, down_RI, bias_O)
    torch.testing.assert_close(module(hidden_BLI), nn.functional.linear(hidden_BLI, up_OR @ down_RI, bias_O), rtol=1e-12, atol=1e-12)
    assert sum(parameter.numel() for parameter in module.parameters()) == 3 * (7 + 5) + (7 if has_bias else 0)


def test_takes_sizes_bias_and_dtype_from_what_it_replaces() -> None:
    module = LowRankLinear.from_settings({"rank": 2}, nn.Linear(5, 7, bias=True, dtype=torch.bfloat16))
    assert (module.in_features, module.out_features, module.settings()) == (5, 7, {"rank": 2})
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert module.up.bias is not None
    assert LowRankLinear.from_settings({"rank": 2}, nn.Linear(5, 7, bias=False)).up.bias is None


@pytest.mark.parametrize("rank", [0, 6])
def test_refuses_a_rank_that_no_matrix_of_its_size_has(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank}.* ranks 1 to 5"):
        LowRankLinear(5, 7, rank, bias=False)


@pytest.mark.parametrize("settings", [{}, {"rank": "2"}, {"rank": 2, "alpha": 1}])
def test_refuses_settings_that_are_not_its_own(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="settings of a low_rank module"):
        LowRankLinear.from_settings(settings, nn.Linear(5, 7))
