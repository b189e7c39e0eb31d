"""A stage: one step of a pipeline, whose fields are at once its settings and its cache key.

A stage is a frozen, keyword-only dataclass with a `build`. A field that holds another stage is a dependency, so that keys form a Merkle
chain: change a setting, a prompt's text or anything upstream and this key and those below it change, and no others.

    @dataclass(frozen=True, kw_only=True)
    class Distil(Stage[Checkpoint]):
        artifact = Checkpoint
        launcher = Launcher.ACCELERATE
        rationales: Stage[Rationales]
        rationale_weight: float = 1.0
        num_workers: int = speed(2)

        def build(self, run): ...
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

from llmdistill.core.artifacts import Artifact
from llmdistill.core.fingerprint import Json, dataclass_fingerprint, identity_fields, sha256_of, speed

if TYPE_CHECKING:
    from llmdistill.core.run import Run

__all__ = ["A", "JsonScalar", "Launcher", "Stage", "speed", "upstream"]

A = TypeVar("A", bound=Artifact, covariant=True)
JsonScalar: TypeAlias = "str | int | float | bool | None"


class Launcher(enum.Enum):
    """How `llmdistill run` starts a stage's process."""

    PYTHON = "python"
    ACCELERATE = "accelerate launch"


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[A]):
    """One step of a pipeline. Raise `version` when a change of code changes what `build` writes."""

    artifact: ClassVar[type[Artifact]]
    version: ClassVar[int] = 1
    launcher: ClassVar[Launcher] = Launcher.PYTHON

    name: str = speed("")
    """What people call it; by default the class's name in snake_case."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        name = cls.__dict__.get("name", _snake_case(cls.__name__))
        if isinstance(name, str):  # the default of the inherited field, set before @dataclass reads the class
            cls.__annotations__["name"] = str
            cls.name = speed(name)

    def build(self, run: Run) -> Mapping[str, JsonScalar]:
        """Write the artefact into `run.folder`; return what was measured, with units in the names.

        `run.folder` may hold what an earlier, killed build left: go on from there. The result must be the same.
        """
        raise NotImplementedError

    def plan(self, run: Run) -> Mapping[str, JsonScalar]:
        """What `--dry-run` shows: the cost that can be known without building. Artefacts upstream may not exist yet."""
        return {}

    @functools.cached_property
    def key(self) -> str:
        """Name of the artefact in the store: a digest of type, version, fields, upstream keys and the text of files."""
        form: Json = [dataclass_fingerprint(self, type(self).__name__), self.version]
        return f"{_snake_case(type(self).__name__)}-{sha256_of(form)[:20]}"

    def fingerprint(self) -> Json:
        """A stage stands in another's fields for its key."""
        return self.key


def upstream(stage: Stage[Artifact]) -> list[Stage[Artifact]]:
    """The stages that this one depends on directly: those its identity fields hold, at any depth of tuples, mappings and dataclasses."""
    return list(_stages_in(tuple(value for _, value in identity_fields(stage))))


def _stages_in(value: Any) -> Iterator[Stage[Artifact]]:
    if isinstance(value, Stage):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _stages_in(item)
    elif isinstance(value, Mapping):
        yield from _stages_in(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _stages_in([item for _, item in identity_fields(value)])


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
