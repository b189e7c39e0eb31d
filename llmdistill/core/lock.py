"""Who may write to an unfinished folder: one builder, and the workers that it admits.

The builder is the process that publishes a key. It holds `<key>.lock` exclusively; flock, so that kill -9 releases it. Its workers, the
processes that run the stage's code, may outlive it when it is killed, and two generations of them must never write to one folder. So each
worker holds `<key>.workers` shared for as long as it lives, and the builder holds it exclusively whenever nobody may work:

    builder   locks .lock, writes its name into it           workers of a dead builder see that their token is gone, and end
              locks .workers                                 which waits for the last of them
              writes a fresh token into .lock
              unlocks .workers                               its workers may begin
    worker    locks .workers shared, then reads .lock        a late worker of the dead builder finds another token and leaves,
                                                             before it has written anything
    builder   locks .workers again, publishes, removes both files
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

log = logging.getLogger(__name__)

POLL_S = 0.1
_SILENT_S = 1.0
_WATCH_S = 0.5


class BuilderLock:
    """The right to build and publish one key; entering waits for whoever has it. Nobody may work until `admit_workers`."""

    def __init__(self, path: Path, launch: str = "") -> None:
        self.path = path
        self._owner = f"{socket.gethostname()} {os.getpid()}"
        self.token = f"{self._owner} {secrets.token_hex(8)} {launch}"

    def __enter__(self) -> BuilderLock:
        self._file = self._acquire()
        self._say(self._owner)
        self._workers_file = _workers(self.path).open("ab")
        self.dismiss_workers()
        self._say(self.token)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._workers_file.close()
        self._file.close()

    def admit_workers(self) -> str:
        """From here on processes that know the returned token may write to the folder."""
        fcntl.flock(self._workers_file, fcntl.LOCK_UN)
        return self.token

    def dismiss_workers(self) -> None:
        """Return when no process writes to the folder, and let none begin."""
        say = f"waiting for the processes that still write to {self.path.stem}"
        _poll(lambda: _try_lock(self._workers_file, fcntl.LOCK_EX), lambda: say)

    def remove(self) -> None:
        """Take the lock's files away; only when the folder is published, so that nobody builds it again."""
        _workers(self.path).unlink()
        self.path.unlink()

    def _acquire(self) -> IO[bytes]:
        while True:
            file = self.path.open("ab")
            _poll(lambda file=file: _try_lock(file, fcntl.LOCK_EX), lambda: f"another run ({_owner(self.path)}) builds {self.path.stem}; waiting for it")
            if _is_at(file, self.path):
                return file
            file.close()  # the builder we waited for has removed this file; another may be there by now

    def _say(self, text: str) -> None:
        self._file.truncate(0)
        self._file.write(text.encode())
        self._file.flush()


class BuilderGone(Exception):
    """The builder that a worker was to work for no longer builds."""


class WorkerLease:
    """A worker's promise to be gone when its builder is; taken before anything is written, kept until the last byte is."""

    def __init__(self, path: Path, token: str) -> None:
        try:
            self._file = _workers(path).open("rb")
        except FileNotFoundError:
            raise BuilderGone(f"nobody builds {path.stem} any more") from None
        fcntl.flock(self._file, fcntl.LOCK_SH)
        if token_of(path) != token:
            self._file.close()
            raise BuilderGone(f"the run that started this process no longer builds {path.stem}")
        self._released = threading.Event()
        threading.Thread(target=self._watch, args=(path, token), name="builder watch", daemon=True).start()

    def release(self) -> None:
        """The worker has written its last byte."""
        self._released.set()
        self._file.close()

    def _watch(self, path: Path, token: str) -> None:
        while not self._released.wait(_WATCH_S):
            if token_of(path) != token and not self._released.is_set():
                os._exit(70)  # as kill -9 would: what is written stays, and the next run goes on from it


def has_workers(path: Path) -> bool:
    """Whether a process still writes to the folder; asked by its builder, once workers are admitted."""
    with _workers(path).open("ab") as file:
        return not _try_lock(file, fcntl.LOCK_EX)


def token_of(path: Path) -> str:
    """What the living builder that holds the lock has written into it; empty where there is none."""
    try:
        with path.open("rb") as file:
            return "" if _try_lock(file, fcntl.LOCK_SH) else file.read().decode()
    except FileNotFoundError:
        return ""


def _owner(path: Path) -> str:
    host, _, process = token_of(path).partition(" ")
    return f"process {process.partition(' ')[0]} on {host}"


def _workers(path: Path) -> Path:
    return path.with_suffix(".workers")


def _poll(is_done: Callable[[], bool], say: Callable[[], str]) -> None:
    """Wait, and say once for what; not with a blocking flock, which would not let a signal handler or a message through."""
    start = time.monotonic()
    is_said = False
    while not is_done():
        if not is_said and time.monotonic() - start > _SILENT_S:
            log.info(say())
            is_said = True
        time.sleep(POLL_S)


def _try_lock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
