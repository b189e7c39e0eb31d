"""Rows out of a reasoning-gym generator: as many as wanted, all with known answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from llmdistill.core.fingerprint import Json
from llmdistill.tasks.sources.record import Record

_PACKAGE = "reasoning-gym"
_REMEDY = f"pip install 'llmdistill[tasks]' brings {_PACKAGE}"


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """`size` draws of a generator (gsm_symbolic, chain_sum, ...); a question that was already drawn is left out, so that none stands in two splits.

    Columns: question, answer, and rationale where the generator explains its answer (gsm_symbolic does).
    """

    name: str
    size: int = 1_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"ReasoningGym.size is {self.size}: ask for at least one row")

    def records(self) -> Iterator[Record]:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ValueError(f"the task {self.describe()} needs the package {_PACKAGE}: {_REMEDY}") from error
        if self.name not in DATASETS:
            raise ValueError(f"reasoning-gym has no generator {self.name!r}: name one of {', '.join(sorted(DATASETS))}")
        seen: set[str] = set()
        for number, entry in enumerate(reasoning_gym.create_dataset(self.name, size=self.size, seed=self.seed)):
            if entry["question"] in seen:
                continue
            seen.add(entry["question"])
            values: dict[str, object] = {"question": entry["question"], "answer": str(entry["answer"])}
            if "answer_cot" in entry["metadata"]:
                values["rationale"] = entry["metadata"]["answer_cot"].rpartition("####")[0].strip()
            yield Record(where=f"{self.describe()}, row {number}", values=values, part="row", number=number)

    def describe(self) -> str:
        return f"reasoning-gym's {self.name} (size {self.size}, seed {self.seed})"

    def fingerprint(self) -> Json:
        """The settings and the package's version, whose generators may change."""
        try:
            version = metadata.version(_PACKAGE)
        except metadata.PackageNotFoundError as error:
            raise ValueError(f"the task {self.describe()} needs the package {_PACKAGE}: {_REMEDY}") from error
        return {"name": self.name, "size": self.size, "seed": self.seed, "version": version}
