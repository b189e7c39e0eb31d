"""Rows out of a Hugging Face dataset: a folder on this machine, or one of the hub's at a revision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdistill.tasks.sources.record import Record

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# The training part has no split of its own, so that the task may take validation and test rows out of it where the dataset has none.
_SPLIT_OF_PART = {"train": "", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class DatasetFolder:
    """What `save_to_disk` wrote, or a folder of data files as a dataset of the hub is laid out."""

    folder: Path

    def records(self) -> Iterator[Record]:
        import datasets

        folder = Path(self.folder)
        if not folder.is_dir():
            raise ValueError(f"there is no dataset folder {str(folder)!r}: check the path, which is relative to the folder that you run from")
        saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
        loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder.resolve()))
        yield from _records(loaded, str(folder))

    def describe(self) -> str:
        return str(self.folder)


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A dataset of the hub at a revision: a commit, a tag or a branch. Only a commit is sure to be the same rows tomorrow."""

    name: str
    revision: str
    subset: str = ""

    def __post_init__(self) -> None:
        if not self.name or not self.revision:
            raise ValueError(f"the hub dataset is {self.describe()!r}: give its name and a revision, such as openai/gsm8k@e53f048")

    def records(self) -> Iterator[Record]:
        import datasets

        loaded = datasets.load_dataset(self.name, name=self.subset or None, revision=self.revision)
        yield from _records(loaded, self.describe())

    def describe(self) -> str:
        return f"{self.name}@{self.revision}" + (f" ({self.subset})" if self.subset else "")


def _records(loaded: Dataset | DatasetDict | Any, where: str) -> Iterator[Record]:
    import datasets

    parts: Mapping[Any, Dataset] = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    unknown = sorted(set(map(str, parts)) - set(_SPLIT_OF_PART))
    if unknown:
        raise ValueError(
            f"{where} has the split {unknown[0]!r}, which is none of {', '.join(_SPLIT_OF_PART)}: save the splits that you want under these names "
            "with DatasetDict.save_to_disk and name that folder"
        )
    for part, dataset in parts.items():
        names = {column: feature for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)}
        for number, row in enumerate(dataset):
            values = {column: _class_name(names[column], value) if column in names else value for column, value in dict(row).items()}
            yield Record(where=f"{where}, split {part}, row {number}", values=values, part=str(part), number=number, split=_SPLIT_OF_PART[str(part)])


def _class_name(feature: Any, value: int | None) -> str | None:
    """The name of a class; -1 is the hub's way to say that the label is withheld."""
    return None if value is None or value < 0 else feature.int2str(value)
