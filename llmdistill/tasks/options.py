"""Tasks as they are named on the command line and in options.yaml: `tickets`, `choices:rows.jsonl?choices=yes,no&input={text}&gold=label`, `gym:chain_sum`.

A pipeline declares `task: TaskOption = Tickets()` and hands `task.task()` to its stages. These classes hold what people write; the key of a stage comes from
the Task that they make.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmdistill.tasks.answers.answer import Answer
from llmdistill.tasks.answers.choice import Choice
from llmdistill.tasks.answers.equation import Equation
from llmdistill.tasks.answers.free_text import FreeText
from llmdistill.tasks.answers.number import Number
from llmdistill.tasks.sources.hugging_face import DatasetFolder, HubDataset
from llmdistill.tasks.sources.reasoning_gym import ReasoningGym
from llmdistill.tasks.sources.record import Source
from llmdistill.tasks.sources.table import TABLE_ENDINGS, Table
from llmdistill.tasks.task import Task
from llmdistill.tasks.tickets import tickets


@dataclass(frozen=True, kw_only=True)
class Tickets:
    """The built-in example: customer-support messages and ten intents."""

    kind: ClassVar[str] = "tickets"

    def task(self) -> Task:
        return tickets()


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The user's rows.

    rows: a file (.jsonl, .json, .csv, .tsv, .parquet), a folder with a Hugging Face dataset, or a hub dataset with its revision (openai/gsm8k@main).
    test_rows: a second file, whose rows are the test split; "" for none.
    subset: the configuration of a hub dataset; "" for its only one.
    input: the student's input, with columns in braces.
    gold, gold_after, id, split: the columns of the known answer (and the mark before it), the id and the split; "" for none.
    """

    rows: str
    test_rows: str = ""
    subset: str = ""
    input: str = "{input}"
    gold: str = ""
    gold_after: str = ""
    id: str = ""
    split: str = ""
    test_share: float = 0.15
    validation_share: float = 0.1

    def _task(self, answer: Answer) -> Task:
        return Task(
            name=Path(self.rows).stem or self.rows,
            source=self._source(),
            answer=answer,
            input_template=self.input,
            gold_column=self.gold,
            gold_after=self.gold_after,
            id_column=self.id,
            split_column=self.split,
            test_share=self.test_share,
            validation_share=self.validation_share,
        )

    def _source(self) -> Source:
        path = Path(self.rows)
        if path.suffix.lower() in TABLE_ENDINGS and not path.is_dir():
            return Table(path=path, test_path=Path(self.test_rows) if self.test_rows else None)
        if self.test_rows:
            raise ValueError(f"test_rows is {self.test_rows!r}, but rows is {self.rows!r}, which is not a file: a dataset brings its own test split")
        if path.is_dir():
            return DatasetFolder(folder=path)
        name, _, revision = self.rows.partition("@")
        if not revision:
            raise ValueError(
                f"the rows are {self.rows!r}, which is neither a file ending in {', '.join(TABLE_ENDINGS)} nor a folder: "
                "check the path, or name a hub dataset with its revision, such as openai/gsm8k@main"
            )
        return HubDataset(name=name, revision=revision, subset=self.subset)


@dataclass(frozen=True, kw_only=True)
class ChoiceRows(_Rows):
    """Rows whose answer is one of a set: choices:rows.jsonl?choices=yes,no.

    lettered: the prompt shows the choices as (a), (b), ... and the answer may be such a letter.
    """

    kind: ClassVar[str] = "choices"
    choices: tuple[str, ...]
    lettered: bool = False

    def task(self) -> Task:
        return self._task(Choice(choices=self.choices, lettered=self.lettered))


@dataclass(frozen=True, kw_only=True)
class NumberRows(_Rows):
    """Rows whose answer is a number: number:train.jsonl?input={question}&gold=answer&gold_after=####."""

    kind: ClassVar[str] = "number"

    def task(self) -> Task:
        return self._task(Number())


@dataclass(frozen=True, kw_only=True)
class EquationRows(_Rows):
    """Rows whose answer is an arithmetic expression, as in SVAMP: equation:train.json?test_rows=test.json&gold=label."""

    kind: ClassVar[str] = "equation"

    def task(self) -> Task:
        return self._task(Equation())


@dataclass(frozen=True, kw_only=True)
class TextRows(_Rows):
    """Rows whose answer is free text."""

    kind: ClassVar[str] = "text"

    def task(self) -> Task:
        return self._task(FreeText())


@dataclass(frozen=True, kw_only=True)
class Gym:
    """A generator of reasoning-gym: gym:gsm_symbolic?size=2000&seed=0.

    numbers: the answers are numbers; otherwise they are compared as text.
    """

    kind: ClassVar[str] = "gym"
    generator: str
    size: int = 1_000
    seed: int = 0
    numbers: bool = True
    test_share: float = 0.15
    validation_share: float = 0.1

    def task(self) -> Task:
        return Task(
            name=self.generator,
            source=ReasoningGym(name=self.generator, size=self.size, seed=self.seed),
            answer=Number() if self.numbers else FreeText(),
            input_template="{question}",
            gold_column="answer",
            test_share=self.test_share,
            validation_share=self.validation_share,
        )


TaskOption = Tickets | ChoiceRows | NumberRows | EquationRows | TextRows | Gym
