"""Laws: never worse than rounding to nearest, within the bound of its scales, bitwise when loaded again, and as small on disk as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_models import MODELS, calibration, drift, logits, tiny
from safetensors.torch import load_file
from torch import nn

from llmdistill.compress.int4 import Int4
from llmdistill.compress.int4_maths import quantize
from llmdistill.compress.slots import leaves
from llmdistill.core.spec import parse, write
from llmdistill.models import checkpoint, structure
from llmdistill.models.int4_linear import Int4Linear
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.tokenizer import train_tokenizer

ANY_RISE = 1e6


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["hello world"], 300, lower_case=False, ends_every_text=True)


def weight_of(code_OI: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor, group_size: int) -> torch.Tensor:
    group_I = torch.arange(code_OI.shape[1]) // group_size
    return (code_OI.double() - 8) * scale_OG.double()[:, group_I] + zero_OG.double()[:, group_I]


def random_weight(num_inputs: int = 96) -> torch.Tensor:
    weight_OI = torch.randn(24, num_inputs, generator=torch.Generator().manual_seed(0))
    weight_OI[3, 5] = 9.0  # an outlier, which is better clipped
    return weight_OI


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_plain_grid_is_within_half_a_step(group_size: int) -> None:
    weight_OI = random_weight(100)
    code_OI, scale_OG, zero_OG = quantize(weight_OI, torch.ones(100), group_size, ratios=(1.0,))
    step_OI = scale_OG.double()[:, torch.arange(100) // group_size]
    bfloat16_error = 2**-8 * weight_OI.abs().max()  # of zero, and of 7 times the scale
    fitted = ((weight_of(code_OI, scale_OG, zero_OG, group_size) - weight_OI).abs() > step_OI / 2 + bfloat16_error).double().mean()
    assert fitted < 0.02  # those at the ends, which the fit to all gives up a little
    assert int(code_OI.min()) == 0
    assert int(code_OI.max()) == 15


@pytest.mark.parametrize("importance", ["equal", "random"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_search_is_never_worse_than_rounding_to_nearest_by_the_measure_it_minimises(group_size: int, importance: str) -> None:
    weight_OI = random_weight(group_size)  # one group a row
    mean_square_I = torch.ones(group_size) if importance == "equal" else torch.rand(group_size, generator=torch.Generator().manual_seed(1)) ** 4
    scale_OG = ((weight_OI.amax(1) - weight_OI.amin(1)) / 15)[:, None]
    zero_OG = weight_OI.amin(1, keepdim=True) + 8 * scale_OG
    scale_OG, zero_OG = scale_OG.bfloat16(), zero_OG.bfloat16()
    nearest_OI = ((weight_OI - zero_OG.float()) / scale_OG.float()).round().clamp(-8, 7) + 8

    def error_O(codes: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor) -> torch.Tensor:
        weight = mean_square_I.double() / mean_square_I.mean() + 1e-3
        return ((weight_of(codes, scale_OG, zero_OG, group_size) - weight_OI).square() * weight).sum(1)

    plain_O, searched_O = error_O(nearest_OI, scale_OG, zero_OG), error_O(*quantize(weight_OI, mean_square_I, group_size))
    assert (searched_O <= plain_O * (1 + 1e-5)).all()
    assert searched_O.sum() < 0.95 * plain_O.sum()


def test_weights_that_are_on_a_grid_come_back_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    code_OI = torch.randint(0, 16, (8, 64), generator=generator)
    code_OI[:, [0, 32]], code_OI[:, [1, 33]] = 0, 15
    scale_OG, zero_OG = torch.full((8, 2), 0.25), torch.randint(-4, 4, (8, 2), generator=generator).float()
    weight_OI = weight_of(code_OI, scale_OG, zero_OG, 32)
    assert torch.equal(weight_of(*quantize(weight_OI, torch.ones(64), 32), 32), weight_OI)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_group_of_equal_weights_is_no_division_by_zero(value: float) -> None:
    assert torch.equal(weight_of(*quantize(torch.full((2, 32), value), torch.zeros(32), 32), 32), torch.full((2, 32), value, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_is_saved_and_loaded_bitwise_and_its_bytes_are_those_on_disk(name: str, dtype: torch.dtype, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(name, dtype)
    dense = logits(model)
    applied = Int4(max_loss_rise=ANY_RISE, head=True).apply(model, calibration())
    assert {layer.kind for layer in applied.layers} == ({"int4"} if name in ("t5 v1.1", "llama") else {"int4", "kept"})
    checkpoint.save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded, _ = checkpoint.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert 0 < (logits(model) - dense).norm() < 0.5 * dense.norm()
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in applied.layers:
        if layer.kind == "int4":
            module: Any = model.get_submodule(layer.path)
            on_disk = sum(tensors[f"{layer.path}.{part}"].nbytes for part in ("packed_OJ", "scale_OG", "zero_OG"))
            assert 8 * on_disk == layer.figures["bits"] * module.in_features * module.out_features == 5 * module.in_features * module.out_features
    other = checkpoint.load(tmp_path, dtype=torch.bfloat16 if dtype == torch.float32 else torch.float32)[0].state_dict()
    formats = {part: {tensor.dtype for name, tensor in other.items() if name.endswith(part)} for part in ("packed_OJ", "scale_OG", "zero_OG")}
    assert formats == {"packed_OJ": {torch.uint8}, "scale_OG": {torch.bfloat16}, "zero_OG": {torch.bfloat16}}


@pytest.mark.parametrize("name", ["t5 v1.1", "qwen2"])
def test_the_reported_error_is_that_of_the_outputs_on_the_calibration_rows(name: str) -> None:
    model, rows = tiny(name), calibration()
    path = next(path for path, _, _ in leaves(model))
    linear: Any = model.get_submodule(path)
    seen = []
    hook = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    for batch in rows.batches(model):
        rows.loss.sums_P(model, batch)
    hook.remove()
    x_TI, weight_OI = torch.cat(seen).detach().double(), linear.weight.detach().double()
    (layer,) = (layer for layer in Int4(max_loss_rise=ANY_RISE).apply(model, rows).layers if layer.path == path)
    module: Any = model.get_submodule(path)
    off_OI = module.dequantized_OI(torch.float64) - weight_OI
    assert layer.figures["relative_error"] == pytest.approx(float((x_TI @ off_OI.t()).norm() / (x_TI @ weight_OI.t()).norm()), rel=1e-3)


@pytest.mark.parametrize("name", ["t5 v1.0", "llama"])
def test_quantizes_the_factors_of_low_rank_linears_and_a_shared_one_once(name: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(name)
    q, k = [path for path, _, _ in leaves(model)][:2]
    for path in (q, k):
        linear: Any = model.get_submodule(path)
        bias_O = None if linear.bias is None else linear.bias.detach()
        up_OR, down_RI = torch.randn(linear.out_features, 8), torch.randn(8, linear.in_features) / 8
        model.set_submodule(path, LowRankLinear.from_factors(up_OR, down_RI, bias_O))
    model.get_submodule(k).down.weight = model.get_submodule(q).down.weight
    Int4(max_loss_rise=ANY_RISE).apply(model, calibration())
    for path in (q, k):
        assert isinstance(model.get_submodule(path), LowRankLinear)
        assert isinstance(model.get_submodule(f"{path}.down"), Int4Linear)
        assert isinstance(model.get_submodule(f"{path}.up"), Int4Linear)
    assert model.get_submodule(k).down.packed_OJ is model.get_submodule(q).down.packed_OJ
    checkpoint.save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded: Any = checkpoint.load(tmp_path)[0]
    assert torch.equal(logits(loaded), logits(model))
    assert f"{k}.down.packed_OJ" in structure.ties_of(loaded)


@pytest.mark.parametrize("name", ["t5 v1.0", "t5 v1.1"])
def test_t5s_wo_whose_weights_differ_in_size_by_hundreds_is_found_and_kept(name: str) -> None:
    """Its function is as before: what some input channels are made smaller, their weights are made larger."""
    model = tiny(name)
    base = "decoder.block.1.layer.2.DenseReluDense"
    wo = f"{base}.wo"
    with torch.no_grad():
        model.get_submodule(wo).weight *= 8  # what it says matters
        before = logits(model)
        model.get_submodule(f"{base}.{'wi_1' if name == 't5 v1.1' else 'wi'}").weight[::32] /= 512
        model.get_submodule(wo).weight[:, ::32] *= 512
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    original = model.get_submodule(wo)
    applied = Int4(max_loss_rise=0.05).apply(model, drift(model))
    (kept,) = (layer for layer in applied.layers if layer.kind == "kept" and layer.path != "lm_head")
    assert kept.path == wo
    assert "quantized alone it raises the held-out loss by" in kept.note
    assert model.get_submodule(wo) is original
    assert float(str(applied.figures["held_out_loss_rise_nats"])) <= 0.05
    assert applied.figures["layers_kept"] == 2


def test_keeps_what_the_settings_say() -> None:
    model = tiny("t5 v1.0")
    applied = Int4(keep=("*.wo", "decoder.block.0.*"), max_loss_rise=ANY_RISE).apply(model, calibration())
    kept = {layer.path for layer in applied.layers if layer.note == "the settings say so"}
    assert kept == {path for path, _, _ in leaves(tiny("t5 v1.0")) if path.endswith(".wo") or path.startswith("decoder.block.0.")}
    assert all(type(model.get_submodule(path)) is nn.Linear for path in kept)
    with pytest.raises(ValueError, match=r"keep='\*\.nothing' matches no linear"):
        Int4(keep=("*.nothing",)).apply(tiny("t5 v1.0"), calibration())


def test_a_second_time_there_is_nothing_left_to_do() -> None:
    model = tiny("llama")
    Int4(max_loss_rise=ANY_RISE, head=True).apply(model, calibration())
    with pytest.raises(ValueError, match="int4 replaces plain linears, and this model has none left"):
        Int4().apply(model, calibration())


def test_is_written_as_one_string() -> None:
    method = Int4(group_size=128, head=True, keep=("*.wo",))
    assert write(method) == "int4:128?head=true&keep=*.wo"
    assert parse("int4:128?head=true&keep=*.wo", (Int4,)) == method


@pytest.mark.parametrize("settings, message", [({"group_size": 16}, "group_size is 16; use 32"), ({"max_loss_rise": -1.0}, "max_loss_rise is -1.0")])
def test_refuses_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int4(**settings)
