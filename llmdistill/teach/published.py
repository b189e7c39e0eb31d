"""The completions published with Distilling step-by-step (Hsieh et al. 2023): `{split}_CoT_{i}.json`, JSON lists of raw completions, aligned by position with
the rows of a split's file, 500 or 1,000 a file.

Nothing in them names the row, so one that is missing would move all that follow by one, in silence: numbers are checked first, then the texts
(alignment.py), and an error says where it begins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmdistill.teach.alignment import Alignment, align
from llmdistill.teach.parse import cut_run_on

FILE_SIZES = (500, 1_000)


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """One file and the completions in it."""

    path: Path
    completions: tuple[str, ...]


def read_published(folder: Path, split: str) -> list[PublishedFile]:
    """The files of a split, in order; empty where there are none. A gap, a file that is not a list of texts or one of an odd size is an error."""
    pattern = re.compile(rf"{re.escape(split)}_CoT_(\d+)\.json")
    numbered = sorted((int(match[1]), path) for path in folder.iterdir() if (match := pattern.fullmatch(path.name)))
    files = []
    for position, (number, path) in enumerate(numbered):
        if number != position:
            raise ValueError(f"{folder} has {path.name} but no {split}_CoT_{position}.json: completions are aligned by position, so none may be missing")
        files.append(PublishedFile(path=path, completions=_read(path)))
    for file in files[:-1]:
        if len(file.completions) != len(files[0].completions) or len(file.completions) not in FILE_SIZES:
            raise ValueError(
                f"{file.path} holds {len(file.completions)} completions: every file but the last holds 500, or every one 1,000, "
                "so some are missing or too many in it, and those after them would stand at the wrong rows"
            )
    return files


def check_published(files: Sequence[PublishedFile], texts: Sequence[str], *, run_on: Sequence[str], max_misplaced_share: float) -> Alignment:
    """Check numbers and order of a split's completions against the texts of its rows; raises with the place, or returns what was found."""
    completions = [completion for file in files for completion in file.completions]
    alignment = align(texts, [cut_run_on(completion, run_on) for completion in completions])
    if len(completions) != len(texts):
        spans = ", ".join(f"{file.path.name} {len(file.completions)}" for file in files)
        raise ValueError(
            f"{len(texts)} rows but {len(completions)} completions ({spans}) in {files[0].path.parent}: there must be one for each row, in order. "
            + (_where(alignment, files, texts) if alignment.misplaced else "Those given stand at the right rows: it is the end that differs.")
        )
    if alignment.misplaced_share > max_misplaced_share:
        raise ValueError(
            f"the completions in {files[0].path.parent} do not stand in the order of the rows: {len(alignment.misplaced)} of {len(completions)} fit "
            f"another row more than twice as well as their own. {_where(alignment, files, texts)} If these rationales are only beside the point, allow them "
            f"with max_misplaced_share={alignment.misplaced_share:.4f}"
        )
    return alignment


def equation_by_published_rule(completion: str) -> str:
    """The equation that the authors' reading finds in a completion for SVAMP, so that their figures can be had beside ours; "" where it finds none.

    Their rule: cut at the first "Q:"; the marker once and no more; behind it, on one line, from the first bracket to the last. They hand the result to Python's
    eval, to which "(17 + 3) and (6 - 2)" is the last of the two. We execute nothing, and take the last by name.
    """
    parts = completion.partition("Q:")[0].split("The answer is")
    in_brackets = re.search(r"\(.*\)", parts[1]) if len(parts) == 2 else None
    return in_brackets[0].rpartition(" and ")[2] if in_brackets else ""


def _where(alignment: Alignment, files: Sequence[PublishedFile], texts: Sequence[str]) -> str:
    first = alignment.misplaced[0]
    position, file = first.index, files[0]
    for file in files:
        if position < len(file.completions):
            break
        position -= len(file.completions)
    own = f"row {first.index} ({texts[first.index][:60]!r})" if first.index < len(texts) else f"row {first.index}, which does not exist"
    shift = alignment.shift
    moved = f" From there on most belong {abs(shift)} row{'s' if abs(shift) > 1 else ''} {'later' if shift > 0 else 'earlier'}." if shift else ""
    return (
        f"The first that does not fit is completion {position} of {file.path.name} ({file.completions[position][:60]!r}): it stands at {own} "
        f"and fits row {first.fits} ({texts[first.fits][:60]!r}).{moved}"
    )


def _read(path: Path) -> tuple[str, ...]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): a list of completions is expected") from error
    if not isinstance(values, list):
        raise ValueError(f"{path} holds a {type(values).__name__}, where a list of completions is expected")
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"{path}, entry {number}: a {type(value).__name__}, where the text of a completion is expected")
    return tuple(values)
