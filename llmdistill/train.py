"""The one training loop: a model, examples and a loss in; the best weights out. Everything that trains runs through here, under accelerate.

One step takes the step's examples (batches.py), splits them into micro-batches, and adds up for each

    sum over parts p of   weight_p * sum_p / count_p

where sum_p is the micro-batch's summed loss and count_p counts the *whole step*, over micro-batches and processes. So the gradient is the same however the
step is split. Data-parallel training averages gradients over processes, and each process multiplies by their number.

Model and loss are wrapped together as one module (`Objective`), because DDP, FSDP and DeepSpeed see only what passes through `forward`; inside it a loss
may call the parts of the model as it likes.

A killed run goes on from its last saved state (train_state.py) to bitwise the same weights on a CPU: batches and random numbers are functions of the seed
and the step, never of what was done before. On SIGTERM or SIGINT it finishes its step, saves its state and leaves.

Shapes: P parts of the loss.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmdistill.batches import Batch, Example, Plan, collate, split
from llmdistill.train_settings import Best, TrainSettings
from llmdistill.train_setup import make_accelerator, make_optimizer, make_schedule
from llmdistill.train_state import Position, StopRequest, TrainState, write_weights
from llmdistill.train_window import Window

log = logging.getLogger(__name__)

Score = Callable[[nn.Module], Mapping[str, float]]
"""Further figures of the model on the validation rows (validation_accuracy). Called by the main process, with the model in eval mode."""


class Loss(Protocol):
    """What the loop asks of a loss. One with weights of its own is an nn.Module, and they are trained too."""

    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def weights(self) -> tuple[float, ...]: ...
    def counts_P(self, batch: Batch) -> Int[Tensor, " P"]: ...
    def sums_P(self, model: nn.Module, batch: Batch) -> Float[Tensor, " P"]: ...


class Journal(Protocol):
    """Where the loop reports; a stage's Run is one."""

    def log_metrics(self, **values: Any) -> None: ...
    def progress(self, total: int, unit: str) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What is learned from, and what is watched."""

    train: Sequence[Example]
    validation: Sequence[Example] = ()
    score: Score | None = None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training leaves behind. `weights` holds the trained parameters of the step that was kept, for train_state.read_weights."""

    weights: Path
    figures: Mapping[str, float | int | str]


class Objective(nn.Module):
    """The summed losses of a micro-batch, as one module."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch) -> Float[Tensor, " P"]:
        return self.loss.sums_P(self.model, batch)


def train(model: nn.Module, lessons: Lessons, loss: Loss, settings: TrainSettings, folder: Path, *, seed: int, journal: Journal) -> Trained:
    """Train, or go on training from what `folder` holds. The model itself ends with the last step's weights; the kept ones are in the result."""
    return _Loop(model, lessons, loss, settings, folder, seed, journal).run()


class _Loop:
    def __init__(self, model: nn.Module, lessons: Lessons, loss: Loss, settings: TrainSettings, folder: Path, seed: int, journal: Journal) -> None:
        self.lessons, self.loss, self.settings, self.seed, self.journal, self.score = lessons, loss, settings, seed, journal, lessons.score
        if settings.best is not Best.LAST and not lessons.validation:
            raise ValueError(f"best={settings.best.name} chooses weights by validation rows, and there are none; give some, or set best=LAST")
        self.causal = not model.config.is_encoder_decoder  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        self.plan = Plan(lessons.train, settings, seed=seed)
        self.num_steps = self.plan.num_steps()
        self.trained_names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.accelerator = make_accelerator(settings, folder)
        if lessons.score is not None and self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                "accuracy needs whole weights in one process, and this launch shards them; do not score during training, and set best to LOSS or LABEL_LOSS"
            )
        objective = Objective(model, loss)
        optimizer = make_optimizer(objective, settings, self.accelerator.device)
        self.schedule = make_schedule(optimizer, settings, self.num_steps)
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.position = Position()
        self.state = TrainState(self.accelerator, folder, self.position, self.schedule)
        self.window = Window()

    def run(self) -> Trained:
        position, settings, accelerator = self.position, self.settings, self.accelerator
        torch.use_deterministic_algorithms(settings.deterministic)
        self.state.load()
        if settings.trackers:
            accelerator.init_trackers("llmdistill")
        started_s, saved_s = time.perf_counter() - position.seconds, time.perf_counter()
        with StopRequest() as stop, self.journal.progress(self.num_steps, "steps") as bar:
            bar.advance(position.step)
            while position.step < self.num_steps and not position.stopped_early:
                save_is_due = time.perf_counter() - saved_s > settings.checkpoint_every_s
                stopping, saving = self._step([stop.requested, save_is_due])
                bar.advance()
                self._report()
                position.seconds = time.perf_counter() - started_s
                if stopping or saving:
                    self.state.save()
                    saved_s = time.perf_counter()
                if stopping:
                    stop.leave()
        self.state.save()
        if settings.trackers:
            accelerator.end_training()
        return self._trained()

    def _step(self, flags: list[bool]) -> list[bool]:
        """One step of the optimizer. `flags` are up for all processes as soon as they are up for one: they travel with the counts."""
        accelerator = self.accelerator
        torch.manual_seed(_seed_of(self.seed, self.position.step, accelerator.process_index))
        self.objective.train()
        batches = self._micro_batches([self.lessons.train[number] for number in self.plan.step(self.position.step)])
        counts_P = self._counts(batches)
        if accelerator.num_processes > 1:
            sums: Any = accelerator.reduce(torch.cat([counts_P, counts_P.new_tensor(flags)]), "sum")
            counts_P, flags = sums[: len(counts_P)], [bool(flag) for flag in sums[len(counts_P) :].tolist()]
        weights_P = counts_P.new_tensor(self.loss.weights, dtype=torch.float32) / counts_P.clamp(min=1)
        for number, batch in enumerate(batches, start=1):
            accelerator.sync_gradients = number == len(batches)
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(self.objective):
                sums_P = self.objective(batch) * (not batch.idle)
                accelerator.backward((weights_P * sums_P).sum() * accelerator.num_processes)
            self.window.add(batch, sums_P.detach())
        gradient_norm = accelerator.clip_grad_norm_(self.objective.parameters(), self.settings.max_gradient_norm)
        self.window.end_step(counts_P, gradient_norm, self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.position.step += 1
        return flags

    def _micro_batches(self, examples: Sequence[Example]) -> list[Batch]:
        """This process's share of these examples."""
        accelerator = self.accelerator
        pieces = split(examples, self.settings, accelerator.num_processes)[accelerator.process_index]
        multiple_of = 8 if accelerator.device.type == "cuda" else 1  # what its tensor cores like
        batches = (collate(piece or examples[:1], causal=self.causal, idle=not piece, multiple_of=multiple_of) for piece in pieces)
        return [replace(batch, step=self.position.step).to(accelerator.device) for batch in batches]

    def _counts(self, batches: Sequence[Batch]) -> Tensor:
        return torch.stack([self.loss.counts_P(batch) * (not batch.idle) for batch in batches]).sum(0)

    def _report(self) -> None:
        """Log and evaluate, where this step is one to do so."""
        step, settings = self.position.step, self.settings
        last = step == self.num_steps
        if step % settings.log_every_steps == 0 or last:
            sums_P, counts_P, figures = self.window.totals(self.accelerator)
            self.window = Window()
            self._log(self._means("loss", sums_P, counts_P) | figures)
        if self.lessons.validation and (step % settings.evaluate_every_steps == 0 or last):
            with self.window.paused():
                self._evaluate()

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Losses of the validation rows by part, and the score; keep the weights if they are the best so far."""
        position, best = self.position, self.settings.best
        self.objective.eval()
        batches = self._micro_batches(self.lessons.validation)
        sums_P = torch.stack([self.objective(batch) * (not batch.idle) for batch in batches]).sum(0)
        counts_P = self._counts(batches).to(sums_P.dtype)
        sums: Any = self.accelerator.reduce(torch.stack([sums_P, counts_P]), "sum")
        figures = self._means("validation_loss", *sums) | self._score()
        self._log(figures)
        if best is Best.LAST:
            return
        if best.figure not in figures:
            raise ValueError(f"best={best.name} looks at {best.figure}, and this training has {', '.join(figures)}")
        if position.is_better(figures[best.figure], best):
            position.keep(figures[best.figure])
            write_weights(self.accelerator, self.objective, self.trained_names, self.state.weights_path(position.step))
        else:
            position.num_evaluations_since_best += 1
            position.stopped_early = 0 < self.settings.patience_evaluations <= position.num_evaluations_since_best

    def _score(self) -> dict[str, float]:
        """The main process's score, told to all."""
        if self.score is None:
            return {}
        accelerator = self.accelerator
        figures: list[Any] = [dict(self.score(accelerator.unwrap_model(self.objective).model)) if accelerator.is_main_process else {}]
        return broadcast_object_list(figures)[0] if accelerator.num_processes > 1 else figures[0]

    def _means(self, name: str, sums_P: Tensor, counts_P: Tensor) -> dict[str, float]:
        """The loss, and each part's mean, in nats a token."""
        means = (sums_P / counts_P.clamp(min=1)).tolist()
        total = sum((weight * mean for weight, mean in zip(self.loss.weights, means, strict=True)), start=0.0)
        if not math.isfinite(total):
            raise ValueError(f"{name} is {total} at step {self.position.step}; lower learning_rate or max_gradient_norm, or use more warmup")
        return {name: total} | {f"{name}_{part}": mean for part, mean in zip(self.loss.parts, means, strict=True)}

    def _log(self, figures: Mapping[str, float]) -> None:
        self.journal.log_metrics(step=self.position.step, **figures)
        if self.settings.trackers:
            self.accelerator.log(dict(figures), step=self.position.step)

    def _trained(self) -> Trained:
        position, best = self.position, self.settings.best
        path = self.state.weights_path(position.step if best is Best.LAST else position.best_step)
        if best is Best.LAST:
            write_weights(self.accelerator, self.objective, self.trained_names, path)
        seconds = {"training_seconds": round(position.seconds, 3), "training_cpu_seconds": round(position.cpu_seconds, 3)}
        figures = {"num_steps": position.step, **seconds, "num_processes": self.accelerator.num_processes}
        if best is not Best.LAST:
            figures |= {"kept_step": position.best_step, f"kept_{best.figure}": position.best_value}
        return Trained(weights=path, figures=figures | {"mixed_precision": self.accelerator.mixed_precision})


def _seed_of(seed: int, step: int, process: int) -> int:
    """Random numbers of a step, which no other step or process has."""
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0])
