"""The processes that stages build in.

`llmdistill run` is the parent. It gives each stage a process of its own, so that every stage starts with fresh memory and a fresh random
state: plain python, or `accelerate launch` for those that train. The process runs the same command with `--build-key`, finds the stage of
that key, builds it and ends; the parent publishes.

Under `accelerate launch -m llmdistill run ...` the processes are there already. Those stages that train build in them, all ranks together;
rank 0 is the parent of all others, and the other ranks wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmdistill.core.artifacts import Artifact
from llmdistill.core.lock import POLL_S, BuilderGone, WorkerLease, has_workers, token_of
from llmdistill.core.processes import environment_without_launcher, is_launched, launch_id, num_processes, rank
from llmdistill.core.run import Stopped
from llmdistill.core.stage import Launcher, Stage
from llmdistill.core.store import Store

log = logging.getLogger(__name__)

_TOKEN = "LLMDISTILL_BUILDER"  # the name of an environment variable
_END_S = 20

STOPPED_CODE = 75
"""With which a stage's process ends when the stage stopped on purpose; sysexits.h calls it "temporary failure; try again"."""


class StageFailed(Exception):
    """A stage's process ended with an error, which it has already shown."""


@dataclass(frozen=True)
class Processes:
    """Builds stages in processes that repeat a command."""

    store: Store
    command: Sequence[str]
    accelerate_args: str = ""

    def build(self, stage: Stage[Artifact], beside: Mapping[str, str]) -> None:
        """Build one stage whose upstream is complete; returns when it is published, with the texts beside it."""
        if is_launched() and stage.launcher is Launcher.ACCELERATE:
            _prepare_to_train()
            if rank() == 0:
                self.store.publish(stage, lambda token: self.store.work(stage), beside)
            else:
                self._join(stage)
        elif rank() == 0:
            self.store.publish(stage, lambda token: self._start(stage, token), beside)
        else:
            self._wait(stage)

    def _start(self, stage: Stage[Artifact], token: str) -> None:
        launcher = _launcher(stage, self.accelerate_args)
        command = [*launcher, "-m", "llmdistill", *self.command, "--build-key", stage.key]
        # A launcher has a process group of its own, since accelerate's hands no signal on. Plain python stays in ours, so that a debugger has the terminal.
        group = 0 if len(launcher) > 1 else None
        process = subprocess.Popen(command, env=environment_without_launcher() | {_TOKEN: token}, process_group=group)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                _end(process, self.store.lock_path(stage))
        if code == STOPPED_CODE:
            raise Stopped(f"{stage.name} stopped early, as asked; all it has done is kept, and the same command goes on from there")
        if code != 0:
            raise StageFailed(
                f"{stage.name} did not finish (exit code {code}). All it has done is kept in {self.store.partial(stage)}; "
                "run the same command to go on from there"
            )

    def _join(self, stage: Stage[Artifact]) -> None:
        """Work on a stage as soon as rank 0 builds it, unless another run is first."""
        path = self.store.lock_path(stage)
        while not self.store.is_complete(stage):
            token = token_of(path)
            if token.endswith(f" {launch_id()}"):
                with contextlib.suppress(BuilderGone):  # rank 0 found it built, or published what a killed run had finished
                    lease = WorkerLease(path, token)
                    self.store.work(stage)
                    lease.release()
                    self._wait(stage)
            time.sleep(POLL_S)

    def _wait(self, stage: Stage[Artifact]) -> None:
        while not self.store.is_complete(stage):
            time.sleep(POLL_S)


def work(stage: Stage[Artifact], store: Store) -> None:
    """Build in this process, which a parent has started for it."""
    if _TOKEN not in os.environ:
        raise ValueError(f"--build-key is for the processes that `llmdistill run` starts; to build {stage.name} use --until {stage.name}")
    if is_launched():
        _prepare_to_train()
    lease = WorkerLease(store.lock_path(stage), os.environ.pop(_TOKEN))
    store.work(stage)
    lease.release()


def _launcher(stage: Stage[Artifact], accelerate_args: str) -> list[str]:
    """`accelerate launch` where it has something to do: flags or a config file to pass on, or more than one device to use.

    Without any of these it would only add seconds, and give every process a single thread.
    """
    has_work = accelerate_args or _accelerate_config().is_file() or len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1 or Path("/dev/kfd").exists()
    if stage.launcher is Launcher.PYTHON or not has_work:
        return [sys.executable]
    return [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *shlex.split(accelerate_args)]


def _accelerate_config() -> Path:
    """Where `accelerate config` writes; as in accelerate.commands.config.config_args, which takes seconds to import."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(os.environ.get("HF_HOME", cache / "huggingface")).expanduser() / "accelerate" / "default_config.yaml"


@functools.cache
def _prepare_to_train() -> None:
    """Correct what accelerate leaves open on a machine without accelerators.

    Several processes each believe to be the only one there, and all train the same, until they are told to use the CPU. And `accelerate launch --cpu` starts
    several processes only through mpirun; otherwise it starts one, and says nothing.
    """
    if num_processes() > 1:
        import torch

        if not torch.accelerator.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
    elif os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ:
        log.warning(
            "accelerate was asked for several processes on the CPU and has started one, which does all the work; "
            "to have several, pass --multi_gpu in place of --cpu (it needs no GPU), or launch with torchrun"
        )


def _end(process: subprocess.Popen[bytes], lock_path: Path) -> None:
    """The parent is leaving: so must what it started, with time to save. On Ctrl-C plain python has had the signal too; a second one ends the waiting."""
    has_group = os.getpgid(process.pid) == process.pid
    tell = functools.partial(os.killpg if has_group else os.kill, process.pid)

    def is_left() -> bool:
        return process.poll() is None or has_workers(lock_path)

    deadline = time.monotonic() + _END_S
    try:
        tell(signal.SIGTERM)
        while is_left() and time.monotonic() < deadline:
            time.sleep(POLL_S)
    finally:
        if is_left():
            with contextlib.suppress(ProcessLookupError):
                tell(signal.SIGKILL)
        process.wait()
