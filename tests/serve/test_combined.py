"""Checkpoints to which several things were done at once, behind the server: low rank and elastic with calibrated exits, and low rank in int8 with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config

from llmdistill.decode.engine import Decoding, Engine
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.choice import parse, write
from llmdistill.elastic.extract import extracted
from llmdistill.elastic.kept import keep, space_of
from llmdistill.elastic.measure import shape_of
from llmdistill.models.checkpoint import load, save
from llmdistill.models.exit_settings import NEVER, Calibration, ExitSettings, Point
from llmdistill.models.exits import add_exits, digest, keep_settings
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.t5 import new_t5
from llmdistill.serve.served_model import Precision, ServedModel, load_served_model
from llmdistill.serve.settings import ServeSettings

LAYERS = (1, 2)
RISKS = {0.01: 0.9, 0.1: 0.0}  # at a threshold of 0 every token leaves at the first exit
PROMPT = "please cancel my order"


def make(tokenizer: Any, folder: Path, *, kind: str) -> Path:
    """A tiny T5 of low rank with calibrated exits, elastic or in int8."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 4, "num_heads": 4, "tie_word_embeddings": False}
    shape |= {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    model: Any = new_t5(T5Config(**shape)).eval()
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            block.layer[-1].DenseReluDense.wo = LowRankLinear(64, 32, 12, bias=False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    if kind == "int8":
        for block in model.decoder.block:
            block.layer[0].SelfAttention.q = Int8Linear.from_linear(block.layer[0].SelfAttention.q)
    exits = add_exits(model, ExitSettings(layers=LAYERS, adapter_rank=2))
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter)
    if kind == "elastic":
        keep(model, Axes(ffn=(0.5,), heads=(0.5,), depth=(0.5,), width=(0.5,), rank=(0.5,)).space(shape_of(model)))
    settings = ExitSettings(layers=LAYERS, adapter_rank=2, calibration=calibration(model))
    if kind == "elastic":
        smallest = space_of(model).smallest()
        settings = replace(settings, subnet_calibrations={write(smallest, space_of(model)): calibration(extracted(model, smallest))})
    keep_settings(model, settings)
    save(model, tokenizer, folder, lineage=[], card="a test")
    return folder


def calibration(model: Any) -> Calibration:
    points = tuple(Point(delta=delta, threshold=threshold, mean_loss=0.0, mean_layers=2.5 - delta) for delta, threshold in RISKS.items())
    return Calibration(weights=digest(model), epsilon=0.05, quality="accuracy", num_rows=10, points=points)


@pytest.fixture(scope="module", params=["elastic", "int8"])
def folder(request, tokenizers, tmp_path_factory) -> Path:
    return make(tokenizers["metaspace"], tmp_path_factory.mktemp("combined") / request.param, kind=request.param)


def serve(folder: Path, precision: Precision = Precision.FLOAT32) -> ServedModel:
    return load_served_model(folder, settings=ServeSettings(), device="cpu", precision=precision)


def test_a_request_gets_the_sub_network_and_the_exits_that_it_asks_for(folder, start_server, http) -> None:
    served = serve(folder)
    url = start_server(served, ServeSettings()).url
    model, tokenizer = load(folder, dtype=torch.float32)
    tokens: Any = tokenizer(PROMPT)["input_ids"]

    def expected(of: Any, threshold: float) -> tuple[str, Any]:
        [answer] = Engine(of.eval()).generate([tokens], Decoding(max_new_tokens=12, exit_threshold=threshold))
        text = str(tokenizer.decode(list(answer.tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return text, pytest.approx(sum(answer.layers) / len(answer.layers), abs=1e-3)

    def said(**budget: Any) -> tuple[str, float]:
        body = {"model": folder.name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "llmdistill": budget}
        answer = http.post(f"{url}/v1/completions", json=body).json()
        return answer["choices"][0]["text"], answer["llmdistill"]["layers_per_token"]

    assert said() == expected(model, RISKS[0.01])
    assert said(exit_risk=0) == expected(model, NEVER)
    assert said(exit_risk=0.5) == expected(model, RISKS[0.1])
    assert said(exit_risk=0.5)[1] == 1
    assert said(exit_risk=0)[1] == 4
    if folder.name == "elastic":
        smallest = extracted(model, parse("smallest", space_of(model)))
        assert said(subnet="smallest") == expected(smallest, RISKS[0.01])
        assert said(subnet="smallest", exit_risk=0) == expected(smallest, NEVER)
        assert said(subnet="smallest", exit_risk=0.5) == expected(smallest, RISKS[0.1])
        assert (said(subnet="smallest", exit_risk=0)[1], said(subnet="smallest", exit_risk=0.5)[1]) == (2, 1)
    risks = [(point.exit_risk, point.num_layers) for point in served.points.all]
    assert risks == [(risk, layers) for layers in ((4, 2) if folder.name == "elastic" else (4,)) for risk in (0.0, *RISKS)]


def test_thresholds_of_other_weights_are_refused(folder) -> None:
    with pytest.raises(ValueError, match="calibrated for other weights, or for these in another dtype"):
        serve(folder, Precision.BFLOAT16)
