"""Answers out of the completions that Distilling step-by-step published for SVAMP; skipped where they are not at hand."""

import json
import re
from pathlib import Path

import pytest

from llmdistill.tasks.answers import Choice, Equation, FreeText, Number
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task

SVAMP = Path(__file__).parents[3] / "shared" / "data" / "svamp"
pytestmark = pytest.mark.skipif(not (SVAMP / "llm").is_dir(), reason="the published completions are not here")


def completions(split: str) -> list[str]:
    return [text for path in sorted((SVAMP / "llm").glob(f"{split}_CoT_*.json")) for text in json.loads(path.read_text())]


def svamp() -> Task:
    return Task(
        name="svamp",
        source=Table(path=SVAMP / "svamp_train.json", test_path=SVAMP / "svamp_test.json"),
        answer=Equation(),
        gold_column="label",
        validation_share=0.0,
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_completion_and_no_piece_of_one_raises(split: str) -> None:
    for text in completions(split):
        for piece in (text, text[::-1], *text.split("The answer is")):
            for answer in (Equation(), Number(), FreeText(), Choice(choices=("trees", "cars"))):
                parsed = answer.parse(piece)
                assert parsed is None or answer.parse(parsed) == parsed


@pytest.mark.parametrize("split, published, read_whole", [("train", 0.735 - 2 / 800, 0.7425), ("test", 0.740, 0.775)])
def test_the_teachers_accuracy_is_the_published_one_by_the_published_rule_and_higher_by_ours(split: str, published: float, read_whole: float) -> None:
    """The reference code takes what stands in brackets: of "(102 * 11) - 8." it sees (102 * 11) and counts the row as wrong. We read the whole expression.

    Two of its right answers on train are Python's: eval gives "(29/2) and (30/2)" the value of the second, and we execute nothing.
    """
    task = svamp()
    rows = [row for row in task.rows() if row.split == split]
    texts = completions(split)
    assert len(texts) == len(rows)
    answers = [text.partition("Q:")[0].partition("The answer is")[2] for text in texts]
    in_brackets = [match[0] if (match := re.search(r"\(.*\)", answer)) else "" for answer in answers]
    assert sum(map(task.is_correct, rows, in_brackets)) / len(rows) == pytest.approx(published)
    assert sum(map(task.is_correct, rows, answers)) / len(rows) == pytest.approx(read_whole)
