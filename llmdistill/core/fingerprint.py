"""Canonical forms of settings, from which the keys of stages are hashed.

Two equal settings must give one key in every process and on every machine, so nothing here depends on `hash()`, on the order of a
mapping, or on where a file lies: a path stands for the content it points at. A value whose identity we cannot know (a function, an
open file, a tensor) raises and names the field; a key that silently changes, or silently stays, is worse than no key.

A field that changes how fast a result is had but not the result (a batch size at inference, a number of workers) is declared with
`speed(default)` and is no part of the identity.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"

_SPEED = "llmdistill.speed"


def speed(default: Any) -> Any:
    """A dataclass field that is not part of the identity: it changes the speed, never the result."""
    return dataclasses.field(default=default, metadata={_SPEED: True})


def identity_fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of each field of a dataclass that its identity consists of."""
    for field in dataclasses.fields(value):
        if field.init and not field.metadata.get(_SPEED):
            yield field.name, getattr(value, field.name)


def fingerprint(value: Any, where: str = "value") -> Json:
    """The canonical form of a setting; `where` names it in errors."""
    if value is None or (isinstance(value, (bool, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return {"enum": _name_of(type(value)), "member": value.name}
    if isinstance(value, (int, float)):
        return _number(value, where)
    if isinstance(value, Path):
        return {"sha256": content_sha256(value, where)}
    if isinstance(value, (tuple, list)):
        return [fingerprint(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {"mapping": _mapping(value, where)}
    own = getattr(value, "fingerprint", None)
    if callable(own) and not isinstance(value, type):
        return {"type": _name_of(type(value)), "is": fingerprint(own(), f"{where}.fingerprint()")}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclass_fingerprint(value, where)
    raise TypeError(
        f"{where} is a {type(value).__name__} ({value!r:.80}), which has no stable fingerprint; "
        "give it a method fingerprint() that returns JSON, or declare the field with speed() if it cannot change the result"
    )


def dataclass_fingerprint(value: Any, where: str) -> Json:
    """A dataclass by its qualified name and its identity fields."""
    fields = {name: fingerprint(item, f"{where}.{name}") for name, item in identity_fields(value)}
    return {"type": _name_of(type(value)), "fields": fields}


def sha256_of(form: Json) -> str:
    """Hex digest of a canonical form."""
    return hashlib.sha256(json.dumps(form, sort_keys=True, ensure_ascii=True, allow_nan=False).encode()).hexdigest()


def content_sha256(path: Path, where: str = "path") -> str:
    """sha256 of a file, or of a folder's relative names and contents."""
    if path.is_file():
        return _file_sha256(path.resolve(), *_version_of(path))
    if path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return sha256_of([[name, content_sha256(path / name, where)] for name in names])
    raise ValueError(f"{where} is the path {path}, where there is no file or folder; a path counts by its content, so it must exist")


def _version_of(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.cache
def _file_sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _number(value: int | float, where: str) -> Json:
    """1 and 1.0 are equal and so must their forms be: options.yaml says 1 where Python says 1.0."""
    if math.isnan(value):
        raise ValueError(f"{where} is NaN, which equals nothing and so has no stable fingerprint; give a number")
    if math.isinf(value):
        return {"float": "inf" if value > 0 else "-inf"}
    return int(value) if value == int(value) else float(value)


def _mapping(value: Mapping[Any, Any], where: str) -> dict[str, Json]:
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{where} has the key {key!r}; only mappings with text keys have a stable fingerprint")
    return {key: fingerprint(value[key], f"{where}[{key!r}]") for key in sorted(value)}


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
