"""Law: the fewest layers are kept with which the loss stays within the limit, and what is not kept is quantized."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantization_models import Drift, calibration, drift, rows, tiny
from torch import nn

from llmdistill.compress.calibration import Calibration, row_loss
from llmdistill.compress.estimated_rise import estimated_rises
from llmdistill.compress.sensitivity import keep_sensitive
from llmdistill.compress.slots import leaves


class Rounded(nn.Linear):
    """Stands for a quantized linear: its weight is rounded to a grid."""


def rounding(step: float | None = None, steps: dict[str, float] | None = None) -> Callable[[Any, str], nn.Module]:
    """Puts linears in place whose weights are rounded, finely where nothing else is said."""

    def quantize(model: Any, path: str) -> nn.Module:
        original = model.get_submodule(path)
        size = step or (steps or {}).get(path, 1e-4)
        rounded = Rounded(original.in_features, original.out_features, bias=original.bias is not None)
        with torch.no_grad():
            rounded.weight.copy_((original.weight / size).round() * size)
            if original.bias is not None:
                rounded.bias.copy_(original.bias)
        model.set_submodule(path, rounded)
        return original

    return quantize


def paths_of(model: Any) -> list[str]:
    return [path for path, _, slot in leaves(model) if slot.path != "lm_head"]


class Counted(Calibration):
    """Counts the rows on which a loss was measured."""

    rows_measured = 0

    def mean_loss(self, model: Any) -> float:
        Counted.rows_measured += len(self.held_out)
        return super().mean_loss(model)


@pytest.mark.parametrize("name", ["t5 v1.0", "t5 v1.1", "llama", "qwen2"])
def test_keeps_nothing_and_measures_twice_where_quantization_is_harmless(name: str) -> None:
    model, Counted.rows_measured = tiny(name), 0
    paths = paths_of(model)
    found = keep_sensitive(model, paths, rounding(1e-4), Counted(examples=rows(2), held_out=rows(4), loss=Drift(model)), 0.02)
    assert (found.kept, found.rises, Counted.rows_measured) == ((), {}, 8)
    assert {type(model.get_submodule(path)) for path in paths} == {Rounded}
    assert found.loss_before < found.loss_after == found.loss_all_quantized < found.loss_before + 0.02


@pytest.mark.parametrize("name", ["t5 v1.0", "t5 v1.1", "llama", "qwen2"])
def test_keeps_the_one_layer_that_is_sensitive(name: str) -> None:
    model = tiny(name)
    paths = paths_of(model)
    sensitive = paths[len(paths) // 2]
    with torch.no_grad():
        model.get_submodule(sensitive).weight.mul_(8)
    before, rows_ = model.get_submodule(sensitive), drift(model)
    found = keep_sensitive(model, paths, rounding(steps={sensitive: 40.0}), rows_, 1e-3)
    assert [layer.path for layer in found.kept] == [sensitive]
    assert model.get_submodule(sensitive) is before
    assert {type(model.get_submodule(path)) for path in paths if path != sensitive} == {Rounded}
    assert found.rises[sensitive] == max(found.rises.values()) > 1e-3
    assert f"{found.rises[sensitive]:.4f} nats" in found.kept[0].note
    assert found.kept[0].kind == "kept"
    assert found.loss_after == rows_.mean_loss(model) <= found.loss_before + 1e-3


def test_many_small_rises_that_add_up_are_kept_the_most_sensitive_first_and_hardly_more_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmdistill.compress.sensitivity.NUM_MEASURED", 100)
    model, limit = tiny("t5 v1.1"), 2e-3
    rows_, paths = drift(model), paths_of(model)
    found = keep_sensitive(model, paths, rounding(0.1), rows_, limit, num_rows=4)
    assert found.loss_all_quantized > found.loss_before + limit
    assert found.loss_after == rows_.mean_loss(model) <= found.loss_before + limit
    ranked = sorted(found.rises, key=lambda path: -found.rises[path])
    assert 0 < len(found.kept) < len(paths)
    assert [layer.path for layer in found.kept] == ranked[: len(found.kept)]
    for layer in found.kept[-max(1, len(found.kept) // 10) :]:  # a tenth less
        rounding(0.1)(model, layer.path)
    assert rows_.mean_loss(model) > found.loss_before + limit


def test_paths_that_belong_together_are_kept_together() -> None:
    model = tiny("llama")
    pair = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    found = keep_sensitive(model, [pair, "model.layers.1.mlp.up_proj"], rounding(steps=dict.fromkeys(pair, 50.0)), drift(model), 1e-4)
    assert tuple(layer.path for layer in found.kept) == pair
    assert found.is_kept(pair[0])
    assert not found.is_kept("model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("name", ["t5 v1.0", "llama"])
def test_of_many_candidates_the_suspects_are_measured_and_the_sensitive_one_is_among_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmdistill.compress.sensitivity.NUM_MEASURED", 2)
    model = tiny(name)
    paths = paths_of(model)
    steps = {paths[1]: 0.5, paths[-2]: 0.4}
    found = keep_sensitive(model, paths, rounding(steps=steps), drift(model), 1e-4)
    assert set(found.rises) == set(steps)
    assert {layer.path for layer in found.kept} == set(steps)


def test_more_are_kept_than_are_measured_where_that_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmdistill.compress.sensitivity.NUM_MEASURED", 2)
    model = tiny("llama")
    found = keep_sensitive(model, paths_of(model), rounding(0.3), drift(model), 1e-6)
    assert len(found.rises) == 2 < len(found.kept)
    assert found.kept[-1].note.endswith("among the most sensitive by estimate")
    assert found.kept[-1].figures == {}


def test_an_estimated_rise_is_half_the_mean_square_of_what_each_token_does_to_the_loss() -> None:
    model = tiny("llama").double()
    path = "model.layers.1.mlp.up_proj"
    linear, rows_ = model.get_submodule(path), drift(model)
    other = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None).double()
    expected = 0.0
    batches = list(rows_.batches(model))
    for batch in batches:
        seen: list[torch.Tensor] = []

        def see(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, seen: list[torch.Tensor] = seen) -> None:
            output.retain_grad()
            seen += [inputs[0], output]

        handle = linear.register_forward_hook(see)
        row_loss(rows_.loss, model, batch).backward()
        handle.remove()
        inputs, output = seen
        assert output.grad is not None
        effects = ((other(inputs) - output) * output.grad).sum(-1)
        expected += float(effects.square().sum().detach()) / 2
    assert estimated_rises(model, [[(linear, other)]], rows_) == [pytest.approx(expected / len(batches), rel=1e-9)]
    assert not linear._forward_hooks


@pytest.mark.parametrize("name", ["t5 v1.0", "t5 v1.1"])
def test_t5s_wo_that_overflows_in_half_precision_is_found(name: str) -> None:
    """The known hazard: what `wo` hands on is beyond float16's 65504, while bfloat16 and float32 have room for it. The final norm makes it small again."""

    class Half(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        @property
        def weight(self) -> torch.Tensor:
            return self.linear.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x.double().half().float(), self.linear.weight).half().float()

    def quantize(model: Any, path: str) -> nn.Module:
        original = model.get_submodule(path)
        model.set_submodule(path, Half(original))
        return original

    model = tiny(name)
    wo = "encoder.block.1.layer.1.DenseReluDense.wo"
    with torch.no_grad():
        model.get_submodule(wo).weight.mul_(1e7)
    found = keep_sensitive(model, paths_of(model), quantize, drift(model), 0.02)
    assert not math.isfinite(found.loss_all_quantized)
    assert [layer.path for layer in found.kept] == [wo]
    assert "infinite or no number" in found.kept[0].note
    assert found.kept[0].figures == {}
    assert abs(found.loss_after - found.loss_before) < 0.02


@pytest.mark.parametrize("limit", [-0.1, math.inf, math.nan])
def test_refuses_a_limit_that_is_none(limit: float) -> None:
    with pytest.raises(ValueError, match="max_loss_rise is"):
        keep_sensitive(tiny("llama"), [], rounding(0.1), calibration(), limit)


def test_refuses_a_model_that_is_broken_already() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the held-out loss is nan before anything is quantized"):
        keep_sensitive(model, paths_of(model), rounding(0.1), calibration(), 0.1)
