"""Low-rank linears share their first factor where it is one set of parameters, whatever kind of linear it is."""

from typing import Any

import pytest
from torch import nn

from llmdistill.decode.modules import share_down
from llmdistill.models.int4_linear import Int4Linear
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.low_rank_linear import LowRankLinear

KINDS: dict[str, Any] = {
    "float": lambda: nn.Linear(32, 4, bias=False),
    "int8": lambda: Int8Linear.from_linear(nn.Linear(32, 4, bias=False)),
    "int4": lambda: Int4Linear(32, 4, 32, bias=False),
}


def factored(down: nn.Module) -> LowRankLinear:
    module = LowRankLinear(32, 8, 4, bias=False)
    module.set_submodule("down", down)
    return module


@pytest.mark.parametrize("kind", list(KINDS))
def test_factors_are_shared_where_all_their_parameters_are(kind: str) -> None:
    first, other, tied = (KINDS[kind]() for _ in range(3))
    for name, parameter in first.named_parameters():
        setattr(tied, name, parameter)
    assert not share_down([factored(first), factored(other)])
    assert share_down([factored(first), factored(tied)])
    assert not share_down([factored(first), first])
    assert not share_down([factored(first)])
