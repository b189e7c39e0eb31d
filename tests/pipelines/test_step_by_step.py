"""pipelines/step_by_step.py, with tiny local models in place of the hub's: whole, from a teacher that is asked to a report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM, T5Config

from llmdistill.models.t5 import new_t5
from llmdistill.models.tokenizer import train_tokenizer
from llmdistill.teach.rationale_files import export_rationales

COLOURS = ("red", "blue", "green")
ODD = "grey"
TEMPLATE = "Text: the clear sky\nReason: It is blue. The answer is (blue).\n\nText: {{ text }}\nReason:"
ROWS = [
    {"id": f"r{number}", "text": f"a {colour} {thing}", "colour": colour if colour in COLOURS else None, "split": split}
    for number, (colour, thing, split) in enumerate(
        (colour, thing, split)
        for thing, split in [("box", "train"), ("hat", "train"), ("cup", "train"), ("car", "validation"), ("pen", "test"), ("bag", "test")]
        for colour in (*COLOURS, ODD)
    )
]


def prompt_of(row: dict[str, Any]) -> str:
    return TEMPLATE.replace("{{ text }}", row["text"])


def completion_of(row: dict[str, Any]) -> str:
    """What the tiny teacher is taught to say; of an odd row something that has no answer in it."""
    return f" It is {row['colour']}. The answer is ({row['colour']}).\n" if row["colour"] else " I cannot say that.\n"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [prompt_of(row) + completion_of(row) for row in ROWS]


@pytest.fixture(scope="module")
def teachers(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two causal models: `random` as it was initialised, and `taught`, which knows its answers by heart."""
    folder = tmp_path_factory.mktemp("teachers")
    tokenizer = train_tokenizer(texts, 400, lower_case=False, ends_every_text=False)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None))
    model.save_pretrained(folder / "random")
    rows = [(tokenizer(prompt_of(row)).input_ids, tokenizer(completion_of(row)).input_ids) for row in ROWS]
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids_BL = torch.tensor([(prompt + completion) + [0] * (longest - len(prompt + completion)) for prompt, completion in rows])
    labels_BL = ids_BL.clone()
    for label_L, (prompt, completion) in zip(labels_BL, rows, strict=True):
        label_L[: len(prompt)] = -100
        label_L[len(prompt + completion) :] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = model(input_ids=ids_BL, labels=labels_BL).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    assert loss.item() < 0.01, "the teacher did not learn its answers"
    model.save_pretrained(folder / "taught")
    for name in ("random", "taught"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def student(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 v1.1, as flan's are, in an ordinary folder."""
    folder = tmp_path_factory.mktemp("student")
    tokenizer = train_tokenizer(texts, 400, lower_case=False, ends_every_text=True)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2, "tie_word_embeddings": False}
    ids: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    new_t5(T5Config(**shape, **ids, feed_forward_proj="gated-gelu")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def words(tmp_path: Path, student: Path) -> list[str]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "prompt.jinja").write_text(TEMPLATE)
    task = f"choices:{tmp_path}/rows.jsonl?input={{text}}&choices={','.join(COLOURS)}&gold=colour&id=id&split=split"
    return [
        *("--task", task, "--prompt", str(tmp_path / "prompt.jinja"), "--student", f"pretrained:{student}"),
        *("--max-completion-tokens", "24", "--duration", "steps:3", "--evaluate-every-steps", "2", "--batch-size", "4"),
    ]


def test_it_runs_whole(start: Callable[..., Any], words: list[str], teachers: Path, tmp_path: Path) -> None:
    pipeline = start("step_by_step", *words, "--teacher", f"transformers:{teachers / 'taught'}")
    assert pipeline.names() == ["annotate", "label_only", "evaluate_label_only", "multitask", "evaluate_multitask", "evaluate_baseline", "report"]
    report = pipeline.report().data()
    assert [student["name"] for student in report["students"]] == ["label_only", "multitask"]
    assert [baseline["name"] for baseline in report["baselines"]] == ["bag of words"]
    teacher = report["teacher"]
    assert (teacher["model"], teacher["num_completions"], teacher["num_asked"]) == ("taught", len(ROWS), len(ROWS))
    assert teacher["accuracy"] == 1.0

    rationales = pipeline.store.artifact(pipeline.stage("annotate"))
    odd = {row["id"] for row in ROWS if row["colour"] is None}
    assert {row["id"] for row in rationales.refused()} == odd
    assert report["refused"]["by_reason"] == Counter(row["reason"] for row in rationales.refused()) == {"no answer marker": len(odd)}
    assert {row.rationale for row in rationales.rows()} == {f"It is {colour}." for colour in COLOURS}

    folder = pipeline.store.folder(pipeline.stage("multitask"))
    assert AutoModelForSeq2SeqLM.from_pretrained(folder).config.model_type == "t5"
    assert [entry["technique"] for entry in json.loads((folder / "lineage.json").read_text())] == ["initialise", "distil"]

    path = export_rationales(rationales.rows(), tmp_path / "mine.parquet")
    resumed = start("step_by_step", *words, "--teacher", f"file:{path}?model=taught")
    assert resumed.store.build(resumed.stage("import_rationales")).rows() == rationales.rows()
    assert resumed.stage("multitask").key != pipeline.stage("multitask").key


def test_a_teacher_that_never_answers_is_told_with_its_words(start: Callable[..., Any], words: list[str], teachers: Path) -> None:
    pipeline = start("step_by_step", *words, "--teacher", f"transformers:{teachers / 'random'}")
    with pytest.raises(ValueError, match=rf"all {len(ROWS)} rows were refused \(.*so there is nothing to teach\. The first completion reads '.*answer marker"):
        pipeline.report()


def test_options_reach_the_stages(start: Callable[..., Any], words: list[str], teachers: Path) -> None:
    pipeline = start(
        *("step_by_step", *words, "--teacher", f"transformers:{teachers / 'taught'}", "--num-samples", "3", "--temperature", "0.7", "--max-rows", "9"),
        *("--max-cost", "1.5", "--max-tokens", "1000", "--check-gold", "--labels", "GOLD", "--tuning", "lora:4", "--losses", "rationale-only"),
    )
    annotate, student = pipeline.stage("annotate"), pipeline.stage("rationale_only")
    assert (annotate.num_samples, annotate.sampling.temperature, annotate.max_rows) == (3, 0.7, 9)
    assert (annotate.max_cost_dollars, annotate.max_tokens, annotate.verification.check_gold) == (1.5, 1000, True)
    assert (student.labels.name, student.tuning.rank, student.loss.kind) == ("GOLD", 4, "rationale-only")
