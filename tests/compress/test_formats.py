"""Laws: each weight becomes the nearest number of its format, ties to even, and a checkpoint of such weights is as small as it says and loads bitwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_models import MODELS, calibration, drift, logits, tiny
from safetensors.torch import load_file

from llmdistill.compress.formats import BlockFloat, LowBitFloat
from llmdistill.compress.formats_maths import by_block, by_channel, nearest_codes
from llmdistill.compress.int4 import Int4
from llmdistill.compress.slots import leaves
from llmdistill.core.spec import parse, write
from llmdistill.models import checkpoint
from llmdistill.models.number_formats import ELEMENTS, magnitudes_N, values_V
from llmdistill.models.stored_linear import StoredLinear
from llmdistill.models.tokenizer import train_tokenizer

ANY_RISE = 1e6
BITS = {"e2m1": 4.25, "e2m3": 6.25, "e3m2": 6.25, "e4m3": 8.25, "e5m2": 8.25, "int8": 8.25}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["hello world"], 300, lower_case=False, ends_every_text=True)


def numbers_to_round(element: str) -> torch.Tensor:
    """Every number of the format, every tie between two of them, the float32 numbers beside each tie, and beyond the ends."""
    magnitude_N = magnitudes_N(element).float()
    ties = (magnitude_N[1:] + magnitude_N[:-1]) / 2
    largest = magnitude_N[-1:]
    beside = [torch.nextafter(ties, torch.zeros(())), torch.nextafter(ties, torch.full((), torch.inf))]
    random = torch.rand(500, generator=torch.Generator().manual_seed(0)) * largest * 1.2
    small = torch.rand(200, generator=torch.Generator().manual_seed(1)) * magnitude_N[4]  # zero and the subnormals
    sizes = torch.cat([magnitude_N, ties, *beside, largest * 1.01, largest * 1000, random, small])
    return torch.cat([sizes, -sizes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("element", ELEMENTS)
def test_rounds_to_the_nearest_number_ties_to_even_and_saturates(element: str, dtype: torch.dtype) -> None:
    x, values_V_ = numbers_to_round(element).to(dtype), values_V(element).double()
    code = nearest_codes(x, element).int()
    off = (values_V_ - x.double()[:, None]).abs().nan_to_num(torch.inf)
    is_nearest = off == off.amin(1, keepdim=True)
    assert is_nearest[torch.arange(len(x)), code].all()
    is_tie = is_nearest.sum(1) > 1
    assert is_tie.sum() >= 2 * (len(magnitudes_N(element)) - 2)
    assert (code[is_tie] % 2 == 0).all()  # the last bit of the mantissa


@pytest.mark.parametrize("element, dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_rounds_as_torch_does_where_that_is_finite(element: str, dtype: torch.dtype) -> None:
    x = numbers_to_round(element)
    x = x[x.abs() <= ELEMENTS[element].largest]
    assert torch.equal(values_V(element)[nearest_codes(x, element).int()], x.to(dtype).float())


def dequantized(code_OI: torch.Tensor, scale_OG: torch.Tensor, element: str) -> torch.Tensor:
    return StoredLinear.from_codes(code_OI, scale_OG, None, element=element).dequantized_OI(torch.float64)


def random_weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(20, 75, generator=generator) * torch.exp2(torch.randint(-20, 20, (20, 1), generator=generator))
    weight_OI[3], weight_OI[4, 32:64] = 0.0, 0.0  # a dead output, a dead block
    return weight_OI


@pytest.mark.parametrize("element", ELEMENTS)
def test_blocks_have_the_exponent_of_the_specification(element: str) -> None:
    weight_OI = random_weight()
    code_OI, exponent_OG = by_block(weight_OI, element, search=False)
    blocks = [weight_OI[:, start : start + 32] for start in (0, 32, 64)]
    largest_OG = torch.stack([block.abs().amax(1) for block in blocks], 1).double()
    expected_OG = torch.where(largest_OG > 0, largest_OG.log2().floor() - ELEMENTS[element].largest_exponent, 0)
    assert torch.equal(exponent_OG.double() - 127, expected_OG)
    scale_OI = (2.0**expected_OG)[:, torch.arange(75) // 32]
    assert torch.equal(dequantized(code_OI, exponent_OG, element), values_V(element).double()[nearest_codes(weight_OI / scale_OI, element).int()] * scale_OI)


@pytest.mark.parametrize("element", ELEMENTS)
def test_the_search_of_exponents_only_ever_helps(element: str) -> None:
    weight_OI = random_weight()

    def error_OG(search: bool) -> torch.Tensor:
        off_OI = dequantized(*by_block(weight_OI, element, search=search), element) - weight_OI
        return torch.stack([part.square().sum(1) for part in off_OI.split(32, 1)], 1)

    assert (error_OG(True) <= error_OG(False)).all()


@pytest.mark.parametrize("element", ELEMENTS)
def test_errors_are_within_half_a_step_of_the_format(element: str) -> None:
    """Relative to a weight for a float's normals, to its block's or output's largest number for what is smaller."""
    weight_OI, format_ = random_weight(), ELEMENTS[element]
    smallest = format_.magnitude(1)
    for scaling in ("block", "channel"):
        if scaling == "channel" and element == "int8":
            continue
        code_OI, scale_OG = by_block(weight_OI, element, search=True) if scaling == "block" else by_channel(weight_OI, element)
        scale_OI = (2.0 ** (scale_OG.double() - 127))[:, torch.arange(75) // 32] if scaling == "block" else scale_OG.double()
        off_OI = (dequantized(code_OI, scale_OG, element) - weight_OI).abs()
        is_inside = weight_OI.abs() <= format_.largest * scale_OI * (1 + 1e-6)
        mantissa = format_.mantissa_bits if format_.exponent_bits else 60
        allowed_OI = torch.maximum(weight_OI.abs().double() * 2.0 ** -(mantissa + 1), smallest * scale_OI / 2) * (1 + 1e-5)
        assert (off_OI[is_inside] <= allowed_OI[is_inside]).all()
        assert scaling == "block" or is_inside.all()
        assert not dequantized(code_OI, scale_OG, element)[3].any()


def test_scales_at_the_ends_of_the_exponents_range_are_held() -> None:
    weight_OI = torch.tensor([[1e-38] * 32, [3e38] * 32])
    for element in ELEMENTS:
        code_OI, exponent_OG = by_block(weight_OI, element, search=True)
        assert dequantized(code_OI, exponent_OG, element).isfinite().all()
        assert int(exponent_OG.min()) >= 0
        assert int(exponent_OG.max()) <= 254


METHODS = [
    *(BlockFloat(element=element, head=True, max_loss_rise=ANY_RISE) for element in ("e2m1", "e3m2", "e4m3", "int8")),
    LowBitFloat(head=True, max_loss_rise=ANY_RISE),
]


@pytest.mark.parametrize("method", METHODS, ids=write)
@pytest.mark.parametrize("name, dtype", [("t5 v1.0", torch.float32), ("qwen2", torch.float32), *((name, torch.bfloat16) for name in MODELS)])
def test_is_saved_and_loaded_bitwise_and_its_bytes_are_those_on_disk(
    name: str, dtype: torch.dtype, method: BlockFloat | LowBitFloat, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny(name, dtype)
    dense = logits(model)
    applied = method.apply(model, calibration(2))
    checkpoint.save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded, _ = checkpoint.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert 0 < (logits(model) - dense).norm() < 0.6 * dense.norm()
    tensors = load_file(tmp_path / "model.safetensors")
    stored = [layer for layer in applied.layers if layer.kind == "stored"]
    assert len(stored) >= len(leaves(tiny(name))) - 1
    for layer in stored:
        module: Any = model.get_submodule(layer.path)
        num_weights = module.in_features * module.out_features
        on_disk = tensors[f"{layer.path}.packed_OJ"].nbytes + tensors[f"{layer.path}.scale_OG"].nbytes
        assert 8 * on_disk == layer.figures["bits"] * num_weights
        assert layer.figures["bits"] == (BITS[method.element] if isinstance(method, BlockFloat) else 8 + 32 / module.in_features)
    other = checkpoint.load(tmp_path, dtype=torch.float16)[0].state_dict()
    assert all(torch.equal(other[name], tensor) for name, tensor in tensors.items() if name.endswith(("packed_OJ", "scale_OG")))


def test_more_bits_err_less() -> None:
    errors = []
    for element in ("e2m1", "e3m2", "e2m3", "e4m3", "int8"):
        applied = BlockFloat(element=element, max_loss_rise=ANY_RISE).apply(tiny("t5 v1.1"), calibration(2))
        errors.append(sum(layer.figures["relative_error"] for layer in applied.layers if layer.kind == "stored"))
    assert errors[0] > errors[1] > errors[2] >= errors[3] > errors[4]


def test_sensitive_layers_are_kept() -> None:
    model = tiny("t5 v1.1")
    applied = BlockFloat(element="e2m1", max_loss_rise=1e-3).apply(model, drift(model))
    kept = [layer for layer in applied.layers if "nats" in layer.note]
    assert kept
    assert all(type(model.get_submodule(layer.path)) is torch.nn.Linear for layer in kept)
    assert float(str(applied.figures["held_out_loss_rise_nats"])) <= 1e-3


def test_does_not_come_after_another_quantization() -> None:
    model = tiny("t5 v1.1")
    Int4(head=True, max_loss_rise=ANY_RISE).apply(model, calibration(2))
    with pytest.raises(ValueError, match="stored replaces plain linears, and this model has none left"):
        BlockFloat().apply(model, calibration(2))


def test_are_written_as_one_string() -> None:
    for text in ("block_float:e2m1?search=false", "low_bit_float:e5m2?keep=*.wo"):
        assert write(parse(text, (BlockFloat, LowBitFloat))) == text
    with pytest.raises(ValueError, match="element is 'int8'"):
        LowBitFloat(element="int8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="max_loss_rise is nan"):
        BlockFloat(max_loss_rise=float("nan"))
