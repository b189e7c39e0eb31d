"""Rationales in a file of one's own, out and in: JSON lines, Parquet, or a Hugging Face dataset on disk, by the name's ending.

Columns input, label and rationale are enough to read a file; what we write also has id, split, gold and confidence, so that nothing is lost on the way.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmdistill.core.artifacts import RationaleRow

REQUIRED_COLUMNS = ("input", "label", "rationale")


def export_rationales(rows: Sequence[RationaleRow], path: Path) -> Path:
    """Write rows to a .jsonl or .parquet file, or else as a dataset folder that `datasets.load_from_disk` reads; returns the path."""
    values = [dataclasses.asdict(row) for row in rows]
    if not values:
        raise ValueError(f"there are no rationales to write to {path}")
    if path.exists():
        raise ValueError(f"{path} is already there: remove it, or export to another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in values), encoding="utf-8", newline="\n")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        columns = [(name, pyarrow.float64() if name == "confidence" else pyarrow.string()) for name in values[0]]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values, schema=pyarrow.schema(columns)), path)
    elif path.suffix:
        raise ValueError(f"cannot export rationales to {path}: end the name in .jsonl or .parquet, or give a folder's name for a Hugging Face dataset")
    else:
        import datasets

        features = datasets.Features({name: datasets.Value("float64" if name == "confidence" else "string") for name in values[0]})
        datasets.Dataset.from_list(values, features=features).save_to_disk(str(path))
    return path


def read_rationale_file(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Each row with its place for error messages."""
    if path.is_dir():
        yield from _read_dataset(path)
    elif not path.is_file():
        raise ValueError(f"there is no file or folder of rationales {str(path)!r}: check the path")
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _object(line, f"{path}, line {number}")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file ({error})") from error
        for number, row in enumerate(table.to_pylist(), start=1):
            yield f"{path}, row {number}", row
    else:
        raise ValueError(f"cannot read rationales from {str(path)!r}: give a .jsonl or .parquet file, or the folder of a Hugging Face dataset")


def _object(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}, where an object with {', '.join(REQUIRED_COLUMNS)} is expected")
    return row


def _read_dataset(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"the folder {path} is not a dataset that save_to_disk wrote: {error}") from error
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    for part, dataset in parts.items():
        for number, row in enumerate(dataset):
            values = dict(row)
            if part:
                values.setdefault("split", str(part))
            yield f"{path}, {f'split {part}, ' if part else ''}row {number}", values
