"""The exits of sub-networks: in place and taken out they are the same, at the width and between the layers of the sub-network, and calibrated by themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from elastic_models import AXES, MODELS, PROMPTS, elastic_model

from llmdistill.decode.engine import Decoding, Engine
from llmdistill.elastic.choice import parse, write
from llmdistill.elastic.exit_cuts import exits_within
from llmdistill.elastic.extract import extracted
from llmdistill.elastic.subnet import with_subnet
from llmdistill.models.checkpoint import load, save
from llmdistill.models.exit_settings import NEVER, Calibration, Confidence, ExitSettings, Point, read_exits
from llmdistill.models.exits import add_exits, check_calibration, digest, exits_of, keep_settings, own_threshold
from llmdistill.models.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["some text"], 262, lower_case=False, ends_every_text=True)


SETTINGS = ExitSettings(layers=(1, 2), adapter_rank=2, num_vocabulary=4, has_gates=True)


def elastic_with_exits(name: str, settings: ExitSettings = SETTINGS) -> Any:
    """A random elastic model with random exits."""
    model, space = elastic_model(name, AXES)
    if model.config.is_encoder_decoder:
        settings = replace(settings, encoder_layers=(1, 2))
    for parameter in add_exits(model, settings, [1, 5, 7, 9]).parameters():
        torch.nn.init.normal_(parameter)
    return model, space


def calibration(model: Any, threshold: float) -> Calibration:
    points = (Point(delta=0.1, threshold=threshold, mean_loss=0.0, mean_layers=1.5),)
    return Calibration(weights=digest(model), epsilon=0.05, quality="correct", num_rows=10, points=points)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("confidence", [Confidence.TOP1, Confidence.GATE])
def test_exits_in_place_are_those_of_the_extraction(name: str, confidence: Confidence) -> None:
    model, space = elastic_with_exits(name, replace(SETTINGS, confidence=confidence))
    generator = Random(0)
    layers = set()
    for subnet in [space.smallest(), space.largest(), *(space.sample(generator) for _ in range(6))]:
        small = extracted(model, subnet)
        for threshold in (0.0, 0.4, NEVER):
            decoding = Decoding(max_new_tokens=5, exit_threshold=threshold)
            with with_subnet(model, subnet):
                in_place = Engine(model).generate(PROMPTS, decoding)
            alone = Engine(small).generate(PROMPTS, decoding)
            assert [(row.tokens, row.layers, row.encoder_layers) for row in in_place] == [(row.tokens, row.layers, row.encoder_layers) for row in alone]
            layers |= {depth for row in alone for depth in row.layers}
    assert len(layers) > 1
    assert exits_of(model)[0].layers == SETTINGS.layers  # pyright: ignore[reportOptionalSubscript]


def test_exits_lie_after_the_layers_that_stay_and_are_dropped_at_the_ends() -> None:
    _, space = elastic_model("t5 v1.1", AXES, decoder=(1, 2, 0))
    two = parse("decoder.depth=2", space)  # layers 1 and 2 stay
    one, all_three = ExitSettings(layers=(1,)), ExitSettings(layers=(1, 2))
    assert exits_within(one, space, two) is None  # nothing that stays is before it
    assert exits_within(all_three, space, two) == (ExitSettings(layers=(1,)), [1], [])
    assert exits_within(all_three, space, space.largest()) == (all_three, [0, 1], [])
    _, space = elastic_model("t5 v1.1", AXES, decoder=(0, 2, 1))
    assert exits_within(all_three, space, parse("decoder.depth=2", space)) == (
        ExitSettings(layers=(1,)),
        [1],
        [],
    )  # both are after layer 0 now: the later stays


@pytest.mark.parametrize("name", ["t5 v1.1", "llama grouped"])
def test_each_sub_network_has_thresholds_of_its_own(name: str, tokenizer: Any, tmp_path: Path) -> None:
    model, space = elastic_with_exits(name)
    subnet, other = parse("width=16", space), parse("width=16,ffn=16", space)
    of_subnet = {write(subnet, space): calibration(extracted(model, subnet), 0.3)}
    keep_settings(model, replace(exits_of(model)[0], calibration=calibration(model, 0.6), subnet_calibrations=of_subnet))  # pyright: ignore[reportOptionalSubscript]
    save(model, tokenizer, tmp_path / "elastic", lineage=[], card="")
    again = load(tmp_path / "elastic")[0]
    assert own_threshold(again) == 0.6
    for of, expected in ((subnet, 0.3), (other, NEVER), (space.largest(), 0.6)):
        small = extracted(again, of)
        check_calibration(small)
        assert own_threshold(small) == expected
        assert read_exits(small.config).subnet_calibrations == {}  # pyright: ignore[reportOptionalMemberAccess]
    with with_subnet(again, subnet):
        assert own_threshold(again) == NEVER  # the digest is the extraction's, so in place nothing is promised
    with torch.no_grad():
        again.exits.norms[0].weight[0] += 1  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    with pytest.raises(ValueError, match="calibrated for other weights"):
        own_threshold(extracted(again, subnet))


def test_an_extraction_is_saved_with_its_exits_or_without_a_trace(tokenizer: Any, tmp_path: Path) -> None:
    model, space = elastic_with_exits("t5 v1.1")
    for text, layers in (("width=16", (1, 2)), ("decoder.depth=2", (1,)), ("encoder.depth=2,decoder.depth=2", (1,))):
        small = extracted(model, parse(text, space))
        folder = tmp_path / text.replace(",", " ")
        save(small, tokenizer, folder, lineage=[], card="")
        again = load(folder)[0]
        assert read_exits(again.config) == read_exits(small.config)
        assert read_exits(again.config).layers == layers  # pyright: ignore[reportOptionalMemberAccess]
        states = small.exits.state_dict()
        assert all(torch.equal(tensor, states[name]) for name, tensor in again.exits.state_dict().items())  # pyright: ignore[reportAttributeAccessIssue]
        decoding = Decoding(max_new_tokens=5, exit_threshold=0.4)
        assert Engine(again).generate(PROMPTS, decoding) == Engine(small).generate(PROMPTS, decoding)
    model, space = elastic_model("llama grouped", AXES, decoder=(1, 2, 0))
    add_exits(model, ExitSettings(layers=(1,)))
    small = extracted(model, parse("depth=2", space))
    assert read_exits(small.config) is None
    assert not hasattr(small, "exits")
