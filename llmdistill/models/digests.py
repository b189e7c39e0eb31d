"""sha256 of large files, hashed once a machine.

A model source is known by the content of its weights, and every dry run, key and rerun asks for it; hashing a gigabyte takes seconds. So digests are kept
in a small JSON file beside the completion cache, under path, size and modification time: a file that changes is hashed again. Two processes that write at
once can lose one another's entry, which costs a second hashing and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path


def sha256_of_file(path: Path) -> str:
    """Hex digest of the file, from the cache where path, size and modification time are the same."""
    path = path.resolve()
    stat = path.stat()
    key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
    known = _read(_cache_file())
    if key not in known:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        known = {**_read(_cache_file()), key: digest}
        _write(_cache_file(), known)
    return known[key]


def sha256_of_files(folder: Path, names: list[str]) -> str:
    """One digest over these files of a folder: their names and contents."""
    lines = [f"{sha256_of_file(folder / name)}  {name}\n" for name in sorted(names)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _cache_file() -> Path:
    return Path(os.environ.get("LLMDISTILL_CACHE") or Path.home() / ".cache" / "llmdistill") / "digests.json"


def _read(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write(path: Path, digests: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(descriptor, "w") as file:
        json.dump(digests, file, indent=1)
    os.replace(temporary, path)
