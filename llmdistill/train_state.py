"""What a training run must remember to go on after it was killed, and how it is written so that no moment is a bad one.

    state-00000400/            accelerate's state (model, optimizer, random numbers), the schedule and the position, whole since it was renamed into place
    weights-00000300.safetensors   the best weights so far, named by the state that refers to them

A state is written to `state.writing`, renamed, and only then are older ones and weights that it does not refer to deleted. Weights of a later step than the
state's stay behind when a run is killed; the resumed run comes to that step again and writes the same. Batches need no state: they are functions of the
seed and the step.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from llmdistill.train_settings import Best

log = logging.getLogger(__name__)


class Position:
    """How far a training has come, and its best evaluation."""

    def __init__(self) -> None:
        self.step = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0  # of all processes
        self.best_step = 0  # 0 is none yet
        self.best_value = 0.0
        self.num_evaluations_since_best = 0
        self.stopped_early = False

    def is_better(self, value: float, best: Best) -> bool:
        """Whether this value beats the best so far; the earlier of two equal ones stays."""
        return not self.best_step or (value > self.best_value if best.more_is_better else value < self.best_value)

    def keep(self, value: float) -> None:
        """The current step is the best."""
        self.best_step, self.best_value, self.num_evaluations_since_best = self.step, value, 0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class TrainState:
    """The states of one training in its folder."""

    def __init__(self, accelerator: Accelerator, folder: Path, position: Position, scheduler: Any) -> None:
        self._accelerator, self._folder, self._position = accelerator, folder, position
        accelerator.register_for_checkpointing(position, scheduler)
        folder.mkdir(parents=True, exist_ok=True)
        self._cpu_counted_s = time.process_time()

    def weights_path(self, step: int) -> Path:
        """Where the weights after so many steps are kept."""
        return self._folder / f"weights-{step:08d}.safetensors"

    def load(self) -> None:
        """Go on from the last whole state, if there is one."""
        states = sorted(self._folder.glob("state-*"))
        if states:
            self._accelerator.load_state(str(states[-1]))
            log.info("going on from step %d", self._position.step)

    def save(self) -> None:
        """Write the state; all processes call this together."""
        accelerator, position = self._accelerator, self._position
        self._count_cpu_seconds()
        writing, final = self._folder / "state.writing", self._folder / f"state-{position.step:08d}"
        if final.exists():
            return
        if accelerator.is_main_process:
            shutil.rmtree(writing, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(writing), safe_serialization=False)  # keeps tied tensors tied
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            os.rename(writing, final)
            for old in self._folder.glob("state-*"):
                if old != final:
                    shutil.rmtree(old)
            for old in self._folder.glob("weights-*"):
                if old != self.weights_path(position.best_step):
                    old.unlink()
        accelerator.wait_for_everyone()

    def _count_cpu_seconds(self) -> None:
        """Add what all processes have taken since the last state. On a machine that is shared, a clock says little."""
        now_s = time.process_time()
        seconds = torch.tensor(now_s - self._cpu_counted_s, device=self._accelerator.device)
        self._position.cpu_seconds += float(self._accelerator.reduce(seconds, "sum"))  # pyright: ignore[reportArgumentType]
        self._cpu_counted_s = now_s


def write_weights(accelerator: Accelerator, objective: nn.Module, names: Sequence[str], path: Path) -> None:
    """Write the trained parameters of the model in an objective; all processes call this together."""
    state: Any = accelerator.get_state_dict(objective)
    if accelerator.is_main_process:
        temporary = path.with_suffix(".writing")
        save_file({name: state[f"model.{name}"].detach().contiguous() for name in names}, temporary)
        os.replace(temporary, path)
    accelerator.wait_for_everyone()


@torch.no_grad()
def read_weights(model: nn.Module, path: Path) -> None:
    """Put written weights into a model of the same shape; every parameter in the file must be there."""
    parameters = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            parameters[name].copy_(file.get_tensor(name))


class StopRequest:
    """SIGTERM and SIGINT, noted instead of obeyed, until the step is done and the state is saved."""

    def __init__(self) -> None:
        self._signal = 0
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self._signal != 0

    def leave(self) -> NoReturn:
        """Do what the signal asked for. A process that had none leaves because another had one."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self._signal or signal.SIGTERM))

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal == number:  # asked twice: leave at once
            self.__exit__()
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self._signal = number
