"""A student made elastic, searched and cut: each a stage whose result loads as any checkpoint, and a killed build goes on to the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_compress import compress, logits
from tiny_task import rationales
from transformers import AutoModelForSeq2SeqLM

from llmdistill.compress.int8 import Int8
from llmdistill.core.store import Store
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.choice import parse
from llmdistill.elastic.controller import Controller
from llmdistill.elastic.differentiable import Differentiable
from llmdistill.elastic.evolution import Evolution
from llmdistill.elastic.extract import extracted
from llmdistill.elastic.kept import space_of
from llmdistill.elastic.latency import LatencySetting
from llmdistill.elastic.nsga2 import NSGA2
from llmdistill.elastic.question import Limit
from llmdistill.elastic.random_search import RandomSearch
from llmdistill.elastic.strategy import Progressive, Sandwich
from llmdistill.losses.multitask import LabelOnly
from llmdistill.models import checkpoint
from llmdistill.stages import search as search_stage
from llmdistill.stages.elastic import Elastic
from llmdistill.stages.extract import Extract
from llmdistill.stages.search import SearchSubnets
from llmdistill.train_settings import Best, Steps, TrainSettings

SHORT = TrainSettings(duration=Steps(6), batch_size=8, evaluate_every_steps=3, learning_rate=1e-3)
AXES = Axes(ffn=(0.25, 0.5, 0.75), heads=(0.5,), width=(0.5,), even=True)


def elastic(folder: Path, **settings: Any) -> Elastic:
    like: Any = compress(folder, Int8())
    rows = rationales(num_train=24, num_validation=8)
    return Elastic(**{"checkpoint": like.checkpoint, "task": like.task, "rationales": rows, "axes": AXES, "settings": SHORT, "loss": LabelOnly()} | settings)


def search_of(stage: Elastic, **settings: Any) -> SearchSubnets:
    short = LatencySetting(prompt_tokens=4, new_tokens=2)
    common: Any = {"checkpoint": stage, "task": stage.task, "rationales": stage.rationales, "loss": stage.loss, "latencies": (short,), "num_samples": 16}
    return SearchSubnets(**common | {"budget": 12} | settings)


@pytest.mark.parametrize("strategy", [Sandwich(), Progressive()])
def test_the_result_loads_as_the_whole_and_holds_its_sub_networks(strategy: Sandwich | Progressive, tmp_path: Path) -> None:
    stage = elastic(tmp_path, strategy=strategy)
    store = Store(tmp_path / "store")
    built = store.build(stage)
    student: Any = checkpoint.load(store.artifact(stage.checkpoint).folder)[0]
    whole: Any = checkpoint.load(built.folder)[0]
    space = space_of(whole)
    assert space == AXES.space(space.shape, {legal.name: one.layer_order for legal, one in zip(space.shape.stacks, space.stacks, strict=True)})
    assert sum(parameter.numel() for parameter in whole.parameters()) == sum(parameter.numel() for parameter in student.parameters())
    assert built.lineage()[-1]["technique"] == "elastic"
    assert built.manifest()["figures"]["num_subnets"] == space.num_subnets == 16
    assert "--subnet" in built.model_card()
    small = store.build(Extract(checkpoint=stage, subnet="ffn=16"))
    stock: Any = AutoModelForSeq2SeqLM.from_pretrained(small.folder)
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.inference_mode():
        theirs = stock(input_ids=ids, decoder_input_ids=torch.tensor([[0, 5, 6]])).logits
        ours = extracted(whole, parse("ffn=16", space)).eval()(input_ids=ids, decoder_input_ids=torch.tensor([[0, 5, 6]])).logits
    assert torch.equal(theirs, ours)
    assert not list(built.folder.glob("training*"))


def test_before_the_first_step_the_sorted_student_says_what_the_student_says(tmp_path: Path) -> None:
    standing = dataclasses.replace(SHORT, duration=Steps(1), learning_rate=1e-12, best=Best.LAST)
    stage = elastic(tmp_path, settings=standing)
    store = Store(tmp_path / "store")
    built = store.build(stage)
    before, after = logits(store.artifact(stage.checkpoint).folder), logits(built.folder)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    weight = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    weights = [load_file(folder / "model.safetensors")[weight] for folder in (store.artifact(stage.checkpoint).folder, built.folder)]
    assert not torch.allclose(weights[0], weights[1]), "the neurons are in another order"


def test_a_build_that_was_killed_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = elastic(tmp_path)
    unbroken = Store(tmp_path / "unbroken").build(stage)
    with monkeypatch.context() as patch:

        def killed(*_: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(Elastic, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path / "store").build(stage)
    resumed = Store(tmp_path / "store").build(stage)
    assert resumed.manifest()["resumed"]
    assert (resumed.folder / "model.safetensors").read_bytes() == (unbroken.folder / "model.safetensors").read_bytes()


def test_all_searches_answer_the_same_question_and_one_is_chosen_by_measurement(tmp_path: Path) -> None:
    stage = elastic(tmp_path)
    methods = (RandomSearch(), Evolution(), NSGA2(), Differentiable(), Controller())
    search = search_of(stage, methods=methods)
    store = Store(tmp_path / "store")
    found = store.build(search).found()
    assert list(found["methods"]) == [method.kind for method in methods]
    for told in found["methods"].values():
        assert 0 < told["num_asked"] <= 12
    measured = {point["subnet"]: point for point in found["points"]}
    assert found["chosen"] in measured
    assert sum(point["is_largest"] for point in found["points"]) == sum(point["is_smallest"] for point in found["points"]) == 1
    for point in found["points"]:
        assert point["predicted"].keys() == point["measured"].keys() == {"parameters", "weight_bytes", "latency_ms_batch_1"}
    assert found["accuracy_predictor"]["num_held_out"] == found["cost_predictors"]["latency_ms_batch_1"]["num_held_out"] > 0
    chosen = store.build(Extract(checkpoint=stage, subnet=search))
    assert chosen.manifest()["figures"]["subnet"] == found["chosen"]
    assert chosen.manifest()["figures"]["parameters"] == measured[found["chosen"]]["parameters"]


def test_what_is_chosen_keeps_the_limits(tmp_path: Path) -> None:
    stage = elastic(tmp_path)
    store = Store(tmp_path / "store")
    sizes = {point["subnet"]: point["measured"]["weight_bytes"] for point in store.build(search_of(stage, cost="weight_bytes")).found()["points"]}
    most = (min(sizes.values()) + max(sizes.values())) / 2
    limits = (Limit(cost="weight_bytes", most=most),)
    found = store.build(search_of(stage, cost="weight_bytes", limits=limits)).found()
    [chosen] = [point for point in found["points"] if point["subnet"] == found["chosen"]]
    assert chosen["measured"]["weight_bytes"] <= most
    with pytest.raises(ValueError, match="weight_bytes <= 10"):
        store.build(search_of(stage, limits=(Limit(cost="weight_bytes", most=10),)))


def test_a_search_that_was_killed_measures_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = search_of(elastic(tmp_path))
    store = Store(tmp_path / "store")
    measured: list[Any] = []
    whole = search_stage._Measured.accuracy

    def counted(self: Any, subnet: Any) -> float:
        if len(measured) == 7:
            raise KeyboardInterrupt
        measured.append(subnet)
        return whole(self, subnet)

    with monkeypatch.context() as patch:
        patch.setattr(search_stage._Measured, "accuracy", counted)
        with pytest.raises(KeyboardInterrupt):
            store.build(search)
    path = store.partial(search) / search_stage.SAMPLES
    path.write_text(path.read_text() + '{"subnet": "torn')
    again: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(search_stage._Measured, "accuracy", lambda self, subnet: (again.append(subnet), whole(self, subnet))[1])
        built = store.build(search)
    lines = [json.loads(line) for line in (built.folder / search_stage.SAMPLES).read_text().splitlines()]
    assert len(lines) == len({line["subnet"] for line in lines}) == 16
    assert not set(measured) & set(again[: 16 - len(measured)])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda stage: dataclasses.replace(stage, settings=dataclasses.replace(SHORT, best=Best.ACCURACY)), "looks at the whole model alone"),
        (lambda stage: dataclasses.replace(stage, num_importance_rows=-1), "num_importance_rows is -1; give 0 or more"),
        (lambda stage: search_of(stage, num_samples=3), "num_samples is 3; give 10 or more"),
        (lambda stage: search_of(stage, methods=()), "methods or latencies is empty"),
        (lambda stage: search_of(stage, accuracy_margin=1.0), "accuracy_margin is 1.0"),
        (lambda stage: Limit.parse("latency<5"), "is no limit; write COST<=NUMBER"),
        (lambda stage: Limit.parse("latency<=-5"), "is no limit; write COST<=NUMBER"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(elastic(tmp_path))
