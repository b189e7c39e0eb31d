"""Parity: every code stands for what the specification's tables say, and packing loses none."""

from __future__ import annotations

import math

import pytest
import torch

from llmdistill.models.number_formats import ELEMENTS, magnitudes_N, num_bytes, pack, unpack, values_V


def by_hand(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """A sign, an exponent, a mantissa, read one after the other."""
    sign, exponent = code >> (exponent_bits + mantissa_bits), (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    size = mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias)
    return -size if sign else size


BIASES = {"e2m1": (2, 1, 1), "e2m3": (2, 3, 1), "e3m2": (3, 2, 3), "e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}


@pytest.mark.parametrize("name", BIASES)
def test_every_code_of_a_float_is_what_its_bits_say(name: str) -> None:
    values = values_V(name).tolist()
    assert len(values) == 1 << ELEMENTS[name].bits
    for code, value in enumerate(values):
        is_number = (code & 127) < {"e4m3": 127, "e5m2": 124}.get(name, 128)
        assert value == by_hand(code, *BIASES[name]) if is_number else math.isnan(value)


@pytest.mark.parametrize("name, dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_agrees_with_torchs_floats_of_8_bits(name: str, dtype: torch.dtype) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    theirs[theirs.isinf()] = math.nan
    assert torch.equal(values_V(name).nan_to_num(-1000), theirs.nan_to_num(-1000))


def test_the_known_numbers_of_the_specification() -> None:
    assert magnitudes_N("e2m1").tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert {name: element.largest for name, element in ELEMENTS.items()} == {
        "e2m1": 6,
        "e2m3": 7.5,
        "e3m2": 28,
        "e4m3": 448,
        "e5m2": 57344,
        "int8": 127 / 64,
    }
    assert {name: float(magnitudes_N(name)[1]) for name in ELEMENTS} == {
        "e2m1": 0.5,
        "e2m3": 0.125,
        "e3m2": 0.0625,
        "e4m3": 2**-9,
        "e5m2": 2**-16,
        "int8": 2**-6,
    }
    assert {name: element.largest_exponent for name, element in ELEMENTS.items()} == {"e2m1": 2, "e2m3": 2, "e3m2": 4, "e4m3": 8, "e5m2": 15, "int8": 0}


def test_int8_is_twos_complement_in_64ths() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes != 128]
    assert torch.equal(values_V("int8")[codes.int()], codes.view(torch.int8).float() / 64)
    assert math.isnan(values_V("int8")[128])


@pytest.mark.parametrize("num_codes", [1, 2, 3, 4, 5, 32, 33])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_packing_loses_nothing(bits: int, num_codes: int) -> None:
    code_OI = torch.randint(0, 1 << bits, (16, num_codes), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed_OJ = pack(code_OI, bits)
    assert packed_OJ.dtype == torch.uint8
    assert packed_OJ.shape[1] == num_bytes(num_codes, bits)
    assert num_codes * bits / 8 <= packed_OJ.shape[1] < num_codes * bits / 8 + 3
    assert torch.equal(unpack(packed_OJ, bits, num_codes), code_OI)
