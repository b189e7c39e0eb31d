"""Students that decide what to compute: each stage's result loads as any checkpoint, says what it saves, composes with compression, and resumes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_compress import compress, logits
from test_elastic import elastic
from test_train_exits import deep_student
from tiny_task import rationales
from transformers import AutoModelForSeq2SeqLM

from llmdistill.compress.int8 import Int8
from llmdistill.compress.svd import SVD
from llmdistill.core.store import Store
from llmdistill.decode.engine import Decoding, Engine
from llmdistill.losses.multitask import LabelOnly
from llmdistill.models import checkpoint
from llmdistill.models.channel_gated_feed_forward import ChannelGatedFeedForward
from llmdistill.models.deciding import deciding
from llmdistill.models.skipping import skipped
from llmdistill.stages.calibrate import CalibrateExits
from llmdistill.stages.compress import Compress
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.exits import TrainExits
from llmdistill.stages.skip import GateChannels, RefineSkips, SkipLayers, Unit, Where
from llmdistill.train_settings import Best, Steps, TrainSettings

SHORT = TrainSettings(duration=Steps(6), batch_size=8, evaluate_every_steps=3, learning_rate=1e-3)
STANDING = dataclasses.replace(SHORT, duration=Steps(1), learning_rate=1e-12, best=Best.LAST)


def common(folder: Path) -> dict[str, Any]:
    like: Any = compress(folder, Int8())
    rows = rationales(num_train=24, num_validation=8)
    return {"checkpoint": like.checkpoint, "task": like.task, "rationales": rows, "settings": SHORT, "loss": LabelOnly()}


def skip(folder: Path, **settings: Any) -> SkipLayers:
    return SkipLayers(**common(folder) | settings)


def skip_feed_forwards(folder: Path, **settings: Any) -> SkipLayers:
    unit: Any = Unit.FEED_FORWARD
    return skip(folder, unit=unit, **settings)


def refine(folder: Path, **settings: Any) -> RefineSkips:
    first = skip(folder)
    return RefineSkips(**common(folder) | {"checkpoint": first, "teacher": first.checkpoint} | settings)


def gate(folder: Path, **settings: Any) -> GateChannels:
    few: dict[str, Any] = {"groups": 4, "kept": 2}
    return GateChannels(**common(folder) | few | settings)


@pytest.mark.parametrize("make, technique", [(skip, "skip"), (skip_feed_forwards, "skip"), (refine, "refine skips"), (gate, "gate channels")])
def test_the_result_loads_decodes_and_says_what_it_saves(make: Any, technique: str, tmp_path: Path) -> None:
    stage, store = make(tmp_path), Store(tmp_path / "store")
    built = store.build(stage)
    assert built.lineage()[-1]["technique"] == technique
    figures = built.manifest()["figures"]
    assert 0 <= figures["share_gated"] <= 1
    assert figures["share_model"] < 1.2
    assert "share_gated" in built.model_card()
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(built.folder)
    assert len(deciding(model)) == 2
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids, decoder_input_ids=torch.tensor([[0, 5, 6]])).logits, logits(built.folder))
    [answer] = Engine(model.eval()).generate([[5, 6, 7, 1]], Decoding(max_new_tokens=4))
    assert len(answer.tokens) <= 4
    evaluation = store.build(Evaluate(checkpoint=stage, task=stage.task, latency_repeats=1, num_sample_rows=0)).summary()
    assert 0 <= evaluation["accuracy"] <= 1
    assert not list(built.folder.glob("training*"))


def test_before_the_first_step_a_student_that_skips_says_what_it_said(tmp_path: Path) -> None:
    stage, store = skip(tmp_path, settings=STANDING), Store(tmp_path / "store")
    built = store.build(stage)
    torch.testing.assert_close(logits(built.folder), logits(store.artifact(stage.checkpoint).folder), rtol=1e-5, atol=1e-6)
    assert built.manifest()["figures"]["share_gated"] == 1


def test_a_penalty_skips(tmp_path: Path) -> None:
    settings = dataclasses.replace(SHORT, duration=Steps(60), learning_rate=1e-2, best=Best.LAST)
    built = Store(tmp_path / "store").build(skip(tmp_path, compute_weight=20.0, settings=settings))
    assert built.manifest()["figures"]["share_gated"] < 0.5


def test_gates_alone_leave_the_rest_as_it_was(tmp_path: Path) -> None:
    stage, store = refine(tmp_path, gates_alone=True), Store(tmp_path / "store")
    built = store.build(stage)
    before, after = (load_file(folder / "model.safetensors") for folder in (store.artifact(stage.checkpoint).folder, built.folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".gate." in name for name in changed)


@pytest.mark.parametrize("where", list(Where))
def test_only_the_stacks_that_are_named_decide(where: Where, tmp_path: Path) -> None:
    built = Store(tmp_path / "store").build(skip(tmp_path, where=where, settings=STANDING))
    assert {path.split(".")[0] for path in deciding(checkpoint.load(built.folder)[0])} == set(where.value)


@pytest.mark.parametrize("make", [skip, skip_feed_forwards, gate])
def test_what_decides_is_compressed_as_any(make: Any, tmp_path: Path) -> None:
    stage, store = make(tmp_path), Store(tmp_path / "store")
    smaller = Compress(
        checkpoint=stage, methods=(SVD(keep=0.7), Int8()), task=stage.task, rationales=stage.rationales, num_calibration_rows=12, num_held_out_rows=6
    )
    built = store.build(smaller)
    model = checkpoint.load(built.folder)[0]
    assert len(deciding(model)) == 2
    [answer] = Engine(model).generate([[5, 6, 7, 1]], Decoding(max_new_tokens=4))
    assert len(answer.tokens) <= 4


@pytest.mark.parametrize("make", [skip, skip_feed_forwards, gate])
def test_exits_integers_and_calibration_may_follow(make: Any, tmp_path: Path) -> None:
    common(tmp_path)  # writes the student whose tokenizer the deep one has
    stage, store = make(tmp_path, checkpoint=deep_student(tmp_path)), Store(tmp_path / "store")
    exits = TrainExits(checkpoint=stage, task=stage.task, rationales=stage.rationales, loss=stage.loss, settings=SHORT, num_exits=2)
    few: Any = {"num_calibration_rows": 12, "num_held_out_rows": 6}
    int8 = Compress(checkpoint=exits, methods=(Int8(),), task=stage.task, rationales=stage.rationales, **few)
    built = store.build(CalibrateExits(checkpoint=int8, task=stage.task, deltas=(0.5,), split="test"))
    assert len(deciding(checkpoint.load(built.folder)[0])) == 5
    assert [entry["technique"] for entry in built.lineage()][1:] == [stage_technique(stage), "exits", "compress", "calibrate exits"]


def stage_technique(stage: Any) -> str:
    return "gate channels" if isinstance(stage, GateChannels) else "skip"


def test_a_build_that_was_killed_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = gate(tmp_path)
    unbroken = Store(tmp_path / "unbroken").build(stage)
    with monkeypatch.context() as patch:

        def killed(*_: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(GateChannels, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path / "store").build(stage)
    resumed = Store(tmp_path / "store").build(stage)
    assert resumed.manifest()["resumed"]
    assert (resumed.folder / "model.safetensors").read_bytes() == (unbroken.folder / "model.safetensors").read_bytes()
    assert any(isinstance(module, ChannelGatedFeedForward) for module in checkpoint.load(resumed.folder)[0].modules())


def test_refined_by_what_is_drawn_gates_are_in_the_same_places(tmp_path: Path) -> None:
    stage, store = refine(tmp_path), Store(tmp_path / "store")
    built = store.build(stage)
    models = [checkpoint.load(folder)[0] for folder in (store.artifact(stage.checkpoint).folder, built.folder)]
    assert skipped(models[0]).keys() == skipped(models[1]).keys()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda folder: skip(folder, compute_weight=-1.0), "compute_weight is -1.0; give 0 or more"),
        (lambda folder: skip(folder, open_at_start=0.4), "open_at_start is 0.4; give more than 0.5"),
        (lambda folder: skip(folder, max_input_tokens=1), "max_input_tokens is 1; give 2 or more"),
        (lambda folder: skip(folder, settings=dataclasses.replace(SHORT, best=Best.ACCURACY)), "takes no notice of what is skipped"),
        (lambda folder: refine(folder, num_samples=1), "num_samples is 1; give 2 or more"),
        (lambda folder: gate(folder, kept=5), "kept is 5 of 4 groups"),
        (lambda folder: Store(folder / "store").build(refine(folder, checkpoint=skip(folder).checkpoint)), "no gates, so there is nothing to skip"),
        (lambda folder: Store(folder / "store").build(skip(folder, checkpoint=elastic(folder))), "elastic, and gates are trained for one student"),
        (lambda folder: Store(folder / "store").build(skip(folder, checkpoint=compress(folder, Int8()))), "has integer weights"),
        (lambda folder: Store(folder / "store").build(skip(folder, checkpoint=skip(folder))), "decides already, at encoder.block.0 first"),
    ],
)
def test_what_cannot_be_is_refused(wrong: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(tmp_path)
