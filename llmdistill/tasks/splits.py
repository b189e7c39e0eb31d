"""Which rows train, which validate, which test.

The split of a row follows from its id alone, so that it is the same on every machine, for every order of the file and after rows are added: a row that once
was in the test split never moves into training.
"""

from __future__ import annotations

import hashlib

SPLITS = ("train", "validation", "test")


def split_of(row_id: str, *, test_share: float, validation_share: float) -> str:
    """The split that the sha256 of an id falls into."""
    position = int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big") / 2**64
    if position < test_share:
        return "test"
    return "validation" if position < test_share + validation_share else "train"
