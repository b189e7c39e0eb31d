"""The shipped prompts: they render, and every worked example in them ends in an answer that the matching kind of answer reads."""

import re
from pathlib import Path

import jinja2
import pytest

from llmdistill.tasks.answers import Answer, Choice, Equation, Number
from llmdistill.tasks.answers.arithmetic import read_expression
from llmdistill.tasks.tickets import INTENTS

PROMPTS = Path(__file__).parents[2] / "prompts"
CASES: dict[str, tuple[Answer, dict[str, str]]] = {
    "tickets": (Choice(choices=INTENTS, lettered=False), {"message": "Where is my hat?"}),
    "choices": (Choice(choices=("a", "b", "c", "d", "e")), {"question": "What is wet?", "options": "(a) sand (b) rain"}),
    "word_problems": (Number(), {"question": "What is 1 + 2?"}),
    "equations": (Equation(), {"input": "Tom had 9 nuts\nand ate 4. How many are left?"}),
    "nli": (Choice(choices=("entailment", "neutral", "contradiction")), {"premise": "It rains.", "hypothesis": "It is wet."}),
}
EXAMPLE = re.compile(r"^Reason: (?P<rationale>.+) The answer is \((?P<label>.+)\)\.$", re.MULTILINE)


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_renders_with_its_fields_and_ends_where_the_teacher_goes_on(name: str) -> None:
    _, fields = CASES[name]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    template = environment.from_string((PROMPTS / f"{name}.jinja").read_text())
    text = template.render(**fields)
    assert text.endswith("\nReason:")
    assert all(value in text for value in fields.values())
    for missing in fields:
        with pytest.raises(jinja2.UndefinedError):
            template.render(**{name: value for name, value in fields.items() if name != missing})


@pytest.mark.parametrize("name", CASES)
def test_every_example_has_a_rationale_in_one_line_and_an_answer_that_is_read(name: str) -> None:
    answer, _ = CASES[name]
    text = (PROMPTS / f"{name}.jinja").read_text()
    examples = list(EXAMPLE.finditer(text))
    assert 4 <= len(examples) <= 10
    assert len(examples) == text.count("The answer is (") == text.count("Reason: ")
    for example in examples:
        assert len(example["rationale"]) > 20
        assert ")." not in example["rationale"], "a stop string must not stand in a rationale"
        assert answer.parse(example["label"]) == example["label"]


@pytest.mark.parametrize("name", ["choices", "nli", "tickets"])
def test_examples_show_every_choice(name: str) -> None:
    answer, _ = CASES[name]
    assert isinstance(answer, Choice)
    assert {example["label"] for example in EXAMPLE.finditer((PROMPTS / f"{name}.jinja").read_text())} == set(answer.choices)


def test_the_sums_in_the_word_problems_are_right() -> None:
    for example in EXAMPLE.finditer((PROMPTS / "word_problems.jinja").read_text()):
        sums = re.findall(r"([0-9.]+(?: [-+*/] [0-9.]+)+) = ([0-9.]+[0-9])", example["rationale"])
        assert sums
        for calculation, result in sums:
            left, right = read_expression(calculation), read_expression(result)
            assert left is not None
            assert right is not None
            assert left.value == right.value
        assert sums[-1][1] == example["label"]
