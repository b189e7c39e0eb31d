"""Laws: smoothing changes nothing that the model computes, and int8 errs less after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_models import MODELS, calibration, drift, logits, tiny
from torch import nn

from llmdistill.compress.int4 import Int4
from llmdistill.compress.int8 import Int8
from llmdistill.compress.slots import HEAD, Role, slots
from llmdistill.compress.smooth import SmoothQuant
from llmdistill.core.spec import parse, write
from llmdistill.models import checkpoint
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.tokenizer import train_tokenizer


class SimulatedInt8(nn.Module):
    """Weights by output channel and activations by token, rounded to 255 levels."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(self.rounded(linear.weight.detach())), linear.bias

    @staticmethod
    def rounded(rows: torch.Tensor) -> torch.Tensor:
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return (rows / scale).round() * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.rounded(x), self.weight, self.bias)


def int8_error(model: Any, expected: torch.Tensor) -> float:
    for slot in slots(model):
        if slot.path != HEAD:
            model.set_submodule(slot.path, SimulatedInt8(slot.module(model)))
    return float((logits(model) - expected).norm() / expected.norm())


def with_outliers(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of which some norms give two channels that are a hundred times as large, and some feed-forwards hand one on."""
    model = tiny(name, dtype)
    with torch.no_grad():
        for slot in slots(model):
            if slot.norm is not None and slot.path != HEAD:
                model.get_submodule(slot.norm).weight[[3, 17]] = 100.0
                slot.module(model).weight[:, [3, 17]] /= 50
            elif slot.role is Role.FFN_OUT:
                slot.module(model).weight[:, 5] /= 100
            if slot.role is Role.FFN_IN:
                slot.module(model).weight[5] *= 100
    return model


@pytest.mark.parametrize("powers_of_two", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_what_the_model_computes_is_unchanged(name: str, powers_of_two: bool) -> None:
    model = with_outliers(name, torch.float64)
    before = logits(model)
    SmoothQuant(powers_of_two=powers_of_two).apply(model, calibration())
    torch.testing.assert_close(logits(model), before, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_powers_of_two_scale_without_rounding(name: str, dtype: torch.dtype) -> None:
    model, original = tiny(name, dtype), tiny(name, dtype)
    applied = SmoothQuant(powers_of_two=True).apply(model, calibration())
    changed = 0
    for (_, now), (_, before) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        ratio = (now.double() / before.double()).nan_to_num(1.0)
        assert torch.equal(ratio.log2(), ratio.log2().round())
        changed += int(not torch.equal(now, before))
    assert changed > 0
    assert {layer.kind for layer in applied.layers} == ({"smooth"} if name in ("t5 v1.1", "llama") else {"smooth", "kept"})


@pytest.mark.parametrize("powers_of_two", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_int8_errs_less_after_it_where_there_are_outliers(name: str, powers_of_two: bool) -> None:
    expected = logits(with_outliers(name))
    smoothed = with_outliers(name)
    applied = SmoothQuant(powers_of_two=powers_of_two).apply(smoothed, calibration())
    assert int8_error(smoothed, expected) < 0.5 * int8_error(with_outliers(name), expected)
    assert all(
        layer.figures["input_peak_after"] < layer.figures["input_peak_before"] for layer in applied.layers if layer.kind == "smooth" and layer.path != HEAD
    )


def test_smoothing_the_feed_forward_helps_on_top_of_the_norms() -> None:
    expected = logits(with_outliers("t5 v1.1"))
    errors = []
    for feed_forward in (False, True):
        model = with_outliers("t5 v1.1")
        SmoothQuant(feed_forward=feed_forward).apply(model, calibration())
        errors.append(int8_error(model, expected))
    assert errors[1] < 0.7 * errors[0]


def test_the_encoders_last_norm_is_folded_into_the_keys_and_values_of_all_decoder_layers() -> None:
    model, before = tiny("t5 v1.1"), tiny("t5 v1.1")
    applied = SmoothQuant(powers_of_two=True).apply(model, calibration())
    reading = [slot.path for slot in slots(model) if slot.role in (Role.CROSS_K, Role.CROSS_V)]
    assert {layer.path for layer in applied.layers if layer.note == "scales are in encoder.final_layer_norm"} == set(reading)
    scale_I = before.encoder.final_layer_norm.weight / model.encoder.final_layer_norm.weight
    for path in reading:
        assert torch.equal(model.get_submodule(path).weight, before.get_submodule(path).weight * scale_I)


@pytest.mark.parametrize("name", ["t5 v1.0", "llama tied", "qwen2"])
def test_a_head_that_is_the_embedding_is_left_and_told(name: str) -> None:
    model, before = tiny(name), tiny(name)
    applied = SmoothQuant().apply(model, calibration())
    (kept,) = (layer for layer in applied.layers if layer.kind == "kept")
    assert kept.path == HEAD
    assert kept.note.endswith("is in use elsewhere as well")
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert applied.figures["inputs_left"] == 1


def test_low_rank_factors_are_scaled_and_shared_ones_only_once() -> None:
    model = tiny("llama", torch.float64)
    q, k, v = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    down_RI = torch.randn(8, 32, dtype=torch.float64)
    for path in (q, k, v):
        up_OR = torch.randn(model.get_submodule(path).out_features, 8, dtype=torch.float64)
        model.set_submodule(path, LowRankLinear.from_factors(up_OR, down_RI, None))
        model.get_submodule(path).down.weight = model.get_submodule(q).down.weight
    before = logits(model)
    applied = SmoothQuant().apply(model, calibration())
    torch.testing.assert_close(logits(model), before, rtol=1e-10, atol=1e-12)
    assert {q, k, v} <= {layer.path for layer in applied.layers if layer.kind == "smooth"}
    model.get_submodule("model.layers.1.self_attn.o_proj").weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.float64))
    model.get_submodule("model.layers.1.self_attn.q_proj").weight = model.get_submodule("model.layers.1.self_attn.o_proj").weight  # now used elsewhere
    left = {layer.path for layer in SmoothQuant().apply(model, calibration()).layers if layer.kind == "kept"}
    assert left == {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"}


def test_an_activation_that_is_no_relu_is_an_obstacle() -> None:
    model = tiny("t5 v1.0")
    model.config.dense_act_fn = "gelu_new"
    notes = {layer.path: layer.note for layer in SmoothQuant().apply(model, calibration()).layers if layer.kind == "kept"}
    assert notes["encoder.block.0.layer.1.DenseReluDense.wo"] == "there is an activation other than a ReLU before it"


def test_comes_before_what_leaves_integers() -> None:
    model = tiny("llama")
    Int4(max_loss_rise=1e6, head=True).apply(model, calibration())
    with pytest.raises(ValueError, match=r"no place for it in this model \(lm_head is a int4 module\): put it before"):
        SmoothQuant().apply(model, calibration())


def test_is_written_as_one_string() -> None:
    assert write(SmoothQuant(alpha=0.7, feed_forward=False)) == "smooth:0.7?feed_forward=false"
    assert parse("smooth:0.7", (SmoothQuant,)) == SmoothQuant(alpha=0.7)
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        SmoothQuant(alpha=1.5)


@pytest.mark.parametrize("name", ["t5 v1.0", "t5 v1.1", "llama", "qwen2"])
def test_the_int8_that_is_served_errs_less_after_it_and_loads_bitwise(name: str, tmp_path: Path) -> None:
    def after(*methods: Any) -> Any:
        model = with_outliers(name)
        for method in methods:
            method.apply(model, calibration())
        return model

    int8, expected = Int8(max_loss_rise=1e6, embedding=False), logits(with_outliers(name))
    rough, smooth = after(int8), after(SmoothQuant(), int8)
    assert (logits(smooth) - expected).norm() < 0.5 * (logits(rough) - expected).norm()
    checkpoint.save(smooth, train_tokenizer(["hello world"], 300, lower_case=False, ends_every_text=True), tmp_path, lineage=[], card="")
    assert torch.equal(logits(checkpoint.load(tmp_path)[0]), logits(smooth))


def test_t5s_wo_that_int8_would_have_to_keep_need_not_be_kept_after_it() -> None:
    kept = []
    for methods in ((), (SmoothQuant(),)):
        model = with_outliers("t5 v1.1")
        rows = drift(model)
        for method in methods:
            method.apply(model, rows)
        applied = Int8(max_loss_rise=2e-3, embedding=False).apply(model, rows)
        assert float(str(applied.figures["held_out_loss_rise_nats"])) <= 2e-3
        kept.append([layer.path for layer in applied.layers if layer.kind == "kept"])
    assert any(path.endswith(".wo") for path in kept[0])
    assert len(kept[1]) < len(kept[0])
    assert not any(path.endswith(".wo") for path in kept[1])
