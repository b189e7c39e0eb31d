"""Exits trained and calibrated as stages: the full model stays, a killed build ends in the same weights, and thresholds are the last thing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compress import ANY_RISE, compress, logits
from tiny_task import rationales
from transformers import T5Config

from llmdistill.compress.int8 import Int8
from llmdistill.core.artifacts import CALIBRATION, read_json
from llmdistill.core.store import Store
from llmdistill.decode.decoding import Decoding
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.choice import parse, write
from llmdistill.elastic.extract import extracted
from llmdistill.elastic.kept import space_of
from llmdistill.exits.quality import Quality
from llmdistill.losses.multitask import LabelOnly
from llmdistill.models import checkpoint
from llmdistill.models.exit_settings import Calibration, Confidence, read_exits
from llmdistill.models.student import Pretrained
from llmdistill.models.t5 import new_t5
from llmdistill.stages.answering import PREDICT, Answering
from llmdistill.stages.calibrate import CalibrateExits
from llmdistill.stages.elastic import Elastic
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.exits import TrainExits, Trains, Vocabulary, evenly
from llmdistill.stages.extract import Extract
from llmdistill.stages.report import ReportStage
from llmdistill.stages.take import Take
from llmdistill.train_settings import Steps, TrainSettings

SHORT = TrainSettings(duration=Steps(6), batch_size=8, evaluate_every_steps=3, learning_rate=1e-2)


def deep_student(folder: Path) -> Take:
    """The tiny student, with four decoder layers."""
    like: Any = compress(folder, Int8())
    _, tokenizer = checkpoint.load(folder / "student")
    torch.manual_seed(1)
    shape: dict[str, Any] = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 4, "vocab_size": len(tokenizer)}
    ids: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "tie_word_embeddings": False}
    checkpoint.save(new_t5(T5Config(**shape, **ids)), tokenizer, folder / "deep", lineage=[{"technique": "initialise"}], card="")
    assert like.checkpoint.name == "student"
    return Take(name="student", source=Pretrained(source=str(folder / "deep")))


def train_exits(folder: Path, **settings: Any) -> TrainExits:
    take, like = deep_student(folder), compress(folder, Int8())
    rows = rationales(num_train=24, num_validation=8)
    common: Any = {"checkpoint": take, "task": like.task, "rationales": rows, "loss": LabelOnly(), "settings": SHORT, "num_exits": 2}
    return TrainExits(**common | settings)


def test_trained_exits_leave_the_full_model_to_the_bit_and_lower_their_loss(tmp_path: Path) -> None:
    stage, store = train_exits(tmp_path, adapter_rank=2), Store(tmp_path / "store")
    built = store.build(stage)
    assert torch.equal(logits(built.folder), logits(store.artifact(stage.checkpoint).folder))
    model: Any = checkpoint.load(built.folder)[0]
    settings = read_exits(model.config)
    assert settings is not None
    assert settings.layers == (1, 3)
    assert settings.num_vocabulary == len(model.exits.vocabulary_K) < model.config.vocab_size
    assert model.config.eos_token_id in model.exits.vocabulary_K
    losses = [json.loads(line) for line in (built.folder / "metrics.jsonl").read_text().splitlines()]
    watched = [line["validation_loss"] for line in losses if "validation_loss" in line]
    assert watched[-1] < watched[0]
    assert built.lineage()[-1]["technique"] == "exits"
    assert not list(built.folder.glob("training*"))


def test_the_whole_student_can_be_trained_with_them(tmp_path: Path) -> None:
    stage = train_exits(tmp_path, trains=Trains.WHOLE, layer_dropout=0.2, vocabulary=Vocabulary.WHOLE, gates=False)
    store = Store(tmp_path / "store")
    built = store.build(stage)
    assert not torch.equal(logits(built.folder), logits(store.artifact(stage.checkpoint).folder))
    settings = read_exits(read_json(built.folder / "config.json"))
    assert settings is not None
    assert (settings.num_vocabulary, settings.has_gates) == (0, False)


def test_a_build_that_was_killed_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = train_exits(tmp_path, trains=Trains.WHOLE, layer_dropout=0.3)
    unbroken = Store(tmp_path / "unbroken").build(stage)
    with monkeypatch.context() as patch:

        def killed(*_: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(TrainExits, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path / "store").build(stage)
    resumed = Store(tmp_path / "store").build(stage)
    assert (resumed.folder / "model.safetensors").read_bytes() == (unbroken.folder / "model.safetensors").read_bytes()


def test_quantize_then_calibrate_then_serve(tmp_path: Path) -> None:
    """The thresholds are for the quantized weights, the checkpoint leaves by them of itself, and a quantization after them takes them away."""
    exits, store = train_exits(tmp_path), Store(tmp_path / "store")
    like = compress(tmp_path, Int8(max_loss_rise=ANY_RISE))
    int8 = dataclasses.replace(like, name="int8", checkpoint=exits, loss=LabelOnly())
    calibrate = CalibrateExits(
        checkpoint=int8, task=like.task, deltas=(0.5, 0.9), quality=Quality.SAME, confidence=Confidence.GATE, split="test", max_new_tokens=4, epsilon=0.2
    )
    built = store.build(calibrate)
    found = Calibration.read(read_json(built.folder / "config.json"))
    assert found is not None
    assert [point.delta for point in found.points] == [0.5, 0.9]
    assert found.points[0].threshold >= found.points[1].threshold
    record = read_json(built.folder / CALIBRATION)
    assert [point["threshold"] for point in record["curve"]] == sorted((point["threshold"] for point in record["curve"]), reverse=True)
    assert found.points[1].threshold < 1.0, "a delta of 0.9 is easily promised"
    student = Answering.load(built.folder, device="cpu")
    own, given = (
        student.generated(PREDICT, ["please stop it"], decoding=decoding)
        for decoding in (Decoding(max_new_tokens=4), Decoding(max_new_tokens=4, exit_threshold=found.points[0].threshold))
    )
    assert [(row.tokens, row.layers) for row in own] == [(row.tokens, row.layers) for row in given]
    evaluated = store.build(Evaluate(checkpoint=calibrate, task=like.task, latency_repeats=1, max_new_tokens=4, num_sample_rows=0)).summary()
    assert 1 <= evaluated["layers_per_token"] <= 4

    again = store.build(dataclasses.replace(like, name="again", checkpoint=dataclasses.replace(calibrate, checkpoint=exits), loss=LabelOnly()))
    assert Calibration.read(read_json(again.folder / "config.json")) is None


def test_rows_that_are_too_few_promise_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exits, store = train_exits(tmp_path), Store(tmp_path / "store")
    built = store.build(CalibrateExits(checkpoint=exits, task=exits.task, deltas=(0.01,), quality=Quality.SAME, split="test", max_new_tokens=3))
    assert "cannot promise a delta of 0.01" in caplog.text
    found = Calibration.read(read_json(built.folder / "config.json"))
    assert found is not None
    assert found.points[0].threshold == 1.0


def elastic_student(like: TrainExits) -> Elastic:
    """The student of exits, made elastic."""
    axes = Axes(depth=(0.5,), ffn=(0.5,), heads=())
    return Elastic(checkpoint=like.checkpoint, task=like.task, rationales=like.rationales, loss=LabelOnly(), settings=SHORT, axes=axes)


def test_exits_of_an_elastic_student_are_its_sub_networks_and_each_is_calibrated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, store = train_exits(tmp_path, num_exits=3), Store(tmp_path / "store")
    elastic = elastic_student(plain)
    exits = dataclasses.replace(plain, checkpoint=elastic)
    subnets = ("smallest", "decoder.ffn=16", "largest")
    deltas = {"deltas": (0.3, 0.9), "quality": Quality.SAME, "split": "test", "max_new_tokens": 3}
    calibrate = CalibrateExits(checkpoint=exits, task=exits.task, subnets=subnets, **deltas)  # pyright: ignore[reportArgumentType]
    trained, built = store.build(exits).folder, store.build(calibrate).folder
    before, after = (checkpoint.load(folder)[0] for folder in (store.artifact(elastic).folder, trained))
    space = space_of(before)
    for subnet in (space.largest(), space.smallest()):
        weights = extracted(after, subnet).state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in extracted(before, subnet).state_dict().items())
    whole = checkpoint.load(built)[0]
    settings = read_exits(whole.config)
    assert settings is not None
    names = [write(parse(text, space), space) for text in subnets[:2]]
    assert list(settings.subnet_calibrations) == names
    assert list(read_json(built / CALIBRATION)["subnets"]) == names
    for text in subnets[:2]:
        out = store.build(Extract(checkpoint=calibrate, subnet=text)).folder
        found = Calibration.read(read_json(out / "config.json"))
        assert found == settings.subnet_calibrations[write(parse(text, space), space)]
        assert found is not None
        assert found.points[1].threshold < 1
        student = Answering.load(out, device="cpu")
        early, full = (student.generated(PREDICT, ["some words"] * 2, decoding=Decoding(max_new_tokens=3, exit_threshold=one)) for one in (0.0, 1.0))
        assert {layer for row in early for layer in row.layers} == {1}
        assert {layer for row in full for layer in row.layers} == {2 if text == "smallest" else 4}
        own = student.generated(PREDICT, ["some words"], decoding=Decoding(max_new_tokens=3))  # at the first delta's threshold, which is for these weights
        assert own == student.generated(PREDICT, ["some words"], decoding=Decoding(max_new_tokens=3, exit_threshold=found.points[0].threshold))
    losses = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    watched = [line["validation_loss"] for line in losses if "validation_loss" in line]
    assert watched[-1] < watched[0]
    evaluation = Evaluate(checkpoint=calibrate, task=exits.task)
    report = store.build(ReportStage(title="exits", evaluations=(evaluation,)))
    assert [found["name"] for found in report.data()["exits"]] == ["calibrate_exits", *(f"calibrate_exits, {name}" for name in names)]
    assert all(name in report.page.read_text() for name in names)


def test_a_sub_network_without_exits_stays_at_full_depth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, store = train_exits(tmp_path, layers=(3,)), Store(tmp_path / "store")
    exits = dataclasses.replace(plain, checkpoint=dataclasses.replace(elastic_student(plain), axes=Axes(depth=(0.25,), ffn=(), heads=())))
    calibrate = CalibrateExits(checkpoint=exits, task=exits.task, subnets=("smallest",), deltas=(0.9,), quality=Quality.SAME, split="test", max_new_tokens=3)
    built = store.build(calibrate)
    assert "keeps no layer on both sides of an exit" in caplog.text
    assert "subnets" not in read_json(built.folder / CALIBRATION)
    assert "exits" not in read_json(store.build(Extract(checkpoint=calibrate, subnet="smallest")).folder / "config.json")


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    exits, store = train_exits(tmp_path), Store(tmp_path / "store")
    with pytest.raises(ValueError, match="has no exits"):
        store.build(CalibrateExits(checkpoint=exits.checkpoint, task=exits.task, deltas=(0.5,), split="test"))
    with pytest.raises(ValueError, match="ascending"):
        CalibrateExits(checkpoint=exits, task=exits.task, deltas=(0.05, 0.02))
    elastic = elastic_student(exits)
    with pytest.raises(ValueError, match="is elastic, and its sub-networks were trained for the weights that it has"):
        store.build(dataclasses.replace(exits, checkpoint=elastic, trains=Trains.WHOLE))
    with pytest.raises(ValueError, match=r"is not elastic, and CalibrateExits\.subnets is"):
        store.build(CalibrateExits(checkpoint=exits, task=exits.task, deltas=(0.5,), split="test", subnets=("smallest",)))
    with pytest.raises(ValueError, match="has exits"):
        store.build(dataclasses.replace(elastic, checkpoint=exits))
    shallow = compress(tmp_path, Int8()).checkpoint
    with pytest.raises(ValueError, match="has 1 decoder layer"):
        store.build(dataclasses.replace(exits, checkpoint=shallow))


def test_exits_are_spread_evenly() -> None:
    assert evenly(3, 12) == (3, 6, 9)
    assert evenly(1, 2) == (1,)
    assert evenly(3, 2) == (1,)
    assert evenly(2, 4) == (1, 3)
