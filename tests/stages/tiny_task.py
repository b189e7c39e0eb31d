"""What the tests of stages that train share: messages that one word decides, rationales of them, and a tiny student."""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config

from llmdistill.core.artifacts import RationaleRow, Rationales
from llmdistill.core.run import Run
from llmdistill.core.stage import Stage
from llmdistill.models import checkpoint
from llmdistill.models.student import Pretrained
from llmdistill.models.t5 import new_t5
from llmdistill.models.tokenizer import train_tokenizer

WORDS = {"refund": ("money", "owed"), "cancel": ("stop", "end"), "delivery": ("parcel", "late")}
AROUND = ["i", "the", "my", "please", "it", "was", "for", "and", "to", "order", "very", "so"]


def messages(num: int, seed: int) -> Iterator[dict[str, str]]:
    """Messages that one word decides; the rest is chance."""
    chance = random.Random(seed)
    for _ in range(num):
        label = chance.choice(list(WORDS))
        word = chance.choice(WORDS[label])
        words = chance.choices(AROUND, k=chance.randint(1, 4))
        words.insert(chance.randint(0, len(words)), word)
        yield {"input": " ".join(words), "label": label, "rationale": f"It says {word}."}


@dataclass(frozen=True, kw_only=True)
class Written(Stage[Rationales]):
    """Rationales as they are written here."""

    artifact = Rationales
    rows: tuple[RationaleRow, ...]

    def build(self, run: Run) -> Mapping[str, int]:
        (run.folder / "rationales.jsonl").write_text("".join(json.dumps(vars(row)) + "\n" for row in self.rows))
        (run.folder / "summary.json").write_text(json.dumps({"model": "somebody", "revision": "1"}))
        return {}


def rationales(*, num_train: int = 256, num_validation: int = 30, change: Callable[[int], dict[str, Any]] = lambda number: {}) -> Written:
    """Messages of all splits; `change` gives other values for some columns, by the row's number in its split."""
    rows: list[dict[str, Any]] = [
        {"id": f"{split}-{number}", "split": split, "gold": None, "confidence": 1.0} | message | change(number)
        for split, num, seed in (("train", num_train, 0), ("validation", num_validation, 1), ("test", 5, 2))
        for number, message in enumerate(messages(num, seed))
    ]
    return Written(rows=tuple(RationaleRow(**row) for row in rows))


def tiny_student(folder: Path) -> Pretrained:
    """A T5 of a few thousand parameters, as a folder."""
    tokenizer = train_tokenizer([message["input"] for message in messages(50, 3)], 300, lower_case=False, ends_every_text=True)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1, "vocab_size": len(tokenizer)}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    rest: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.1}
    model = new_t5(T5Config(**shape, **ids, **rest))
    checkpoint.save(model, tokenizer, folder, lineage=[{"technique": "initialise"}], card="")
    return Pretrained(source=str(folder))
