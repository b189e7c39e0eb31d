"""Small stages for the tests of core."""

from collections.abc import Mapping
from dataclasses import dataclass

from llmdistill.core.artifacts import Artifact
from llmdistill.core.run import Run
from llmdistill.core.stage import Stage, speed


@dataclass(frozen=True, kw_only=True)
class Words(Stage[Artifact]):
    """Writes a text."""

    artifact = Artifact
    text: str = "a"
    weight: float = 1.0
    batch_size: int = speed(8)

    def build(self, run: Run) -> Mapping[str, int]:
        (run.folder / "words.txt").write_text(self.text)
        return {"num_characters": len(self.text)}


@dataclass(frozen=True, kw_only=True)
class Twice(Stage[Artifact]):
    """Writes its upstream's text twice."""

    artifact = Artifact
    words: Stage[Artifact]

    def build(self, run: Run) -> Mapping[str, int]:
        (run.folder / "words.txt").write_text((run.artifact(self.words).folder / "words.txt").read_text() * 2)
        return {}


@dataclass(frozen=True, kw_only=True)
class Join(Stage[Artifact]):
    """Joins texts."""

    artifact = Artifact
    parts: tuple[Stage[Artifact], ...]
    named: Mapping[str, Stage[Artifact]]

    def build(self, run: Run) -> Mapping[str, int]:
        texts = [(run.artifact(part).folder / "words.txt").read_text() for part in (*self.parts, *self.named.values())]
        (run.folder / "words.txt").write_text("".join(texts))
        return {}
