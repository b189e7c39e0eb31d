"""Distil: a student learns what can be learned, in every form; the checkpoint is ordinary; a killed or stopped training ends in the same one."""

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_task import WORDS, Written, messages, rationales, tiny_student
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from llmdistill import train_state
from llmdistill.core.artifacts import read_json, read_json_lines
from llmdistill.core.stage import upstream
from llmdistill.core.store import Store
from llmdistill.losses.multitask import Form, LabelOnly, Multitask, RationaleOnly
from llmdistill.models import checkpoint
from llmdistill.models.student import Pretrained, ScratchCausal, ScratchT5, Student, T5Form
from llmdistill.stages.answering import EXPLAIN, PREDICT, Answering
from llmdistill.stages.distil import Distil, Labels
from llmdistill.tasks.answers.choice import Choice
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task
from llmdistill.train_settings import Best, Epochs, Steps, Tracker, TrainSettings
from llmdistill.tuning import LoRA


def distil(folder: Path, *, given: Written | None = None, **settings: Any) -> Distil:
    """The stage, with a task whose file is in `folder`."""
    (folder / "rows.jsonl").write_text('{"input": "stop"}\n')
    task = Task(name="words", source=Table(path=folder / "rows.jsonl"), answer=Choice(choices=tuple(WORDS), lettered=False))
    return Distil(task=task, rationales=given or rationales(), **settings)


SHORT = TrainSettings(batch_size=8, duration=Steps(12), learning_rate=3e-3, log_every_steps=1, evaluate_every_steps=5)


@pytest.mark.parametrize(
    "student, loss",
    [
        (ScratchT5(vocabulary_size=400), Multitask(rationale_weight=0.5)),
        (ScratchT5(vocabulary_size=400), Multitask(rationale_weight=0.5, form=Form.SHARED_ENCODER)),
        (ScratchT5(vocabulary_size=400, form=T5Form.V1_0, tied_head=True), LabelOnly()),
        (ScratchCausal(vocabulary_size=400), Multitask()),
    ],
    ids=["two-pass", "shared encoder", "v1.0 label-only", "causal"],
)
def test_a_student_from_scratch_learns_what_one_word_decides(student: Student, loss: Multitask | LabelOnly, tmp_path: Path) -> None:
    settings = TrainSettings(batch_size=16, duration=Epochs(5), learning_rate=2e-3, evaluate_every_steps=80, log_every_steps=1, best=Best.ACCURACY)
    trained = Store(tmp_path / "store").build(distil(tmp_path, student=student, loss=loss, settings=settings))
    figures, lines = trained.manifest()["figures"], list(read_json_lines(trained.folder / "metrics.jsonl"))
    answering = Answering.load(trained.folder, device="cpu")
    first = lines[0]
    for part in loss.parts:
        assert first[f"loss_{part}"] == pytest.approx(math.log(answering.model.config.vocab_size), abs=0.35)

    held_out = list(messages(150, seed=4))
    texts = [message["input"] for message in held_out]
    labels = answering.answers(PREDICT, texts, max_new_tokens=8)
    accuracy = sum(label == message["label"] for label, message in zip(labels, held_out, strict=True)) / len(held_out)
    assert accuracy >= 0.95
    assert figures["kept_validation_accuracy"] >= 0.95
    assert (figures["num_train_examples"], figures["num_validation_examples"], figures["num_steps"]) == (256, 30, 80)
    if isinstance(student, ScratchCausal):
        reasons = answering.answers(EXPLAIN, texts, max_new_tokens=16)
        assert sum(reason == message["rationale"] for reason, message in zip(reasons, held_out, strict=True)) >= 0.9 * len(held_out)
    assert answering.can(EXPLAIN) == ("rationale" in loss.parts)


def test_the_ablations_share_the_rationales_and_nothing_below(tmp_path: Path) -> None:
    student = tiny_student(tmp_path / "student")
    stages = [distil(tmp_path, student=student, loss=loss, settings=SHORT) for loss in (Multitask(), LabelOnly(), RationaleOnly())]
    assert len({upstream(stage)[0].key for stage in stages}) == 1
    assert len({stage.key for stage in stages}) == 3
    store = Store(tmp_path / "store")
    checkpoints = [store.build(stage) for stage in stages]
    assert len(list((tmp_path / "store").glob("written-*"))) == 1
    assert [read_json(one.folder / "config.json")["llmdistill"]["taught"] for one in checkpoints] == [["predict", "explain"], ["predict"], ["explain"]]
    for one, parts in zip(checkpoints, ({"label", "rationale"}, {"label"}, {"rationale"}), strict=True):
        names = {name for line in read_json_lines(one.folder / "metrics.jsonl") for name in line}
        assert {name.removeprefix("loss_") for name in names if name.startswith("loss_")} == parts
        assert ("validation_accuracy" in names) == ("label" in parts)
        assert {name for name in names if "seconds" in name or name.endswith("_time")} == set()
        assert "time_s" in names
        assert {file.name for file in one.folder.iterdir()} == {
            "README.md", "config.json", "generation_config.json", "lineage.json", "manifest.json", "metrics.jsonl", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json",
        }  # fmt: skip


def test_the_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    student = tiny_student(tmp_path / "student")
    settings = replace(SHORT, trackers=(Tracker.TENSORBOARD,))
    stage = distil(tmp_path, student=student, settings=settings)
    trained = Store(tmp_path / "store").build(stage)
    initial, learned = trained.lineage()
    assert (initial["technique"], learned["technique"]) == ("initialise", "distil")
    assert learned["teacher"]["model"] == "somebody"
    assert learned["settings"]["rationales"] == stage.rationales.key
    assert learned["measured"]["num_train_examples"] == 256
    assert "`predict: {input}`" in trained.model_card()
    assert list((trained.folder / "trackers").rglob("events.out.tfevents.*"))
    assert not (trained.folder / "training").exists()
    _, tokenizer = checkpoint.load(trained.folder)
    longest = read_json(trained.folder / "config.json")["llmdistill"]["max_new_tokens"]
    for task, column in (("predict", "label"), ("explain", "rationale")):
        assert longest[task] == 1 + max(len(tokenizer(message[column], add_special_tokens=False)["input_ids"]) for message in messages(256, 0))
    generation = read_json(trained.folder / "generation_config.json")
    assert generation["max_new_tokens"] == longest["explain"]


def test_lora_trains_its_factors_alone_and_merges_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_student(tmp_path / "student")
    stage = distil(tmp_path, student=student, tuning=LoRA(rank=2, modules=("q", "v")), settings=replace(SHORT, learning_rate=0.05))
    ids_BL, seen = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(0)), {}

    def read_and_ask(model: nn.Module, path: Path) -> None:
        read(model, path)
        with torch.no_grad():
            seen["logits"] = model.eval()(input_ids=ids_BL, decoder_input_ids=ids_BL).logits
        seen["trainable"] = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    read = train_state.read_weights
    monkeypatch.setattr(train_state, "read_weights", read_and_ask)
    trained = Store(tmp_path / "store").build(stage)
    figures = trained.manifest()["figures"]
    assert len(seen["trainable"]) == 2 * 2 * 3  # two factors of two linears in three attentions
    assert all("lora_" in name for name in seen["trainable"])
    assert figures["trained_parameters"] == 2 * 3 * 2 * (16 + 16)

    model: Any = AutoModelForSeq2SeqLM.from_pretrained(trained.folder).eval()
    assert figures["parameters"] == model.num_parameters()
    assert not any("lora" in name for name, _ in model.named_modules())
    with torch.no_grad():
        logits = model(input_ids=ids_BL, decoder_input_ids=ids_BL).logits
    torch.testing.assert_close(logits, seen["logits"], rtol=1e-5, atol=1e-5)
    before, after = load_file(tmp_path / "student" / "model.safetensors"), load_file(trained.folder / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("Attention.q.weight", "Attention.v.weight"))}
    for name in changed:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), atol=1e-4) <= 2
    losses = [line["loss_label"] for line in read_json_lines(trained.folder / "metrics.jsonl") if "loss_label" in line]
    assert losses[-1] < losses[0]


def test_gold_labels_and_confidence_choose_the_rows(tmp_path: Path) -> None:
    """The teacher says the same of every row and is unsure of every other; every fourth row has no known label."""

    def change(number: int) -> dict[str, Any]:
        return {"gold": list(WORDS)[number % 3] if number % 4 else None, "label": "cancel", "confidence": 0.4 if number % 2 else 0.9}

    student = tiny_student(tmp_path / "student")
    given = rationales(num_train=24, num_validation=8, change=change)
    store = Store(tmp_path / "store")
    figures = store.build(distil(tmp_path, given=given, student=student, settings=SHORT, min_confidence=0.5)).manifest()["figures"]
    assert (figures["num_train_examples"], figures["num_validation_examples"], figures["num_rows_below_min_confidence"]) == (12, 4, 16)
    gold = distil(tmp_path, given=given, student=student, settings=SHORT, labels=Labels.GOLD)
    figures = store.build(gold).manifest()["figures"]
    assert (figures["num_train_examples"], figures["num_validation_examples"], figures["num_rows_without_gold"]) == (18, 6, 8)
    taught, _ = gold._lessons(store.artifact(given).rows())
    assert {lesson.label for lesson in taught["train"]} == set(WORDS)
    with pytest.raises(ValueError, match=r"split 'train' is left .* 37 rows: 32 are below min_confidence 0.95"):
        store.build(distil(tmp_path, given=given, student=student, settings=SHORT, min_confidence=0.95))


def test_a_student_learns_on_from_a_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first = distil(tmp_path, name="first", student=tiny_student(tmp_path / "student"), settings=replace(SHORT, learning_rate=0.03), loss=LabelOnly())
    second = distil(tmp_path, name="second", student=first, settings=replace(SHORT, duration=Steps(1)))
    trained = store.build(second)
    assert [entry["technique"] for entry in trained.lineage()] == ["initialise", "distil", "distil"]
    assert {stage.key for stage in upstream(second)} == {first.key, second.rationales.key}
    last = [line["loss_label"] for line in read_json_lines(store.artifact(first).folder / "metrics.jsonl") if "loss_label" in line][-1]
    start = next(read_json_lines(trained.folder / "metrics.jsonl"))["loss_label"]
    assert start == pytest.approx(last, abs=0.7)
    assert start < 4.0 < math.log(300) - 1


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    given = rationales(num_train=4, num_validation=0)
    for settings, message in (
        ({"min_confidence": 1.5}, "min_confidence is 1.5; give 0 to 1"),
        ({"max_input_tokens": 1}, "max_input_tokens is 1"),
        ({"loss": RationaleOnly(), "settings": replace(SHORT, best=Best.ACCURACY)}, "best is ACCURACY, and the loss rationale-only learns no labels"),
        ({"loss": RationaleOnly(), "settings": replace(SHORT, best=Best.LABEL_LOSS)}, "best is LABEL_LOSS"),
    ):
        with pytest.raises(ValueError, match=message):
            distil(tmp_path, given=given, **settings)
    for lora in (lambda: LoRA(rank=0), lambda: LoRA(alpha=0), lambda: LoRA(dropout=1)):
        with pytest.raises(ValueError, match="LoRA has rank"):
            lora()
    store = Store(tmp_path / "store")
    student = tiny_student(tmp_path / "student")
    with pytest.raises(ValueError, match="no row of split 'validation' is left to learn from"):
        store.build(distil(tmp_path, given=given, student=student, settings=SHORT))
    store.build(distil(tmp_path, given=given, student=student, settings=replace(SHORT, best=Best.LAST, duration=Steps(1))))
    causal = ScratchCausal(vocabulary_size=300)
    with pytest.raises(ValueError, match="the shared-encoder form needs an encoder"):
        store.build(distil(tmp_path, given=given, student=causal, loss=Multitask(form=Form.SHARED_ENCODER), settings=replace(SHORT, best=Best.LAST)))


# Killed and stopped trainings. A process that has imported everything forks each of them, since importing torch takes longer than the training.

FORKER = """
import os, sys, traceback
from pathlib import Path
from test_distil import killed_stage
from llmdistill.core.store import Store

folder = Path(sys.argv[1])
stage = killed_stage(folder)
stage.key, stage.rationales.key
Store(folder / "store").build(stage.rationales)
import accelerate, peft, llmdistill.train, transformers.models.t5.modeling_t5
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            Store(folder / "store").build(stage)
        except SystemExit as exit:
            os._exit(exit.code)
        except BaseException:
            (folder / "failed").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def killed_stage(folder: Path) -> Distil:
    settings = TrainSettings(
        batch_size=6, micro_batch_size=4, duration=Steps(40), learning_rate=0.01, log_every_steps=1, evaluate_every_steps=3, checkpoint_every_s=0.03
    )
    return distil(folder, student=Pretrained(source=str(folder / "student")), settings=settings, given=rationales(num_train=40, num_validation=5))


class Trainings:
    """Starts trainings of the one stage in `folder`, one at a time."""

    def __init__(self, folder: Path, forker: "subprocess.Popen[str]") -> None:
        assert forker.stdin is not None
        assert forker.stdout is not None
        self.folder, self.input, self.output = folder, forker.stdin, forker.stdout
        self.stage = killed_stage(folder)
        self.store = Store(folder / "store")
        self.metrics = self.store.partial(self.stage) / "metrics.jsonl"
        assert self.output.readline() == "ready\n"

    def start(self) -> int:
        self.input.write("\n")
        return int(self.output.readline())

    def end(self) -> int:
        """The exit code of the training that was started; of a killed one, minus the signal."""
        code = int(self.output.readline())
        assert not (self.folder / "failed").exists(), (self.folder / "failed").read_text()
        return code

    def wait_for_lines(self, num: int) -> None:
        """Until the log has so many lines more, or there is no training."""
        target = self._num_lines() + num
        while self._num_lines() < target and not self.store.is_complete(self.stage):
            time.sleep(0.002)

    def _num_lines(self) -> int:
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0


@contextmanager
def trainings(folder: Path) -> Iterator[Trainings]:
    tiny_student(folder / "student")
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[2]}"}
    command = [sys.executable, "-c", FORKER, str(folder)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as forker:
        yield Trainings(folder, forker)
        assert forker.stdin is not None
        forker.stdin.close()


def contents(folder: Path) -> dict[str, bytes]:
    """The files that training decides, in bytes."""
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")}


def test_a_killed_training_ends_in_the_same_bytes(tmp_path: Path) -> None:
    unbroken = Store(tmp_path / "unbroken")
    chance = random.Random(0)
    with trainings(tmp_path) as started:
        num_killed = 0
        while not started.store.is_complete(started.stage):
            pid = started.start()
            if num_killed < 12:
                started.wait_for_lines(chance.randrange(9))
                time.sleep(chance.uniform(0, 0.05))
                with contextlib.suppress(ProcessLookupError):  # it may have come to its end
                    os.kill(pid, signal.SIGKILL)
            num_killed += started.end() == -signal.SIGKILL
        stopped = started.start()  # nothing is left to do
        assert started.end() == 0
        assert stopped
    assert num_killed >= 8
    whole = unbroken.build(started.stage)
    resumed = started.store.artifact(started.stage)
    assert contents(whole.folder) == contents(resumed.folder)
    assert resumed.manifest()["resumed"]
    assert {path.name for path in resumed.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}
    figures, again = (one.manifest()["figures"] for one in (whole, resumed))
    assert figures["kept_step"] < 40 or figures["num_steps"] == 40
    for name in figures.keys() - {"training_seconds", "training_cpu_seconds"}:
        assert again[name] == figures[name], name
    last = {line["step"]: line["loss"] for line in read_json_lines(resumed.folder / "metrics.jsonl") if "loss" in line}
    assert last == {line["step"]: line["loss"] for line in read_json_lines(whole.folder / "metrics.jsonl") if "loss" in line}


def test_a_stopped_training_saves_its_state_and_goes_on_after_it(tmp_path: Path) -> None:
    with trainings(tmp_path) as started:
        pid = started.start()
        started.wait_for_lines(8)
        os.kill(pid, signal.SIGTERM)
        assert started.end() == 128 + signal.SIGTERM
        lines = list(read_json_lines(started.metrics))
        last_step = lines[-1]["step"]
        assert [path.name for path in started.metrics.parent.glob("training/state*")] == [f"state-{last_step:08d}"]
        started.start()
        assert started.end() == 0
    steps = [line["step"] for line in read_json_lines(started.store.folder(started.stage) / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 41))
