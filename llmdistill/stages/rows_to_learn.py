"""Where a pipeline that begins with a finished student has the labels and reasons of its rows from: an option, and the stage that it stands for."""

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from llmdistill.core.artifacts import Checkpoint, Rationales
from llmdistill.core.stage import Stage
from llmdistill.stages.given_rationales import GivenRationales
from llmdistill.stages.import_rationales import RationaleFile
from llmdistill.stages.own_answers import OwnAnswers
from llmdistill.tasks.task import Task
from llmdistill.teach.verify import Verification


@dataclass(frozen=True, kw_only=True)
class Own:
    """The student's own answers, as it was before."""

    kind: ClassVar[str] = "own"


@dataclass(frozen=True, kw_only=True)
class Given:
    """The known answers of the rows, and the rationales in one of their columns."""

    kind: ClassVar[str] = "given"
    column: str = "rationale"


RowsToLearn: TypeAlias = Own | Given | RationaleFile


def rows_to_learn(rows: RowsToLearn, task: Task, student: Stage[Checkpoint]) -> Stage[Rationales]:
    """The stage that gives them."""
    if isinstance(rows, Own):
        return OwnAnswers(checkpoint=student, task=task)
    if isinstance(rows, Given):
        return GivenRationales(task=task, column=rows.column)
    return rows.stage(task, Verification())
