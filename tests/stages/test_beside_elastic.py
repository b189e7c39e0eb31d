"""Compress and Distil beside Elastic: an elastic student is refused before any work, its extraction is compressed, recovered and trained like any student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_task import WORDS, rationales, tiny_student

from llmdistill.compress.int8 import Int8
from llmdistill.compress.methods import CompressionMethod
from llmdistill.compress.recovery import Recover
from llmdistill.compress.smooth import SmoothQuant
from llmdistill.compress.svd import SVD, Scope
from llmdistill.core.artifacts import COMPRESSION, Checkpoint, read_json
from llmdistill.core.stage import Stage
from llmdistill.core.store import Store
from llmdistill.decode.engine import Decoding, Engine
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.extract import extract
from llmdistill.elastic.kept import is_elastic, keep
from llmdistill.elastic.measure import shape_of
from llmdistill.models import checkpoint
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.student import Pretrained
from llmdistill.stages.compress import Compress
from llmdistill.stages.distil import Distil
from llmdistill.stages.elastic import Elastic
from llmdistill.stages.take import Take
from llmdistill.tasks.answers.choice import Choice
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task
from llmdistill.train_settings import Steps, TrainSettings


@pytest.fixture
def elastic(tmp_path: Path) -> Path:
    """The folder of an elastic student."""
    model, tokenizer = checkpoint.load(Path(tiny_student(tmp_path / "student").source))
    keep(model, Axes(ffn=(0.5,), heads=(0.5,), depth=(1.0,), width=(0.5,)).space(shape_of(model)))
    checkpoint.save(model, tokenizer, tmp_path / "elastic", lineage=[{"technique": "initialise"}, {"technique": "elastic"}], card="")
    return tmp_path / "elastic"


def task(folder: Path) -> Task:
    lines = [{"input": f"please {word} it", "label": label, "split": "test"} for label, words in WORDS.items() for word in words]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answer = Choice(choices=tuple(WORDS), lettered=False)
    return Task(name="words", source=Table(path=folder / "rows.jsonl"), answer=answer, gold_column="label", split_column="split")


def compress(folder: Path, student: Stage[Checkpoint], *methods: CompressionMethod, recover: Recover | None = None) -> Compress:
    rows = rationales(num_train=24, num_validation=8)
    return Compress(checkpoint=student, methods=methods, task=task(folder), rationales=rows, recover=recover, num_calibration_rows=12, num_held_out_rows=6)


@pytest.mark.parametrize("method", [SVD(), Int8(), SmoothQuant()], ids=lambda method: method.kind)
def test_an_elastic_student_is_refused_before_anything_is_measured(method: CompressionMethod, elastic: Path, tmp_path: Path) -> None:
    stage = compress(tmp_path, Take(name="taken", source=Pretrained(source=str(elastic))), method)
    with pytest.raises(ValueError, match=r"the student of 'taken' is elastic.*extract one .*`llmdistill extract FOLDER OUT --subnet TEXT`"):
        Store(tmp_path / "store").build(stage)


def test_a_pipeline_that_would_compress_an_elastic_student_is_refused_when_it_is_written(tmp_path: Path) -> None:
    student = Take(name="student", source=tiny_student(tmp_path / "student"))
    stage = Elastic(checkpoint=student, task=task(tmp_path), rationales=rationales())
    with pytest.raises(ValueError, match="the student of 'elastic' is elastic"):
        compress(tmp_path, stage, Int8())


def distil(folder: Path, student: Pretrained | Stage[Checkpoint]) -> Distil:
    settings = TrainSettings(duration=Steps(2), batch_size=8, evaluate_every_steps=2)
    return Distil(task=task(folder), rationales=rationales(num_train=24, num_validation=8), student=student, settings=settings)


@pytest.mark.parametrize("is_stage", [True, False])
def test_an_elastic_student_is_not_distilled(is_stage: bool, elastic: Path, tmp_path: Path) -> None:
    source = Pretrained(source=str(elastic))
    stage = distil(tmp_path, Take(name="taken", source=source) if is_stage else source)
    whose = "the student of 'taken'" if is_stage else f"the student pretrained:{elastic}"
    with pytest.raises(ValueError, match=f"{whose} is elastic.*extract one .* and distil that, or distil before the elastic stage"):
        Store(tmp_path / "store").build(stage)


def test_a_pipeline_that_would_distil_an_elastic_student_is_refused_when_it_is_written(tmp_path: Path) -> None:
    student = Take(name="student", source=tiny_student(tmp_path / "student"))
    with pytest.raises(ValueError, match="the student of 'elastic' is elastic"):
        distil(tmp_path, Elastic(checkpoint=student, task=task(tmp_path), rationales=rationales()))


def test_an_extraction_is_distilled(elastic: Path, tmp_path: Path) -> None:
    extract(elastic, "smallest", tmp_path / "small")
    built = Store(tmp_path / "store").build(distil(tmp_path, Pretrained(source=str(tmp_path / "small"))))
    model, _ = checkpoint.load(built.folder)
    assert not is_elastic(model)
    assert model.config.d_model == 8


def test_an_extraction_is_factorised_recovered_quantized_and_decodes(elastic: Path, tmp_path: Path) -> None:
    extract(elastic, "width=8,encoder.ffn=16,decoder.heads=1", tmp_path / "small")
    recover = Recover(settings=TrainSettings(duration=Steps(6), batch_size=8, evaluate_every_steps=3, learning_rate=1e-3))
    methods = (SVD(keep=0.5, scope=tuple(Scope)), Int8(max_loss_rise=1e6))
    built = Store(tmp_path / "store").build(
        compress(tmp_path, Take(name="small", source=Pretrained(source=str(tmp_path / "small"))), *methods, recover=recover)
    )
    assert [step["technique"] for step in read_json(built.folder / COMPRESSION)["steps"]] == ["svd", "recover", "int8"]
    assert [entry["technique"] for entry in built.lineage()][:3] == ["initialise", "elastic", "extract"]
    assert built.lineage()[-1]["technique"] == "compress"
    model, tokenizer = checkpoint.load(built.folder)
    assert not is_elastic(model)
    assert {LowRankLinear, Int8Linear} <= {type(module) for module in model.modules()}
    prompt = tokenizer("please refund my order")["input_ids"]
    (answer,) = Engine(model).generate([prompt], Decoding(max_new_tokens=5))
    checkpoint.save(model, tokenizer, tmp_path / "copy", lineage=[], card="")
    again, _ = checkpoint.load(tmp_path / "copy")
    assert Engine(again).generate([prompt], Decoding(max_new_tokens=5)) == [answer]
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
