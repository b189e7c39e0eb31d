"""Law: a stored linear is the linear of the weight that its codes and scales stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from llmdistill.models.number_formats import ELEMENTS, values_V
from llmdistill.models.stored_linear import StoredLinear


def random_codes(element: str, scaling: str, num_inputs: int = 72) -> tuple[StoredLinear, torch.Tensor, nn.Parameter]:
    """A module, and in float64 the weight and bias that it must have."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.nonzero(~values_V(element).isnan())[:, 0]
    code_OI = numbers[torch.randint(0, len(numbers), (24, num_inputs), generator=generator)].to(torch.uint8)
    value_OI = values_V(element)[code_OI.int()].double()
    if scaling == "block":
        scale_OG = torch.randint(120, 134, (24, -(-num_inputs // 32)), generator=generator).to(torch.uint8)
        weight_OI = value_OI * 2.0 ** (scale_OG.double() - 127)[:, torch.arange(num_inputs) // 32]
    else:
        scale_OG = torch.rand(24, 1, generator=generator)
        weight_OI = value_OI * scale_OG.double()
    bias_O = nn.Parameter(torch.randn(24, generator=generator))
    return StoredLinear.from_codes(code_OI, scale_OG, bias_O, element=element), weight_OI, bias_O


@pytest.mark.parametrize("scaling", ["block", "channel"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_is_the_linear_of_its_codes(element: str, scaling: str) -> None:
    module, weight_OI, bias_O = random_codes(element, scaling)
    assert torch.equal(module.dequantized_OI(torch.float64), weight_OI)
    hidden = torch.randn(2, 3, 72)
    expected = hidden.double() @ weight_OI.t() + bias_O.double()
    torch.testing.assert_close(module(hidden).double(), expected, rtol=1e-5, atol=1e-4 * float(weight_OI.abs().max()))
    assert module.to(torch.bfloat16)(hidden.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("scaling", ["block", "channel"])
def test_its_format_outlives_casts(scaling: str) -> None:
    module, _, _ = random_codes("e4m3", scaling)
    before = copy.deepcopy(module.state_dict())
    module.to(torch.float16).to(torch.float32)
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in ("packed_OJ", "scale_OG"))
    assert module.state_dict()["scale_OG"].dtype == before["scale_OG"].dtype


def test_takes_sizes_and_bias_from_what_it_replaces() -> None:
    module = StoredLinear.from_settings({"element": "e3m2", "scaling": "block"}, nn.Linear(70, 7, dtype=torch.bfloat16))
    assert (module.in_features, module.out_features, module.settings()) == (70, 7, {"element": "e3m2", "scaling": "block"})
    assert module.bias is not None
    assert module.bias.dtype == torch.bfloat16
    assert sum(parameter.nbytes for parameter in module.parameters()) == 7 * (54 + 3 + 2)
    assert module.weight is None


@pytest.mark.parametrize("settings, message", [({"element": "e4m3"}, "settings of a stored module"), ({"element": "e1m6", "scaling": "block"}, "'e1m6'")])
def test_refuses_settings_that_are_not_its_own(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoredLinear.from_settings(settings, nn.Linear(32, 32))
    with pytest.raises(ValueError, match="replaces a linear"):
        StoredLinear.from_settings(settings, nn.Embedding(4, 4))
