"""A file or folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Where to write it; it gets its name at the end. What an earlier try has left there is removed first."""
    writing = out.with_name(out.name + ".partial")
    if writing.is_dir():
        shutil.rmtree(writing)
    writing.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    yield writing
    writing.rename(out)
