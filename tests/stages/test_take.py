"""A model from elsewhere becomes a checkpoint of the store with the same logits, and what a checkpoint says of each row becomes rationales."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config

from llmdistill.core.artifacts import read_json
from llmdistill.core.store import Store
from llmdistill.models import checkpoint
from llmdistill.models.student import Pretrained
from llmdistill.models.t5 import new_t5
from llmdistill.models.tokenizer import train_tokenizer
from llmdistill.stages.answering import EXPLAIN, PREDICT, Answering
from llmdistill.stages.own_answers import OwnAnswers
from llmdistill.stages.take import Take
from llmdistill.tasks.answers.choice import Choice
from llmdistill.tasks.answers.free_text import FreeText
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task

MESSAGES = ["where is my parcel", "stop the order", "i want my money back", "does it come in red"]


def t5_folder(folder: Path, *, taught: tuple[str, ...] = (PREDICT, EXPLAIN), is_ours: bool = True) -> Path:
    """A tiny random T5, as a checkpoint of ours or as transformers saves one."""
    tokenizer = train_tokenizer(MESSAGES, 300, lower_case=False, ends_every_text=True)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1, "vocab_size": len(tokenizer)}
    rest: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    model = new_t5(T5Config(**shape, **rest)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # so that its answers differ
    if is_ours:
        model.config.llmdistill = {"prefixes": {PREDICT: "predict: ", EXPLAIN: "explain: "}, "suffix": "", "taught": list(taught)}  # pyright: ignore[reportAttributeAccessIssue]
        checkpoint.save(model, tokenizer, folder, lineage=[{"technique": "somewhere"}], card="made somewhere")
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def rows_of(folder: Path, answer: Any) -> Task:
    (folder / "rows.jsonl").write_text("".join(f'{{"input": "{message}", "split": "train"}}\n' for message in MESSAGES))
    return Task(name="rows", source=Table(path=folder / "rows.jsonl"), answer=answer, split_column="split")


def logits(model: Any) -> torch.Tensor:
    tokens = torch.tensor([[5, 6, 7, 1]])
    extra = {"decoder_input_ids": torch.tensor([[0, 5]])} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model(input_ids=tokens, **extra).logits


def test_a_checkpoint_of_ours_keeps_its_history_and_how_it_is_asked(tmp_path: Path) -> None:
    folder = t5_folder(tmp_path / "ours")
    taken = Store(tmp_path / "store").build(Take(source=Pretrained(source=str(folder))))
    assert taken.lineage() == [{"technique": "somewhere"}]
    assert taken.model_card() == "made somewhere"
    assert read_json(taken.folder / "config.json")["llmdistill"] == read_json(folder / "config.json")["llmdistill"]
    assert torch.equal(logits(checkpoint.load(taken.folder)[0]), logits(checkpoint.load(folder)[0]))


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_stock_folder_becomes_a_checkpoint_with_the_same_logits(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "stock"
    if kind == "t5":
        t5_folder(folder, is_ours=False)
    else:
        tokenizer = train_tokenizer(MESSAGES, 300, lower_case=False, ends_every_text=False)
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    source = Pretrained(source=str(folder))
    taken = Store(tmp_path / "store").build(Take(source=source))
    assert taken.lineage()[0]["technique"] == "take"
    model, _ = source.prepare((), 0)
    assert torch.equal(logits(checkpoint.load(taken.folder)[0]), logits(model.eval()))


def test_own_answers_are_what_the_student_says(tmp_path: Path) -> None:
    folder = t5_folder(tmp_path / "ours")
    stage = OwnAnswers(checkpoint=Take(source=Pretrained(source=str(folder))), task=rows_of(tmp_path, FreeText()), max_new_tokens=5, max_rationale_tokens=4)
    rationales = Store(tmp_path / "store").build(stage)
    student = Answering.load(folder, device="cpu")
    answers, reasons = (student.answers(task, MESSAGES, max_new_tokens=number) for task, number in ((PREDICT, 5), (EXPLAIN, 4)))
    rows = {row.input: row for row in rationales.rows()}
    for message, answer, reason in zip(MESSAGES, answers, reasons, strict=True):
        label = FreeText().parse(answer)
        if label is not None:
            assert rows[message].label == label
            assert rows[message].rationale == " ".join(reason.split())
    assert len(rows) + len(rationales.refused()) == len(MESSAGES)


def test_a_student_that_was_not_taught_to_explain_gives_no_reasons(tmp_path: Path) -> None:
    take = Take(source=Pretrained(source=str(t5_folder(tmp_path / "ours", taught=(PREDICT,)))))
    rows = Store(tmp_path / "store").build(OwnAnswers(checkpoint=take, task=rows_of(tmp_path, FreeText()), max_new_tokens=5)).rows()
    assert rows
    assert all(row.rationale == "" for row in rows)


def test_answers_that_nobody_can_read_are_told(tmp_path: Path) -> None:
    take = Take(source=Pretrained(source=str(t5_folder(tmp_path / "ours"))))
    with pytest.raises(ValueError, match="all 4 rows were refused"):
        Store(tmp_path / "store").build(OwnAnswers(checkpoint=take, task=rows_of(tmp_path, Choice(choices=("cancel", "refund"), lettered=False))))
