"""Tucker and CP linears: they are the dense linear that their factors multiply out to, and checkpoints hold them, shared factors once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmdistill.models import checkpoint
from llmdistill.models.structure import ties_of
from llmdistill.models.tensor_linear import CPLinear, TuckerLinear

WIDTH, HEADS, HEAD_WIDTH = 10, 3, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def tucker(cut: str, *, reads_heads: bool, bias: bool = True) -> TuckerLinear:
    """Its modes named by `cut` have a factor matrix: w, h (head width), m (heads)."""
    num_width, num_head, num_mixed = 6 if "w" in cut else WIDTH, 2 if "h" in cut else HEAD_WIDTH, 2 if "m" in cut else HEADS
    return TuckerLinear(
        core_PKR=random(num_mixed, num_head, num_width),
        width_RM=random(6, WIDTH) if "w" in cut else None,
        head_DK=random(HEAD_WIDTH, 2) if "h" in cut else None,
        mix_HP=random(HEADS, 2) if "m" in cut else None,
        bias_O=random(WIDTH if reads_heads else HEADS * HEAD_WIDTH) if bias else None,
        reads_heads=reads_heads,
    )


def cp(*, reads_heads: bool, bias: bool = True) -> CPLinear:
    bias_O = random(WIDTH if reads_heads else HEADS * HEAD_WIDTH) if bias else None
    return CPLinear(width_RM=random(7, WIDTH), head_DR=random(HEAD_WIDTH, 7), mix_HR=random(HEADS, 7), bias_O=bias_O, reads_heads=reads_heads)


CUTS = ("w", "h", "m", "wh", "wm", "hm", "whm")
MODULES: dict[str, Callable[[bool], Any]] = {
    **{f"tucker {cut}": lambda reads_heads, cut=cut: tucker(cut, reads_heads=reads_heads) for cut in CUTS},
    "cp": lambda reads_heads: cp(reads_heads=reads_heads),
}


@pytest.mark.parametrize("reads_heads", [False, True])
@pytest.mark.parametrize("name", list(MODULES))
def test_it_equals_the_dense_linear_of_its_factors(name: str, reads_heads: bool) -> None:
    module = MODULES[name](reads_heads)
    hidden_BLI = random(2, 5, module.in_features)
    expected = hidden_BLI @ module.dense_OI(torch.float64).t() + module.bias_O
    torch.testing.assert_close(module(hidden_BLI), expected)


def test_the_dense_weight_is_the_sum_in_the_module_text() -> None:
    module = tucker("whm", reads_heads=False)
    core, width, head, mix = module.core_PKR, module.width_RM, module.head_DK, module.mix_HP
    expected = torch.einsum("rm,dk,hp,pkr->hdm", width, head, mix, core).reshape(HEADS * HEAD_WIDTH, WIDTH)
    torch.testing.assert_close(module.dense_OI(torch.float64), expected)
    one = cp(reads_heads=True)
    expected = torch.einsum("rm,dr,hr->mhd", one.width_RM, one.head_DR, one.mix_HR).reshape(WIDTH, HEADS * HEAD_WIDTH)
    torch.testing.assert_close(one.dense_OI(torch.float64), expected)


@pytest.mark.parametrize("reads_heads", [False, True])
@pytest.mark.parametrize("name", list(MODULES))
def test_its_settings_build_it_again(name: str, reads_heads: bool) -> None:
    module = MODULES[name](reads_heads)
    again = type(module).from_settings(module.settings(), nn.Linear(module.in_features, module.out_features, dtype=torch.float64))
    again.load_state_dict(module.state_dict())
    hidden_BI = random(3, module.in_features)
    assert torch.equal(again(hidden_BI), module(hidden_BI))
    assert again.settings() == module.settings()


def test_settings_that_do_not_fit_are_refused() -> None:
    linear = nn.Linear(WIDTH, HEADS * HEAD_WIDTH)
    settings = dict(tucker("wh", reads_heads=False).settings())
    with pytest.raises(ValueError, match=r"head_width is 5, and the linear's 12 outputs"):
        TuckerLinear.from_settings(settings | {"head_width": 5}, linear)
    with pytest.raises(ValueError, match=r"has a model width of 10 and 3 heads of 4"):
        TuckerLinear.from_settings(settings | {"ranks": [11, 2, 3]}, linear)
    with pytest.raises(ValueError, match=r"three whole numbers"):
        TuckerLinear.from_settings(settings | {"ranks": [0, 2, 3]}, linear)
    with pytest.raises(ValueError, match=r"the settings of a cp module are"):
        CPLinear.from_settings({"head_width": 4, "reads_heads": False}, linear)
    with pytest.raises(ValueError, match=r"the rank of a cp module is 0"):
        CPLinear.from_settings({"head_width": 4, "reads_heads": False, "rank": 0}, linear)
    with pytest.raises(ValueError, match=r"replaces a linear, and this is a LayerNorm"):
        CPLinear.from_settings({"head_width": 4, "reads_heads": False, "rank": 1}, nn.LayerNorm(4))


def install(model: Any, make: Callable[[int, int], list[Any]]) -> None:
    """Puts modules that share factors in the place of q, k, v and o of the first attention of every stack; every linear's own bias is kept."""
    names = ("q", "k", "v", "o") if model.config.is_encoder_decoder else ("q_proj", "k_proj", "v_proj", "o_proj")
    for path, attention in list(model.named_modules()):
        if not path.endswith(("block.0.layer.0.SelfAttention", "block.0.layer.1.EncDecAttention", "layers.0.self_attn")):
            continue
        linears = [attention.get_submodule(name) for name in names]
        modules = make(4, linears[1].out_features // 4)
        for name, linear, module in zip(names, linears, modules, strict=True):
            if linear.bias is not None:
                module.bias_O = nn.Parameter(linear.bias.detach())
            model.set_submodule(f"{path}.{name}", module.to(linear.weight.dtype))


def tied_tuckers(num_queries: int, num_keys: int) -> list[Any]:
    """Of model width 16 and heads of 4."""
    width, head, core = (nn.Parameter(random(*shape).float() / 4) for shape in ((7, 16), (4, 3), (5, 3, 7)))
    return [
        TuckerLinear(core_PKR=core, width_RM=width, head_DK=head, mix_HP=random(num, 5, seed=seed).float(), bias_O=None, reads_heads=seed == 3)
        for seed, num in enumerate((num_queries, num_keys, num_keys, num_queries))
    ]


def tied_cps(num_queries: int, num_keys: int) -> list[Any]:
    width, head = (nn.Parameter(random(*shape).float() / 2) for shape in ((9, 16), (4, 9)))
    return [
        CPLinear(width_RM=width, head_DR=head, mix_HR=random(num, 9, seed=seed).float(), bias_O=None, reads_heads=seed == 3)
        for seed, num in enumerate((num_queries, num_keys, num_keys, num_queries))
    ]


@pytest.mark.parametrize("make", [tied_tuckers, tied_cps])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_gives_the_same_logits_and_holds_shared_factors_once(
    model: PreTrainedModel,
    make: Callable[[int, int], list[Any]],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    logits: Callable[[PreTrainedModel], Tensor],
    tmp_path: Path,
) -> None:
    install(model, make)
    any_model: Any = model
    before = any_model.to(dtype)
    checkpoint.save(before, tokenizer, tmp_path, lineage=[], card="")
    after, _ = checkpoint.load(tmp_path)
    assert torch.equal(logits(after), logits(before))
    assert ties_of(after) == ties_of(before)
    assert sum(name.endswith(".width_RM") for name in load_file(tmp_path / checkpoint.WEIGHTS)) == (3 if model.config.is_encoder_decoder else 1)
    assert after.num_parameters() == before.num_parameters()
