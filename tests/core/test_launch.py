"""A stage's process under a launcher that hands no signal on, as accelerate's does not: it is told to end, may save, and is waited for."""

import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import Words

from llmdistill.core import launch
from llmdistill.core.launch import Processes, StageFailed
from llmdistill.core.run import Stopped
from llmdistill.core.stage import Launcher
from llmdistill.core.store import Store

WORKER = """
import os, signal, sys, time
from pathlib import Path
from llmdistill.core.lock import WorkerLease

folder = Path(sys.argv[1])

def save(number, frame):
    time.sleep(1)
    (folder / "saved").touch()
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, save)
lease = WorkerLease(folder.with_suffix(".lock"), os.environ["LLMDISTILL_BUILDER"])
(folder / "works").touch()
time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.Popen(sys.argv[2:]).wait()"


class Trained(Words):
    """A stage that is launched."""

    launcher = Launcher.ACCELERATE


def _wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    while not path.exists():
        assert process.poll() is None


@pytest.mark.parametrize("is_launched", [False, True], ids=["plain python", "a launcher"])
def test_what_a_run_started_ends_with_it_and_may_save_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_launched: bool) -> None:
    store, stage = Store(tmp_path), Trained()
    worker = [sys.executable, "-c", WORKER, str(store.partial(stage))]
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(command: list[str], **options: object) -> "subprocess.Popen[bytes]":
        started.append(popen([sys.executable, "-c", LAUNCHER, "-", *worker] if is_launched else worker, **options))  # pyright: ignore
        _wait_for(store.partial(stage) / "works", started[0])
        monkeypatch.setattr(started[0], "wait", _interrupted_once(started[0].wait))
        return started[0]

    monkeypatch.setattr(launch, "_launcher", lambda stage, flags: ["python", "launcher"] if is_launched else ["python"])
    monkeypatch.setattr(launch.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        Processes(store, []).build(stage, {})
    assert (store.partial(stage) / "saved").exists()
    assert started[0].poll() is not None


def _interrupted_once(wait: Callable[..., int]) -> Callable[..., int]:
    """The first wait is interrupted, as by Ctrl-C."""
    calls = iter([KeyboardInterrupt()])

    def interrupted(*arguments: float) -> int:
        for error in calls:
            raise error
        return wait(*arguments)

    return interrupted


@pytest.mark.parametrize("code, error", [(launch.STOPPED_CODE, Stopped), (1, StageFailed), (-signal.SIGKILL, StageFailed)])
def test_how_a_stage_ended_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]) -> None:
    popen = subprocess.Popen
    end = f"import os, sys; os.kill(os.getpid(), {-code}) if {code} < 0 else sys.exit({code})"
    monkeypatch.setattr(launch.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", end], **options))
    with pytest.raises(error, match=r"words (stopped early|did not finish \(exit code)"):
        Processes(Store(tmp_path), []).build(Words(), {})


def test_one_process_where_several_were_asked_for_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    launch._prepare_to_train.__wrapped__()
    assert not caplog.text
    monkeypatch.setenv("MASTER_PORT", "29500")  # accelerate sets it for more than one
    launch._prepare_to_train.__wrapped__()
    assert "has started one" in caplog.text
