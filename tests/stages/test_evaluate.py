"""Evaluation: answers are those of transformers' generate, figures are those that counting by hand gives, files say what was measured."""

import functools
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from llmdistill.core.artifacts import Checkpoint, Evaluation, RationaleRow, Rationales
from llmdistill.core.run import Run
from llmdistill.core.stage import Stage
from llmdistill.core.store import Store
from llmdistill.models import checkpoint
from llmdistill.models.tokenizer import train_tokenizer
from llmdistill.stages import scoring
from llmdistill.stages.evaluate import Evaluate
from llmdistill.stages.evaluate_baseline import EvaluateBaseline
from llmdistill.statistics import wilson_interval
from llmdistill.tasks.answers.choice import Choice
from llmdistill.tasks.answers.free_text import FreeText
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Row, Task

MESSAGES = ["".join(random.Random(number).choices("abcdefghij ", k=5 + number)) for number in range(24)]
MAX_NEW_TOKENS = 6
CHOICES = ("cancel", "refund", "question")


@dataclass(frozen=True, kw_only=True)
class GivenCheckpoint(Stage[Checkpoint]):
    """A folder as it is."""

    artifact = Checkpoint
    source: Path

    def build(self, run: Run) -> Mapping[str, int]:
        shutil.copytree(self.source, run.folder, dirs_exist_ok=True)
        return {}


@dataclass(frozen=True, kw_only=True)
class GivenRationales(Stage[Rationales]):
    """Rationales as they are."""

    artifact = Rationales
    rows: tuple[RationaleRow, ...]

    def build(self, run: Run) -> Mapping[str, int]:
        (run.folder / "rationales.jsonl").write_text("".join(json.dumps(vars(row)) + "\n" for row in self.rows))
        (run.folder / "refused.jsonl").write_text("")
        (run.folder / "summary.json").write_text("{}")
        return {}


def taught(row_id: str, text: str, label: str, *, split: str = "train") -> RationaleRow:
    return RationaleRow(id=row_id, split=split, input=text, label=label, rationale=f"because of {label}", gold=None, confidence=1.0)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random T5 that is asked in the shared-encoder form: the decoder's first token tells the task."""
    folder = tmp_path_factory.mktemp("student")
    tokenizer = train_tokenizer(MESSAGES, 300, lower_case=False, ends_every_text=True)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        num_heads=2,
        d_ff=32,
        num_layers=1,
        decoder_start_token_id=0,  # pyright: ignore[reportCallIssue] - a field of every config
        pad_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    model.generation_config = GenerationConfig(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    section = {"prefixes": {"predict": "label this: ", "explain": ""}, "suffix": " |", "decoder_start_token_ids": {"predict": 0, "explain": 1}}
    model.config.llmdistill = section  # pyright: ignore[reportAttributeAccessIssue]
    checkpoint.save(model.eval(), tokenizer, folder, lineage=[], card="tiny")
    return folder


loaded = functools.cache(checkpoint.load)


def generated(folder: Path, text: str, start_token: int, max_new_tokens: int) -> str:
    """What transformers' generate answers, one prompt at a time."""
    model, tokenizer = loaded(folder)
    how = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, decoder_start_token_id=start_token, pad_token_id=0, eos_token_id=1)
    tokens = model.generate(**tokenizer(text, return_tensors="pt"), generation_config=how)  # pyright: ignore[reportCallIssue]
    return tokenizer.decode(tokens[0], skip_special_tokens=True).strip()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="module")
def evaluated(student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, list[str]]:
    """The student on free-text rows, of which every third has its own answer as the known one, and every third has none."""
    folder = tmp_path_factory.mktemp("evaluated")
    expected = [generated(student, f"label this: {message} |", 0, MAX_NEW_TOKENS) for message in MESSAGES]
    rows = [
        {"id": f"row-{number}", "text": message, "split": "test", "gold": [answer or "empty", "something else", None][number % 3]}
        for number, (message, answer) in enumerate(zip(MESSAGES, expected, strict=True))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task(
        name="free",
        source=Table(path=folder / "rows.jsonl"),
        answer=FreeText(),
        input_template="{text}",
        gold_column="gold",
        id_column="id",
        split_column="split",
    )
    teacher = GivenRationales(rows=tuple(taught(f"row-{number}", MESSAGES[number], expected[number] or "x", split="test") for number in range(5)))
    stage = Evaluate(
        checkpoint=GivenCheckpoint(source=student),
        task=task,
        rationales=teacher,
        max_new_tokens=MAX_NEW_TOKENS,
        max_rationale_tokens=8,
        num_sample_rows=3,
        latency_repeats=3,
    )
    return Store(folder / "store").build(stage), expected


def test_answers_are_those_of_generate(evaluated: tuple[Evaluation, list[str]]) -> None:
    evaluation, expected = evaluated
    lines = evaluation.predictions()
    assert [line["id"] for line in lines] == [f"row-{number}" for number in range(len(MESSAGES))]
    assert [line["answer"] for line in lines] == expected
    assert len(set(expected)) > 3, "the test needs a student that answers differently"


def test_the_students_reasons_start_from_their_own_token(evaluated: tuple[Evaluation, list[str]], student: Path) -> None:
    evaluation, _ = evaluated
    samples = evaluation.summary()["samples"]
    assert len(samples) == 3
    for sample in samples:
        assert sample["rationale"] == generated(student, sample["input"] + " |", 1, 8)
    assert any(sample["rationale"] != sample["answer"] for sample in samples)


def test_the_summary_counts_what_the_predictions_say(evaluated: tuple[Evaluation, list[str]], student: Path) -> None:
    evaluation, expected = evaluated
    summary, lines = evaluation.summary(), evaluation.predictions()
    num_readable = sum(bool(answer) for answer in expected[::3])
    assert summary["num_rows"] == 24
    assert summary["num_rows_with_gold"] == 16
    assert summary["num_correct"] == num_readable == sum(line["correct"] is True for line in lines)
    assert summary["accuracy"] == num_readable / 16
    assert summary["accuracy_ci95"] == list(wilson_interval(num_readable, 16))
    assert summary["num_rows_with_teacher_label"] == 5
    assert summary["agreement_with_teacher"] == sum(bool(answer) for answer in expected[:5]) / 5
    assert 0 < summary["num_cut_short"] <= 24
    assert summary["confusion"] is None, "free text has no classes"
    model, _ = loaded(student)
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert summary["weight_bytes"] == (student / "model.safetensors").stat().st_size
    for figure in (
        "latency_ms_batch_1",
        "latency_p95_ms_batch_1",
        "tokens_per_second_batch_1",
        "latency_ms_batch_32",
        "tokens_per_second_batch_32",
        "peak_memory_bytes",
    ):
        assert summary[figure] > 0, figure
    assert summary["latency_ms_batch_1"] <= summary["latency_p95_ms_batch_1"]
    assert evaluation.manifest()["figures"]["accuracy"] == summary["accuracy"]


def choice_task(folder: Path, rows: list[dict[str, str | None]]) -> Task:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Table(path=folder / "rows.jsonl")
    return Task(
        name="intents", source=source, answer=Choice(choices=CHOICES), input_template="{text}", gold_column="gold", id_column="id", split_column="split"
    )


def words(label: str, number: int) -> str:
    return {"cancel": "stop the order", "refund": "money again", "question": "does this fit"}[label] + f" number {number}"


def test_the_baseline_learns_the_teachers_labels_and_not_the_gold_ones(tmp_path: Path) -> None:
    """The teacher mixes up two classes everywhere; so does the baseline, and its accuracy says so while its agreement is whole."""
    swapped = {"cancel": "refund", "refund": "cancel", "question": "question"}
    rows = [
        {"id": f"{split}-{label}-{number}", "text": words(label, number), "gold": label, "split": split}
        for split in ("train", "test")
        for label in CHOICES
        for number in range(6)
    ]
    task = choice_task(tmp_path, [dict(row) for row in rows])
    teacher = GivenRationales(rows=tuple(taught(row["id"], row["text"], swapped[row["gold"]], split=row["split"]) for row in rows))
    evaluation = Store(tmp_path / "store").build(EvaluateBaseline(task=task, rationales=teacher))
    summary = evaluation.summary()
    assert summary["num_training_rows"] == 18
    assert summary["accuracy"] == 6 / 18
    assert summary["agreement_with_teacher"] == 1.0
    assert summary["confusion"]["counts"] == [[0, 6, 0, 0], [6, 0, 0, 0], [0, 0, 6, 0]]
    assert summary["latency_ms_batch_1"] > 0
    with pytest.raises(ValueError, match="no rows in split 'validation'"):
        Store(tmp_path / "store").build(EvaluateBaseline(task=task, rationales=teacher, split="validation"))


texts = st.sampled_from([*CHOICES, "(refund)", "I cannot say", "", "Refund."])
cells = st.lists(st.tuples(st.sampled_from([*CHOICES, None]), texts, st.sampled_from([*CHOICES, None, "absent"])), min_size=1, max_size=40)


@given(cells)
def test_every_figure_can_be_counted_again_from_the_predictions(rows_of: list[tuple[str | None, str, str | None]]) -> None:
    task = Task(name="intents", source=Table(path=Path("rows.jsonl")), answer=Choice(choices=CHOICES, lettered=False), input_template="{text}")
    rows = [Row(id=str(number), fields={"text": text}, gold=gold, split="test") for number, (gold, text, _) in enumerate(rows_of)]
    teacher = {str(number): scoring.TeacherAnswer(label=label, rationale="") for number, (_, _, label) in enumerate(rows_of) if label != "absent"}
    lines = scoring.predictions(task, rows, [text for _, text, _ in rows_of], teacher)
    summary = scoring.score(task, rows, lines)
    read = {"(refund)": "refund", "Refund.": "refund"} | {choice: choice for choice in CHOICES}
    known = [(read.get(text), gold) for gold, text, _ in rows_of if gold is not None]
    labelled = [(read.get(text), label) for _, text, label in rows_of if label in CHOICES]
    assert summary["accuracy"] == (sum(a == b for a, b in known) / len(known) if known else None)
    assert summary["agreement_with_teacher"] == (sum(a == b for a, b in labelled) / len(labelled) if labelled else None)
    assert summary["num_unreadable"] == sum(text not in read for _, text, _ in rows_of)
    assert (summary["confusion"] is None) == (not known)
    judged = [line["teacher_correct"] for line in lines]
    assert judged == [None if gold is None or label == "absent" else label == gold for gold, _, label in rows_of]
    assert all(line["correct"] is False for line in summary["mistakes"])
    json.dumps(summary, allow_nan=False)


def test_sample_rows_do_not_depend_on_order_or_on_other_rows() -> None:
    rows = [Row(id=str(number), fields={}, gold=None, split="test") for number in range(50)]
    chosen = scoring.sampled(rows, 5)
    assert scoring.sampled(rows[::-1], 5) == chosen
    assert scoring.sampled([row for row in rows if row not in chosen], 5) == scoring.sampled(rows, 10)[5:]


def test_evaluate_refuses_settings_that_measure_nothing(student: Path) -> None:
    given_student = GivenCheckpoint(source=student)
    task = Task(source=Table(path=Path("rows.jsonl")), answer=FreeText())
    with pytest.raises(ValueError, match=r"Evaluate.split is 'tset'"):
        Evaluate(checkpoint=given_student, task=task, split="tset")
    with pytest.raises(ValueError, match=r"latency_repeats is 0"):
        Evaluate(checkpoint=given_student, task=task, latency_repeats=0)
