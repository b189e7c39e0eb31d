"""Exits are part of a checkpoint: they load as they were saved, leave transformers' forward alone, and their thresholds belong to their weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from llmdistill.models.checkpoint import load, save
from llmdistill.models.exit_settings import Calibration, Confidence, ExitSettings, Point, Policy, read_exits
from llmdistill.models.exits import add_exits, check_calibration, digest, keep_settings
from llmdistill.models.int8_linear import Int8Linear

Logits = Callable[[Any], torch.Tensor]
SETTINGS = ExitSettings(layers=(1,), adapter_rank=3, num_vocabulary=4, has_gates=True, confidence=Confidence.GATE, decay=1.5, policy=Policy.PROPAGATED)


def with_exits(model: Any) -> Any:
    exits = add_exits(model, SETTINGS, [1, 5, 7, 9])
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_load_as_they_were_saved(model: Any, dtype: torch.dtype, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    expected = logits(model.to(dtype))
    model = with_exits(model)
    assert torch.equal(logits(model), expected), "transformers' forward takes no notice of them"
    save(model, tokenizer, tmp_path, lineage=[], card="")
    auto: Any = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    for loaded in (load(tmp_path)[0], auto.from_pretrained(str(tmp_path))):
        again: Any = loaded
        assert torch.equal(logits(again), expected)
        assert read_exits(again.config) == SETTINGS
        states = model.exits.state_dict()
        assert again.exits.state_dict().keys() == states.keys()
        assert all(torch.equal(tensor, states[name]) for name, tensor in again.exits.state_dict().items())
        assert digest(again) == digest(model)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith("llmdistill_")


def test_the_digest_is_of_the_weights_the_dtype_and_the_confidence(model: Any) -> None:
    model = with_exits(model)
    found = {digest(model)}
    keep_settings(model, replace(SETTINGS, confidence=Confidence.TOP1))
    found.add(digest(model))
    keep_settings(model, SETTINGS)
    with torch.no_grad():
        model.exits.norms[0].weight[0] += 1
    found.add(digest(model))
    found.add(digest(model.bfloat16()))
    assert len(found) == 4


def test_a_technique_that_changes_the_weights_leaves_exits_without_thresholds(
    model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_exits(model)
    point = Point(delta=0.02, threshold=0.7, mean_loss=0.0, mean_layers=1.0)
    calibration = Calibration(weights=digest(model), epsilon=0.05, quality="correct", num_rows=200, points=(point,))
    keep_settings(model, replace(SETTINGS, calibration=calibration))
    save(model, tokenizer, tmp_path / "calibrated", lineage=[], card="")
    loaded: Any = load(tmp_path / "calibrated")[0]
    check_calibration(loaded)
    assert Calibration.read(loaded.config) == calibration
    path = next(name for name, module in loaded.named_modules() if type(module) is torch.nn.Linear and name.endswith(("o", "o_proj")))
    loaded.set_submodule(path, Int8Linear.from_linear(loaded.get_submodule(path)))
    save(loaded, tokenizer, tmp_path / "quantized", lineage=[], card="")
    assert "calibrate again" in caplog.text
    settings = read_exits(json.loads((tmp_path / "quantized" / "config.json").read_text()))
    assert settings == SETTINGS

    narrow, _ = load(tmp_path / "calibrated", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="another dtype"):
        check_calibration(narrow)


def test_what_cannot_be_is_refused(model: Any) -> None:
    if model.config.is_encoder_decoder:
        with pytest.raises(ValueError, match="the encoder's exits are after layers"):
            add_exits(model, replace(SETTINGS, encoder_layers=(2,)), [1, 2, 3, 4])
    else:
        with pytest.raises(ValueError, match="has no encoder"):
            add_exits(model, replace(SETTINGS, encoder_layers=(1,)), [1, 2, 3, 4])
    with pytest.raises(ValueError, match="2 tokens are given"):
        add_exits(model, SETTINGS, [1, 2])
    num_layers = (model.config.num_decoder_layers if model.config.is_encoder_decoder else model.config.num_hidden_layers) or 0
    with pytest.raises(ValueError, match="each must be less"):
        add_exits(model, replace(SETTINGS, layers=(num_layers,)), [1, 2, 3, 4])
    with_exits(model)
    with pytest.raises(ValueError, match="has exits already"):
        add_exits(model, SETTINGS, [1, 2, 3, 4])
    for layers in ((), (2, 1), (1, 1), (0,)):
        with pytest.raises(ValueError, match="ascending"):
            replace(SETTINGS, layers=layers)
    with pytest.raises(ValueError, match="trained without"):
        replace(SETTINGS, has_gates=False)
    with pytest.raises(ValueError, match="upgrade llmdistill"):
        ExitSettings.from_json({"layers": [1]})
