"""Methods in a legal order, recovery between them, a checkpoint that loads as it was written, a record of each layer; and a killed build goes on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import WORDS, rationales, tiny_student

from llmdistill.compress import recover_run
from llmdistill.compress.int4 import Int4
from llmdistill.compress.int8 import Int8
from llmdistill.compress.methods import CompressionMethod
from llmdistill.compress.qsvd import QSVD
from llmdistill.compress.recovery import Recover
from llmdistill.compress.smooth import SmoothQuant
from llmdistill.compress.svd import SVD, Scope
from llmdistill.compress.tensors import Tucker
from llmdistill.core.artifacts import COMPRESSION, read_json
from llmdistill.core.store import Store
from llmdistill.losses.multitask import LabelOnly, Multitask
from llmdistill.models import checkpoint
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.stages.compress import Compress
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.report import ReportStage
from llmdistill.stages.take import Take
from llmdistill.tasks.answers.choice import Choice
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task
from llmdistill.train_settings import Steps, TrainSettings

ANY_RISE = 1e6
SHORT = TrainSettings(duration=Steps(6), batch_size=8, evaluate_every_steps=3, learning_rate=1e-3)
EVERYTHING = (Scope.ATTENTION, Scope.FEED_FORWARD, Scope.EMBEDDINGS)


def compress(folder: Path, *methods: CompressionMethod, **settings: Any) -> Compress:
    """The stage, with a tiny student and task in `folder`."""
    student = folder / "student"
    source = tiny_student(student) if not student.exists() else None
    take = Take(name="student", source=source or tiny_student(folder / "again"))
    lines = [{"input": f"please {word} it", "label": label, "split": split} for label, words in WORDS.items() for word in words for split in ("train", "test")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answer = Choice(choices=tuple(WORDS), lettered=False)
    task = Task(name="words", source=Table(path=folder / "rows.jsonl"), answer=answer, gold_column="label", split_column="split")
    rows = rationales(num_train=24, num_validation=8)
    return Compress(checkpoint=take, methods=methods, task=task, rationales=rows, num_calibration_rows=12, num_held_out_rows=6, **settings)


def logits(folder: Path) -> torch.Tensor:
    model: Any = checkpoint.load(folder)[0]
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[5, 6, 7, 1]]), decoder_input_ids=torch.tensor([[0, 5, 6]])).logits


@pytest.mark.parametrize(
    "methods",
    [
        (Int8(max_loss_rise=ANY_RISE),),
        (SVD(keep=0.5, scope=EVERYTHING), Int8(max_loss_rise=ANY_RISE)),
        (QSVD(keep=0.5), SVD(keep=0.5, scope=(Scope.FEED_FORWARD,)), SmoothQuant(), Int8(max_loss_rise=ANY_RISE)),
        (Tucker(keep=0.5), Int4(max_loss_rise=ANY_RISE)),
    ],
    ids=lambda methods: "+".join(method.kind for method in methods),
)
def test_methods_compose_and_the_record_says_what_they_did(methods: tuple[CompressionMethod, ...], tmp_path: Path) -> None:
    stage = compress(tmp_path, *methods)
    store = Store(tmp_path / "store")
    built = store.build(stage)
    record = read_json(built.folder / COMPRESSION)
    assert [step["technique"] for step in record["steps"]] == [method.kind for method in methods]
    assert record["after"]["weight_bytes"] < record["before"]["weight_bytes"]
    for step in record["steps"]:
        assert {layer["role"] for layer in step["layers"]} - {None}, "layers have a place in the heat map"
    assert built.lineage()[-1]["technique"] == "compress"
    assert built.manifest()["figures"]["weight_bytes_after"] == record["after"]["weight_bytes"]
    assert "## Kept as they were" in built.model_card()
    model, tokenizer = checkpoint.load(built.folder)
    checkpoint.save(model, tokenizer, tmp_path / "copy", lineage=[], card="")
    assert torch.equal(logits(tmp_path / "copy"), logits(built.folder))
    assert not list(built.folder.glob("training*"))


def test_recovery_lowers_the_held_out_loss(tmp_path: Path) -> None:
    methods = (SVD(keep=0.3), Int8(max_loss_rise=ANY_RISE))
    store = Store(tmp_path / "store")
    plain, recovered = (store.build(compress(tmp_path, *methods, recover=recover)) for recover in (None, Recover(settings=SHORT)))
    losses = [read_json(one.folder / COMPRESSION)["after"]["held_out_loss_nats"] for one in (plain, recovered)]
    assert losses[1] < losses[0]
    assert [step["technique"] for step in read_json(recovered.folder / COMPRESSION)["steps"]] == ["svd", "recover", "int8"]


def test_training_with_the_rounding_ends_in_integers(tmp_path: Path) -> None:
    recover = Recover(settings=SHORT, quantization_aware=True)
    built = Store(tmp_path / "store").build(compress(tmp_path, Int8(max_loss_rise=ANY_RISE), recover=recover))
    (step,) = read_json(built.folder / COMPRESSION)["steps"]
    assert step["technique"] == "recover"
    assert step["layers"]
    assert any(type(module) is Int8Linear for module in checkpoint.load(built.folder)[0].modules())


def test_a_build_that_was_killed_after_the_recovery_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = compress(tmp_path, SVD(keep=0.5), Int8(max_loss_rise=ANY_RISE), recover=Recover(settings=SHORT), loss=Multitask())
    unbroken = Store(tmp_path / "unbroken").build(stage)
    with monkeypatch.context() as patch:
        whole = recover_run.recover

        def killed(*args: Any, **more: Any) -> Any:
            whole(*args, **more)
            raise KeyboardInterrupt

        patch.setattr(recover_run, "recover", killed)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path / "store").build(stage)
    resumed = Store(tmp_path / "store").build(stage)
    assert resumed.manifest()["resumed"]
    assert (resumed.folder / "model.safetensors").read_bytes() == (unbroken.folder / "model.safetensors").read_bytes()


def test_an_order_that_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="svd comes after int8, which leaves integers that it cannot change; put svd first"):
        compress(tmp_path, Int8(), SVD())
    with pytest.raises(ValueError, match="methods is empty"):
        compress(tmp_path)
    with pytest.raises(ValueError, match="num_calibration_rows is 0; give 1 or more"):
        dataclasses.replace(compress(tmp_path, Int8()), num_calibration_rows=0)


def test_the_report_shows_each_layer_and_the_trade(tmp_path: Path) -> None:
    stage = compress(tmp_path, SVD(keep=0.5), Int8(max_loss_rise=ANY_RISE), loss=LabelOnly())
    students = (stage.checkpoint, stage)
    evaluations = tuple(Evaluate(name=f"of_{one.name}", checkpoint=one, task=stage.task, latency_repeats=1, num_sample_rows=1) for one in students)
    report = Store(tmp_path / "store").build(ReportStage(evaluations=evaluations))
    (told,) = report.data()["compression"]
    assert told["name"] == "compress"
    page = report.page.read_text(encoding="utf-8")
    assert "layer by layer" in page
    assert "share of the uncompressed student" in page
