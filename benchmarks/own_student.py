"""A student of ours with the rows that it learned from, for benchmarks of compression: the calibration that the Compress stage would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmdistill.compress.calibration import Calibration
from llmdistill.core.artifacts import Rationales
from llmdistill.losses.multitask import LabelOnly, Multitask, lessons_of
from llmdistill.losses.prompts import EXPLAIN
from llmdistill.models.checkpoint import load


def own_student(checkpoint: Path, rationales: Path, *, calibration_rows: int, held_out_rows: int) -> tuple[Any, Calibration]:
    """The model in float32, and its train and validation rows, from the folders of the stages that made them."""
    model, tokenizer = load(checkpoint, dtype=torch.float32)
    loss = Multitask() if EXPLAIN in model.config.llmdistill["taught"] else LabelOnly()
    rows, examples = list(Rationales(rationales).rows()), {}
    for split, number in (("train", calibration_rows), ("validation", held_out_rows)):
        lessons = lessons_of([row for row in rows if row.split == split][:number])
        examples[split] = loss.examples(lessons, tokenizer, model.config, max_input_tokens=512, max_target_tokens=128)
    return model, Calibration(examples=examples["train"], held_out=examples["validation"], loss=loss)
