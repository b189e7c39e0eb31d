"""The completion cache: every raw answer of a teacher, written as it arrives and never asked for twice.

One SQLite file (write-ahead log, ``synchronous=FULL``) shared by all pipelines on the machine. A row is a question (model, revision, rendered prompt,
sampling parameters, sample index) and its completion. `record` returns after the row is on disk, so what was reported as done survives ``kill -9``
and a power cut; several processes may write at once. Failures are never stored. Parsing is a later step over the raw text.
"""

import dataclasses
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from llmdistill.teach.teacher import Completion, Sampling

SCHEMA = """
CREATE TABLE IF NOT EXISTS completions (
    fingerprint TEXT PRIMARY KEY,
    model TEXT NOT NULL,
    revision TEXT NOT NULL,
    prompt TEXT NOT NULL,
    sampling TEXT NOT NULL,
    sample_index INTEGER NOT NULL,
    text TEXT NOT NULL,
    tokens_in INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL,
    seconds REAL NOT NULL,
    finish_reason TEXT NOT NULL
) WITHOUT ROWID
"""
MAX_VARIABLES = 500  # SQLite's oldest limit on bound variables in one statement is 999
BUSY_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question to a teacher: all that its answer depends on."""

    model: str
    revision: str
    prompt: str
    sampling: Sampling
    sample_index: int = 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the question, as 64 hexadecimal digits; the same in every process and on every machine."""
        parts = [self.model, self.revision, self.prompt, dataclasses.asdict(self.sampling), self.sample_index]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def default_folder() -> Path:
    """The cache folder: ``$LLMDISTILL_CACHE``, else ``~/.cache/llmdistill``."""
    return Path(os.environ.get("LLMDISTILL_CACHE") or Path.home() / ".cache" / "llmdistill")


class CompletionCache:
    """A store of completions in ``folder/completions.sqlite3``; use it as a context manager, from one thread."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "completions.sqlite3"
        self._connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute(SCHEMA)

    def find(self, questions: Iterable[Question]) -> Mapping[str, Completion]:
        """Give the completions that are held, by the fingerprint of their question; those not held are absent."""
        wanted = [question.fingerprint for question in questions]
        found: dict[str, Completion] = {}
        for start in range(0, len(wanted), MAX_VARIABLES):
            part = wanted[start : start + MAX_VARIABLES]
            rows = self._connection.execute(
                f"SELECT fingerprint, text, tokens_in, tokens_out, seconds, finish_reason FROM completions WHERE fingerprint IN ({','.join('?' * len(part))})",
                part,
            )
            for fingerprint, text, tokens_in, tokens_out, seconds, finish_reason in rows:
                found[fingerprint] = Completion(text=text, tokens_in=tokens_in, tokens_out=tokens_out, seconds=seconds, finish_reason=finish_reason)
        return found

    def record(self, question: Question, completion: Completion) -> None:
        """Write one completion; on return it is on disk. The first answer to a question stays: a second one is dropped."""
        self._connection.execute(
            "INSERT INTO completions VALUES (?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (fingerprint) DO NOTHING",
            (
                question.fingerprint,
                question.model,
                question.revision,
                question.prompt,
                json.dumps(dataclasses.asdict(question.sampling), sort_keys=True),
                question.sample_index,
                completion.text,
                completion.tokens_in,
                completion.tokens_out,
                completion.seconds,
                completion.finish_reason,
            ),
        )

    def close(self) -> None:
        """Close the file; what was recorded is safe whether or not this is called."""
        self._connection.close()

    def __enter__(self) -> "CompletionCache":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
