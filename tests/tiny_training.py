"""What the tests of training share: small random students, examples of random tokens, and a journal that remembers."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config

from llmdistill.batches import Example, Pair
from llmdistill.losses.multitask import Multitask
from llmdistill.models.t5 import new_t5
from llmdistill.train import Lessons, Loss, Trained, train
from llmdistill.train_settings import Best, Schedule, Steps, TrainSettings

VOCABULARY_SIZE = 60


def t5(*, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> PreTrainedModel:
    """A T5 v1.1 of a few thousand parameters."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 16, "d_kv": 4, "num_heads": 3, "d_ff": 24, "num_layers": 1, "vocab_size": VOCABULARY_SIZE}
    rest: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": dropout, "decoder_start_token_id": 0}
    model: Any = new_t5(T5Config(**shape, **rest, pad_token_id=0, eos_token_id=1))
    return model.to(dtype)


def causal(*, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A Llama of a few thousand parameters."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "num_hidden_layers": 1}
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCABULARY_SIZE, pad_token_id=0, eos_token_id=1, tie_word_embeddings=True))
    return model.to(dtype)


def examples(num: int, *, shared: bool = False, seed: int = 0) -> list[Example]:
    """Rows of random tokens with a label and, four times in five, a rationale; `shared` gives both the same input, and start tokens of their own."""
    rng = np.random.default_rng(seed)

    def tokens(at_least: int, at_most: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY_SIZE, rng.integers(at_least, at_most + 1)).astype(np.int32)

    rows: list[Example] = []
    for number in range(num):
        label = Pair(part=0, input=tokens(1, 12), target=tokens(1, 3))
        rationale = Pair(part=1, input=label.input if shared else tokens(1, 12), target=tokens(2, 9), start=int(shared))
        rows.append((label,) if number % 5 == 4 else (label, rationale))
    return rows


def loss_by_hand(model: Any, rows: Sequence[Example], weights: Sequence[float]) -> Tensor:
    """The loss of a step through transformers' own forward pass: one pair at a time, so nothing is padded, and divided by hand."""
    sums: list[list[Tensor]] = [[] for _ in weights]
    counts = [0 for _ in weights]
    for pair in (pair for row in rows for pair in row):
        target_T, input_L = (torch.from_numpy(tokens.astype(np.int64)) for tokens in (pair.target, pair.input))
        if model.config.is_encoder_decoder:
            decoder_input = torch.cat([torch.tensor([pair.start]), target_T[:-1]])
            logits = model(input_ids=input_L[None], decoder_input_ids=decoder_input[None]).logits[0]
        else:
            logits = model(input_ids=torch.cat([input_L, target_T])[None]).logits[0, len(input_L) - 1 : -1]
        sums[pair.part].append(F.cross_entropy(logits, target_T, reduction="sum"))
        counts[pair.part] += len(target_T)
    return torch.stack([weight * torch.stack(part).sum() / count for weight, part, count in zip(weights, sums, counts, strict=True)]).sum()


class Journal:
    """Remembers what was logged."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def log_metrics(self, **values: Any) -> None:
        self.lines.append(values)

    @contextmanager
    def progress(self, total: int, unit: str) -> Iterator[Any]:
        yield self

    def advance(self, num: int = 1) -> None:
        pass

    def __getitem__(self, name: str) -> list[Any]:
        """A figure of every line that has it."""
        return [line[name] for line in self.lines if name in line]


SETTINGS = TrainSettings(batch_size=8, duration=Steps(4), learning_rate=0.01, schedule=Schedule.CONSTANT, warmup=Steps(0), best=Best.LAST, log_every_steps=1)


def run(model: PreTrainedModel, rows: Sequence[Example], folder: Path, *, loss: Loss | None = None, **settings: Any) -> tuple[dict[str, Tensor], Journal]:
    """Train for a few steps at a constant learning rate; the weights that were kept, and the journal."""
    result, journal = outcome(model, Lessons(train=rows), folder, loss=loss, **settings)
    return load_file(result.weights), journal


def outcome(model: PreTrainedModel, lessons: Lessons, folder: Path, *, loss: Loss | None = None, seed: int = 0, **settings: Any) -> tuple[Trained, Journal]:
    """The same, with lessons and result as they are."""
    journal = Journal()
    loss = loss or Multitask(rationale_weight=0.3)
    return train(model, lessons, loss, replace(SETTINGS, **settings), folder, seed=seed, journal=journal), journal


IN_PROCESSES = """
import os, sys
from pathlib import Path
os.environ["ACCELERATE_USE_CPU"] = "true"  # as llmdistill.core.launch does: the launcher has set it to false
from llmdistill.train_setup import this_process
from {module} import {name}
assert this_process().num_processes == 2
{name}(Path(sys.argv[1]))
"""


def in_two_processes(function: Callable[[Path], Any], folder: Path) -> None:
    """Call a module's function with the folder in each of two processes that accelerate starts, which import what this one does."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0"]  # accelerate wants an MPI for --cpu
    folder.mkdir()
    script = folder / "run.py"
    script.write_text(IN_PROCESSES.format(module=function.__module__, name=function.__name__))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*launch, str(script), str(folder)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
