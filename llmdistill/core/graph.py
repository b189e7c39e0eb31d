"""The stages of a pipeline, found by walking up from the last one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmdistill.core.artifacts import Artifact
from llmdistill.core.stage import Stage, upstream
from llmdistill.core.store import Store


@dataclass(frozen=True)
class Graph:
    """Every stage of a pipeline, each after those it depends on."""

    stages: tuple[Stage[Artifact], ...]

    @staticmethod
    def above(last: Stage[Artifact]) -> Graph:
        """The graph that ends in this stage."""
        found: dict[tuple[str, str], Stage[Artifact]] = {}

        def walk(stage: Stage[Artifact]) -> None:
            if (stage.key, stage.name) not in found:
                for above in upstream(stage):
                    walk(above)
                found[stage.key, stage.name] = stage

        walk(last)
        graph = Graph(tuple(found.values()))
        _check_names(graph)
        return graph

    @property
    def last(self) -> Stage[Artifact]:
        """What the pipeline is for."""
        return self.stages[-1]

    def with_key(self, key: str) -> Stage[Artifact]:
        """The stage of this key."""
        for stage in self.stages:
            if stage.key == key:
                return stage
        raise ValueError(
            f"no stage has the key {key}; the same options gave another key a moment ago. "
            "Either a file that the pipeline reads has changed while it ran, or the pipeline itself is not a function of its options"
        )


def to_build(last: Stage[Artifact], store: Store) -> list[Stage[Artifact]]:
    """What has to be built for this stage, in order; nothing above a finished stage is needed."""
    needed: dict[str, Stage[Artifact]] = {}

    def walk(stage: Stage[Artifact]) -> None:
        if stage.key not in needed and not store.is_complete(stage):
            for above in upstream(stage):
                walk(above)
            needed[stage.key] = stage

    walk(last)
    return list(needed.values())


def _check_names(graph: Graph) -> None:
    keys: dict[str, str] = {}
    for stage in graph.stages:
        if not re.fullmatch(r"[\w.-]+", stage.name):
            raise ValueError(f"a stage is called {stage.name!r}; its name is that of a link in the runs folder: use letters, digits, _ . and -")
        if keys.setdefault(stage.name, stage.key) != stage.key:
            raise ValueError(f'two different stages are called {stage.name!r}; tell them apart with {type(stage).__name__}(name="...", ...)')
