"""A choice between kinds, written as one string: `kind:argument?field=value&field=value`.

An option whose type is a union of dataclasses (which teacher, which student) is one word on the command line and one line of
options.yaml. Each dataclass says its `kind`; the argument is its first field; values are read by the fields' annotations.

    transformers:Qwen/Qwen2.5-7B-Instruct@main?batch_size=64
    t5:tiny?vocabulary_size=4000
    tickets

The characters % ? & and, in tuples, the comma are written %25 %3F %26 %2C inside a value, as in a URL.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union
from urllib.parse import unquote

_TRUE_FALSE = {"true": True, "false": False}


def kinds_of(annotation: Any) -> tuple[type, ...]:
    """The dataclasses that an option of this type chooses from; empty where it is no such option."""
    members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    is_spec = all(isinstance(member, type) and dataclasses.is_dataclass(member) and isinstance(getattr(member, "kind", None), str) for member in members)
    return members if is_spec else ()


def parse(text: str, kinds: tuple[type, ...]) -> Any:
    """The dataclass that a string stands for."""
    head, question_mark, query = text.partition("?")
    kind, colon, argument = head.partition(":")
    by_kind = {member.kind: member for member in kinds}
    if kind not in by_kind:
        raise ValueError(f"{text!r} is of no known kind; begin with one of {', '.join(sorted(by_kind))}")
    cls = by_kind[kind]
    annotations = _annotations(cls)
    values: dict[str, Any] = {}
    if colon:
        if not annotations:
            raise ValueError(f"{kind} takes no argument, but {text!r} gives it {argument!r}")
        first = next(iter(annotations))
        values[first] = _value(argument, annotations[first], f"{kind}:{first.upper()}")
    for pair in query.split("&") if question_mark else []:
        name, equals, value = pair.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in annotations:
            raise ValueError(f"{text!r}: {kind} has no field {name!r}; write ?field=value&field=value with {', '.join(annotations)}")
        if name in values:
            raise ValueError(f"{text!r} gives {name} twice; the argument after the colon is the field {next(iter(annotations))}")
        values[name] = _value(value, annotations[name], f"{kind}?{name}")
    missing = [name for name in _required(cls) if name not in values]
    if missing:
        raise ValueError(f"{text!r} does not say {', '.join(missing)}; write {signature(cls).replace(' ', '')}")
    return cls(**values)


def write(value: Any) -> str:
    """The string that `parse` reads back as this dataclass; fields at their defaults are left out."""
    names = list(_annotations(type(value)))
    changed = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init and not _is_default(field, value)}
    text = value.kind
    if names and names[0] in changed:
        text += ":" + _text(changed.pop(names[0]))
    return text + ("?" if changed else "") + "&".join(f"{name}={_text(item)}" for name, item in changed.items())


def signature(cls: Any) -> str:
    """How this kind is written, with a space before each field: `kind:ARGUMENT ?field=TYPE &field=TYPE`."""
    annotations = _annotations(cls)
    names = list(annotations)
    head = cls.kind
    if names:
        head += f":{names[0].upper()}" if names[0] in _required(cls) else f"[:{names[0].upper()}]"
    return " ".join([head, *(f"{'?&'[number > 0]}{name}={_type_name(annotations[name])}" for number, name in enumerate(names[1:]))])


def _value(text: str, annotation: Any, where: str) -> Any:
    """A value read by its annotation."""
    kinds = kinds_of(annotation)
    if kinds:
        return parse(unquote(text), kinds)
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return _tuple(text, parts, where)
    if _is_union(annotation):
        return _first_that_reads(text, parts, where)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):  # written by its first field, as a model source is
        first, first_annotation = next(iter(_annotations(annotation).items()))
        return typing.cast(Any, annotation)(**{first: _value(text, first_annotation, where)})
    text = unquote(text)  # once: what is above reads its parts by coming here again
    if origin is Literal:
        by_text = {str(choice): choice for choice in parts}
        if text not in by_text:
            raise ValueError(f"{where} is {text!r}; use one of {', '.join(by_text)}")
        return by_text[text]
    if annotation in (str, Path):
        return annotation(text)
    if annotation is type(None):
        return _choice(text, {"none": None}, where)
    if annotation is bool:
        return _choice(text, _TRUE_FALSE, where)
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            raise ValueError(f"{where} is {text!r}; it needs {'a whole number' if annotation is int else 'a number'}") from None
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _choice(text, dict(annotation.__members__), where)
    raise ValueError(f"{where} is of type {annotation}, which cannot be written in a string; set it in the pipeline's file")


def _tuple(text: str, parts: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    items = text.split(",") if text else []
    if len(parts) == 2 and parts[1] is Ellipsis:
        return tuple(_value(item, parts[0], where) for item in items)
    if len(items) != len(parts):
        raise ValueError(f"{where} is {text!r}; it needs {len(parts)} values with commas between them")
    return tuple(_value(item, part, where) for item, part in zip(items, parts, strict=True))


def _first_that_reads(text: str, parts: tuple[Any, ...], where: str) -> Any:
    for part in sorted(parts, key=lambda part: part is str):  # text reads as anything, so it comes last
        try:
            return _value(text, part, where)
        except ValueError:
            continue
    raise ValueError(f"{where} is {text!r}; it needs one of {', '.join(_type_name(part) for part in parts)}")


def _choice(text: str, choices: dict[str, Any], where: str) -> Any:
    by_lower = {name.lower(): value for name, value in choices.items()}
    if text.lower() not in by_lower:
        raise ValueError(f"{where} is {text!r}; use one of {', '.join(choices)}")
    return by_lower[text.lower()]


def _text(value: Any) -> str:
    """The inverse of `_value`."""
    if isinstance(value, tuple):
        return ",".join(_text(item) for item in value)
    if isinstance(value, enum.Enum):
        text = value.name
    elif isinstance(value, bool) or value is None:
        text = str(value).lower()
    elif isinstance(value, (str, int, float, Path)):
        text = str(value)
    elif kinds_of(type(value)):
        text = write(value)
    elif dataclasses.is_dataclass(value):
        field = dataclasses.fields(value)[0]
        return _text(getattr(value, field.name))
    else:
        raise ValueError(f"{value!r} cannot be written in a string; set it in the pipeline's file")
    for character in "%?&,":
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def _annotations(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _required(cls: Any) -> list[str]:
    missing = dataclasses.MISSING
    return [field.name for field in dataclasses.fields(cls) if field.init and field.default is missing and field.default_factory is missing]


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return getattr(value, field.name) == field.default_factory()
    return field.default is not dataclasses.MISSING and getattr(value, field.name) == field.default


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is tuple:
        return ",".join("..." if part is Ellipsis else _type_name(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in typing.get_args(annotation))
    if _is_union(annotation):
        return "|".join(_type_name(part) for part in typing.get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "|".join(annotation.__members__)
    if annotation is type(None):
        return "none"
    return getattr(annotation, "__name__", str(annotation)).upper()
