"""Two generations of workers never write to one folder."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmdistill.core.lock import BuilderGone, BuilderLock, WorkerLease, token_of

WORKER = """
import sys, time
from pathlib import Path
from llmdistill.core.lock import WorkerLease
lease = WorkerLease(Path(sys.argv[1]), sys.argv[2])
print("works", flush=True)
time.sleep(60)
"""

BUILDER = """
import sys, time
from pathlib import Path
from llmdistill.core.lock import BuilderLock
with BuilderLock(Path(sys.argv[1])) as lock:
    print(lock.admit_workers(), flush=True)
    time.sleep(60)
"""


def _start(script: str, *arguments: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, env=environment)


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().removesuffix("\n")


def test_a_worker_ends_with_its_builder_and_the_next_builder_waits_for_that(tmp_path: Path) -> None:
    path = tmp_path / "key.lock"
    builder = _start(BUILDER, str(path))
    token = _line(builder)
    worker = _start(WORKER, str(path), token)
    assert _line(worker) == "works"
    assert token_of(path) == token
    builder.kill()
    builder.wait()
    with BuilderLock(path) as lock:  # waits for the worker
        assert worker.wait(5) == 70
        lock.admit_workers()
        with pytest.raises(BuilderGone):
            WorkerLease(path, token)  # a late worker of the dead builder
    for process in (builder, worker):
        assert process.stdout is not None
        process.stdout.close()


def test_workers_wait_until_they_are_admitted(tmp_path: Path) -> None:
    path = tmp_path / "key.lock"
    with BuilderLock(path) as lock:
        worker = _start(WORKER, str(path), lock.token)
        time.sleep(1.0)
        assert worker.poll() is None
        lock.admit_workers()
        assert _line(worker) == "works"
        worker.kill()
        worker.wait()
        lock.dismiss_workers()
        lock.remove()
    with pytest.raises(BuilderGone):
        WorkerLease(path, lock.token)
    assert list(tmp_path.iterdir()) == []
    assert worker.stdout is not None
    worker.stdout.close()
