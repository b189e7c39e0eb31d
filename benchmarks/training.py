"""Our training loop against a plain one, side by side: `python benchmarks/training.py`.

The plain one is a re-statement, in our own words, of how Distilling step-by-step (Hsieh et al. 2023) is published to train: transformers'
Seq2SeqTrainer, whose loss runs the model once on the inputs with "predict:" and once on those with "explain:", each batch in random order and padded to
its longest row.

Same T5 (a student from scratch, the same initial weights), same rows (the built-in task's, as its recorded teacher explains them), same number of steps,
batch size, fused AdamW without decay, linear schedule, warm-up, clipping and dropout, no checkpoints and no evaluation on either side. All train in one
process, in turn, so that whatever else the machine does meets all; a ratio is that of the seconds of one round, and the median of the rounds is printed.
On a busy machine the ratio of the CPU seconds says more; on one that is idle they say the same. What was learned is measured afterwards with transformers'
own forward pass on rows that none of them saw: at the same loss the ratio means something, at another it does not.

"shared encoder" is our other form of the same two tasks, which the plain loop does not have; the model then reads each text once. Its prompts differ, so
its loss is its own. In the two-pass form six parts in ten of our time are the matrix products that the plain loop needs as well, so it cannot be twice as
fast; reading each text once is what gets there.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments

from llmdistill.batches import Example
from llmdistill.core.artifacts import RationaleRow
from llmdistill.core.store import Store
from llmdistill.losses.multitask import Form, Multitask, lessons_of
from llmdistill.models.student import ScratchT5, T5Size
from llmdistill.stages.annotate import Annotate
from llmdistill.tasks.tickets import RECORDING, tickets
from llmdistill.teach.prompt import Prompt
from llmdistill.teach.recorded import Recorded
from llmdistill.teach.teacher import Sampling
from llmdistill.train import Lessons, train
from llmdistill.train_settings import AdamW, Best, Share, Steps, TrainSettings
from llmdistill.train_state import read_weights

GOAL = 2.0
RATIONALE_WEIGHT = 0.5
LIMITS = {"max_input_tokens": 512, "max_target_tokens": 128}
PLAIN = "plain loop"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=[size.value for size in T5Size], default=["tiny", "mini"])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(level=logging.WARNING)
    device = "CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, {device}")
    rows = _rows()
    settings = TrainSettings(
        batch_size=arguments.batch_size,
        duration=Steps(arguments.steps),
        learning_rate=arguments.learning_rate,
        warmup=Share(0.06),
        optimizer=AdamW(weight_decay=0.0),
        best=Best.LAST,
    )
    compared = [_compare(T5Size(size), rows, settings, arguments.rounds) for size in arguments.sizes]
    for form in compared[0]:
        lowest = min(ratios[form] for ratios in compared)
        print(f"goal {GOAL}, {form}: {'met' if lowest >= GOAL else 'missed'} (lowest median ratio {lowest:.2f})")


def _rows() -> dict[str, list[RationaleRow]]:
    """What the recorded teacher said of the task's rows, by split."""
    prompt = Prompt(path=Path(__file__).parents[1] / "prompts" / "tickets.jinja", stop=("\n", ")."))
    stage = Annotate(task=tickets(), teacher=Recorded(folder=RECORDING), prompt=prompt, sampling=Sampling(max_tokens=64), max_rows=1250)
    with tempfile.TemporaryDirectory() as folder:
        rows = Store(Path(folder)).build(stage).rows()
    return {split: [row for row in rows if row.split == split] for split in ("train", "validation")}


@dataclass(frozen=True)
class Side:
    """One way to train: what it needs to train a model in place, and the examples that its loss is measured on."""

    train: Callable[[PreTrainedModel, int], None]
    validation: Sequence[Example]


def _compare(size: T5Size, rows: dict[str, list[RationaleRow]], settings: TrainSettings, num_rounds: int) -> dict[str, float]:
    """Prints a line for each side; the plain loop's seconds over those of each of our forms."""
    lessons = {split: lessons_of(some) for split, some in rows.items()}
    texts = [text for lesson in lessons["train"] for text in ("predict: " + lesson.input, lesson.label, "explain: " + lesson.input, lesson.rationale)]
    model, tokenizer = ScratchT5(size=size).prepare(texts, seed=0)
    sides = {}
    for form in Form:
        loss = Multitask(form=form, rationale_weight=RATIONALE_WEIGHT)
        examples = {split: loss.examples(some, tokenizer, model.config, **LIMITS) for split, some in lessons.items()}
        sides[f"ours, {form.name.lower().replace('_', ' ')}"] = Side(_ours(loss, examples["train"], settings), examples["validation"])
        if form is Form.TWO_PASS:
            sides[PLAIN] = Side(_plain(examples["train"], settings), examples["validation"])
    num_examples, names = settings.batch_size * settings.num_steps(0), list(sides)
    of_model = f"{model.num_parameters() / 1e6:.1f} million parameters, vocabulary {len(tokenizer)}"
    print(f"\n{size.value}: {of_model}, {num_examples} examples in steps of {settings.batch_size}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(num_rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            trained = copy.deepcopy(model)
            began, began_cpu = time.perf_counter(), time.process_time()
            sides[name].train(trained, number)
            seconds[name].append(time.perf_counter() - began)
            cpu_seconds[name].append(time.process_time() - began_cpu)
            losses[name].append(_losses(trained, sides[name].validation))
    ratios = {name: statistics.median(_ratios(seconds, name)) for name in names}
    for name in sorted(names, key=lambda name: ratios[name]):
        label, rationale = (statistics.mean(part) for part in zip(*losses[name], strict=True))
        print(
            f"  {name:20} {num_examples / statistics.median(seconds[name]):7.1f} examples/s, ratio {ratios[name]:.2f} "
            f"(rounds {' '.join(f'{ratio:.2f}' for ratio in _ratios(seconds, name))}; of CPU seconds {statistics.median(_ratios(cpu_seconds, name)):.2f}), "
            f"loss afterwards: label {label:.3f} rationale {rationale:.3f} together {label + RATIONALE_WEIGHT * rationale:.3f} nats/token",
            flush=True,
        )
    return {name: ratio for name, ratio in ratios.items() if name != PLAIN}


def _ratios(seconds: dict[str, list[float]], name: str) -> list[float]:
    """The plain loop's over this side's, round by round."""
    return [plain / own for plain, own in zip(seconds[PLAIN], seconds[name], strict=True)]


@torch.no_grad()
def _losses(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[float, float]:
    """Label and rationale loss of unseen rows, in nats a token, by transformers' own forward pass."""
    student: Any = model.eval()
    sums, counts = [0.0, 0.0], [0, 0]
    for pair in (pair for example in examples for pair in example):
        target = torch.from_numpy(pair.target).long().to(model.device)[None]
        decoder_input = torch.cat([target.new_tensor([[pair.start]]), target[:, :-1]], 1)
        logits = student(input_ids=torch.from_numpy(pair.input).long().to(model.device)[None], decoder_input_ids=decoder_input).logits
        sums[pair.part] += nn.functional.cross_entropy(logits[0], target[0], reduction="sum").item()
        counts[pair.part] += target.numel()
    return sums[0] / counts[0], sums[1] / counts[1]


# Ours


class _Silent:
    """Keeps no journal."""

    def log_metrics(self, **values: Any) -> None:
        pass

    @contextmanager
    def progress(self, total: int, unit: str) -> Iterator[Any]:
        yield self

    def advance(self, num: int = 1) -> None:
        pass


def _ours(loss: Multitask, examples: Sequence[Example], settings: TrainSettings) -> Callable[[PreTrainedModel, int], None]:
    def run(model: PreTrainedModel, seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trained = train(model, Lessons(train=examples), loss, settings, Path(folder) / "training", seed=seed, journal=_Silent())
            read_weights(model, trained.weights)

    return run


# The plain loop


class TwoPassTrainer(Seq2SeqTrainer):
    """The loss of the label's pass and that of the rationale's."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        predicted, explained = model(**inputs["predict"]), model(**inputs["explain"])
        loss = predicted.loss + RATIONALE_WEIGHT * explained.loss
        return (loss, {"predict": predicted, "explain": explained}) if return_outputs else loss


def _pad(pairs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Inputs, mask and labels of one task, padded to the longest of them."""

    def rows(tokens: Sequence[Any], value: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([torch.from_numpy(row).long() for row in tokens], batch_first=True, padding_value=value)

    inputs = [pair.input for pair in pairs]
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in inputs], batch_first=True)
    return {"input_ids": rows(inputs, 0), "attention_mask": mask, "labels": rows([pair.target for pair in pairs], -100)}


def _plain(examples: Sequence[Example], settings: TrainSettings) -> Callable[[PreTrainedModel, int], None]:
    def run(model: PreTrainedModel, seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            num_steps = settings.num_steps(0)
            arguments = Seq2SeqTrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=settings.batch_size,
                max_steps=num_steps,
                learning_rate=settings.learning_rate,
                lr_scheduler_type=settings.schedule.value,
                warmup_steps=settings.num_warmup_steps(num_steps),
                weight_decay=0.0,
                max_grad_norm=settings.max_gradient_norm,
                optim="adamw_torch_fused",
                logging_steps=settings.log_every_steps,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                seed=seed,
            )
            collator = lambda batch: {"predict": _pad([pairs[0] for pairs in batch]), "explain": _pad([pairs[1] for pairs in batch])}  # noqa: E731
            trainer = TwoPassTrainer(model=model, args=arguments, train_dataset=list(examples), data_collator=collator)  # pyright: ignore[reportArgumentType]
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    return run


if __name__ == "__main__":
    main()
