"""A folder of word problems in SVAMP's form, as published with Distilling step-by-step (Hsieh et al. 2023).

    svamp_train.json, svamp_test.json   one object a line: input (the problem), label (an equation such as "( 84.0 / 2.0 )")
    llm/train_CoT_0.json, ...           a teacher's raw completions, aligned by position with those rows; not needed to read the problems

SVAMP is Patel et al. 2021. Validation rows are taken out of the training file by the hash of their ids.
"""

from __future__ import annotations

from pathlib import Path

from llmdistill.tasks.answers.equation import Equation
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task

COMPLETIONS = "llm"


def svamp(folder: Path) -> Task:
    """The problems of a folder, each answered by an equation that is compared by its value."""
    source = Table(path=folder / "svamp_train.json", test_path=folder / "svamp_test.json")
    return Task(name="svamp", source=source, answer=Equation(), gold_column="label")
