"""Rows out of the user's file: JSON lines, a JSON list, CSV, TSV or Parquet, by the file's ending."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmdistill.core.fingerprint import Json, content_sha256
from llmdistill.tasks.sources.record import Record

TABLE_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file of rows, and perhaps a second one whose rows are the test split.

    A `.json` file may hold a list of objects or one object a line. CSV files have a header line. Text is UTF-8.
    """

    path: Path
    test_path: Path | None = None

    def __post_init__(self) -> None:
        for path in self._paths():
            if path.suffix.lower() not in TABLE_ENDINGS:
                raise ValueError(f"the file of rows is {str(path)!r}: its ending must be one of {', '.join(TABLE_ENDINGS)}")

    def records(self) -> Iterator[Record]:
        for path in self._paths():
            if not path.is_file():
                raise ValueError(f"there is no file of rows {str(path)!r}: check the path, which is relative to the folder that you run from")
        yield from _read(self.path, part="row", split="")
        if self.test_path is not None:
            yield from _read(self.test_path, part="test", split="test")

    def describe(self) -> str:
        return " and ".join(str(path) for path in self._paths())

    def fingerprint(self) -> Json:
        """The contents and how they are read; where the files lie does not count."""
        return [[path.suffix.lower(), content_sha256(path, "the file of rows")] for path in self._paths()]

    def _paths(self) -> tuple[Path, ...]:
        return (Path(self.path),) if self.test_path is None else (Path(self.path), Path(self.test_path))


def _read(path: Path, *, part: str, split: str) -> Iterator[Record]:
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
    try:
        for number, (place, values) in enumerate(readers[path.suffix.lower()](path)):
            yield Record(where=f"{path}, {place}", values=values, part=part, number=number, split=split)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line_number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {line_number}", _object(line, f"{path}, line {line_number}")


def _object(line: str, where: str) -> dict[str, object]:
    try:
        values = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); write one object a line") from error
    return _checked(values, where)


def _checked(values: object, where: str) -> dict[str, object]:
    if not isinstance(values, dict):
        raise ValueError(f'{where}: a {type(values).__name__}, where an object with the row\'s columns is expected; write {{"column": value, ...}}')
    return values


def _json(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        entries = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); write a list of objects, or one object a line") from error
    for number, entry in enumerate(entries, start=1):
        yield f"entry {number}", _checked(entry, f"{path}, entry {number}")


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[str, Mapping[str, object]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError(f"{path}, line 1: a column name stands there twice ({', '.join(header)}); rename one")
            for cells in reader:
                if len(cells) not in (0, len(header)):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells where the header has {len(header)} columns; quote cells with {delimiter!r}"
                    )
                if cells:
                    yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error}); correct the quotes of the row") from error


def _tsv(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    return _csv(path, delimiter="\t")


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield f"row {number}", values
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from error
