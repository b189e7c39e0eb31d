"""A pipeline's signature as its command line: options from words and from a YAML file, and back into one.

options.yaml maps option names to values. It is read by writing each entry as words in front of those that were typed, so that both are
understood alike and what is typed wins.
"""

import dataclasses
import enum
import functools
import inspect
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmdistill.core import spec
from llmdistill.core.artifacts import Artifact
from llmdistill.core.stage import Stage

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry

Pipeline = Callable[..., Stage[Artifact]]


class UsageError(ValueError):
    """What was typed cannot be done; its message is all that a person needs to see."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run it."""

    dry_run: bool = False
    """Say what would be built and what it would cost; build nothing."""
    until: str = ""
    """Stop after the stage of this name."""
    config: str = ""
    """A YAML file of options; what is typed wins."""
    accelerate_args: str = ""
    """Flags for `accelerate launch`, which starts the stages that train, as one word: "--num_processes 2 --mixed_precision bf16"."""


def read(pipeline: Pipeline, words: Sequence[str], program: str) -> tuple[RunOptions, dict[str, Any]]:
    """The run's options and the pipeline's, or the help text and exit."""
    import tyro

    hints = _hints(pipeline)
    taken = {field.name for field in dataclasses.fields(RunOptions)} & hints.keys()
    if taken:
        raise ValueError(f"the pipeline has an option {taken.pop()!r}, which `llmdistill run` has too; give it another name")

    @functools.wraps(pipeline)
    def options(**values: Any) -> dict[str, Any]:
        return values

    def command(
        how: Annotated[RunOptions, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff],
        pipeline: Annotated[Any, tyro.conf.arg(name="", constructor=options)],
    ) -> tuple[RunOptions, dict[str, Any]]:
        return how, pipeline

    return tyro.cli(command, args=list(words), prog=program, description=description(pipeline), registry=registry())


def with_config(pipeline: Pipeline, words: Sequence[str]) -> list[str]:
    """The words with those of the `--config` file, where one is named, in front."""
    path = ""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        name, _, value = word.partition("=")
        if name == "--config":
            path = value or next(rest, "")
        elif word == "--accelerate-args":  # its value begins with -- too, and would be taken for an option of ours
            kept.append(f"{word}={next(rest, '')}")
        else:
            kept.append(word)
    return [*_words_of(Path(path), pipeline), *kept] if path else kept


def resolved(pipeline: Pipeline, options: dict[str, Any]) -> dict[str, Any]:
    """Every option as `--config` reads it."""
    return {name: _plain(options[name]) for name in inspect.signature(pipeline).parameters if name in options}


def _words_of(path: Path, pipeline: Pipeline) -> Iterator[str]:
    import yaml

    if not path.is_file():
        raise UsageError(f"--config {path}: there is no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} holds a {type(values).__name__}; it must map option names to values")
    parameters = inspect.signature(pipeline).parameters
    for name, value in values.items():
        parameter = parameters.get(str(name).replace("-", "_"))
        if parameter is None:
            raise UsageError(f"--config {path} sets {name!r}, which is no option of this pipeline; it has {', '.join(sorted(parameters))}")
        if value != _plain(parameter.default):  # a default needs no words, and may be one that none can say
            yield from _words(str(name), value)


def _words(name: str, value: Any) -> Iterator[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _words(f"{name}.{key}", item)
    elif isinstance(value, bool):
        group, dot, last = flag[2:].rpartition(".")
        yield flag if value else f"--{group}{dot}no-{last}"
    elif isinstance(value, list):
        words = [str(item) for item in value]
        if any(word.startswith("-") and isinstance(item, str) for word, item in zip(words, value, strict=True)):
            raise UsageError(f"{name} is {value!r}; text that begins with - cannot be read from a list: set it in the pipeline's file")
        yield from (flag, *words)
    else:
        yield f"{flag}={value}"


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if spec.kinds_of(type(value)):
        return spec.write(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    return value


def registry() -> "ConstructorRegistry":
    """What tyro needs to know to read the options that are written as one string."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    rules = ConstructorRegistry()

    @rules.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kinds = spec.kinds_of(info.type)
        if not kinds:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="|".join(kind.kind for kind in kinds) + "[:...]",
            instance_from_str=lambda words: spec.parse(words[0], kinds),
            is_instance=lambda value: isinstance(value, kinds),
            str_from_instance=lambda value: [spec.write(value)],
        )

    return rules


def description(command: Callable[..., Any]) -> str:
    """The docstring of a function up to its list of arguments, and the kinds that each option chooses from."""
    text = (inspect.getdoc(command) or inspect.getdoc(inspect.getmodule(command)) or "").split("\nArgs:")[0].strip()
    for name, annotation in _hints(command).items():
        kinds = [kind for part in (annotation, *typing.get_args(annotation)) for kind in spec.kinds_of(part)]
        lines = [f"{_wrapped(spec.signature(kind))}\n      {_first_line(kind)}" for kind in dict.fromkeys(kinds)]
        if lines:
            text += f"\n\n--{name.replace('_', '-')} is one of\n" + "\n".join(lines)
    return text


def _hints(command: Callable[..., Any]) -> dict[str, Any]:
    return {name: hint for name, hint in typing.get_type_hints(command).items() if name != "return"}


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width=100, initial_indent="  ", subsequent_indent="      ", break_long_words=False, break_on_hyphens=False)


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]
