"""The processes that stages build in.

`llmdistill run` is the parent. It gives each stage a process of its own, so that every stage starts with fresh memory and a fresh random
state: plain python, or `accelerate launch` for those that train. The process runs the same command with `--build-key`, finds the stage of
that key, builds it and ends; the parent publishes.

Under `accelerate launch -m llmdistill run ...` the processes are there already. Those stages that train build in them, all ranks together;
rank 0 is the parent of all others, and the other ranks wait for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmdistill.core.artifacts import Artifact
from llmdistill.core.lock import POLL_S, BuilderGone, WorkerLease, token_of
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
            _use_cpu_where_there_is_nothing_else()
            if rank() == 0:
                self.store.publish(stage, lambda token: self.store.work(stage), beside)
            else:
                self._join(stage)
        elif rank() == 0:
            self.store.publish(stage, lambda token: self._start(stage, token), beside)
        else:
            self._wait(stage)

    def _start(self, stage: Stage[Artifact], token: str) -> None:
        command = [*_launcher(stage, self.accelerate_args), "-m", "llmdistill", *self.command, "--build-key", stage.key]
        process = subprocess.Popen(command, env=environment_without_launcher() | {_TOKEN: token})
        try:
            code = process.wait()
        finally:
            _end(process)
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
    _use_cpu_where_there_is_nothing_else()
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


def _use_cpu_where_there_is_nothing_else() -> None:
    """Without this, several processes on a machine without accelerators each believe to be the only one, and all train the same."""
    if num_processes() > 1:
        import torch

        if not torch.accelerator.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"


def _end(process: subprocess.Popen[bytes]) -> None:
    """The parent is leaving: so must its child. On Ctrl-C the child has had the signal too."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
