"""Completions are read or refused with a reason, and nothing that a teacher may write raises."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.tasks.answers import Choice, Equation, FreeText, Number
from llmdistill.teach.parse import Parsed, Refusal, cut_run_on, parse_completion, unwrap

SVAMP = Path(__file__).parents[3] / "shared" / "data" / "svamp" / "llm"
ANSWERS = (Choice(choices=("cancel_order", "change_order")), Equation(), Number(), FreeText())


@dataclass(frozen=True)
class Word:
    """An answer of one lower-case word."""

    def parse(self, text: str) -> str | None:
        return text if text.isalpha() and text.islower() else None

    def same(self, a: str, b: str) -> bool:
        return a == b


def read(completion: str, finish_reason: str = "stop", **options: object) -> Parsed | Refusal:
    return parse_completion(completion, Word(), finish_reason=finish_reason, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "completion",
    [
        " Because it is. The answer is (yes).",
        "Because it is. The answer is (yes",
        "Because it is.\nThe answer is: yes.",
        "Because\n it  is. The answer is ( yes ). \n",
        "Because it is. The answer is (yes).\n\nQ: Is it? A: No. The answer is (no).",
        "Because it is. The answer is (yes). The answer is (no).",
    ],
)
def test_a_rationale_and_a_label(completion: str) -> None:
    parsed = read(completion)
    assert isinstance(parsed, Parsed)
    assert parsed.label == "yes"
    assert parsed.rationale == "Because it is."


def test_a_label_alone_is_an_answer() -> None:
    assert read("The answer is (yes).") == Parsed(rationale="", label="yes")


def test_the_marker_with_a_bracket_is_the_answer() -> None:
    assert read("The answer is not obvious. It is late. The answer is (yes).") == Parsed(rationale="The answer is not obvious. It is late.", label="yes")


@pytest.mark.parametrize(
    "completion, finish_reason, refusal",
    [
        (" \n", "stop", Refusal.EMPTY),
        ("Because it is.", "stop", Refusal.NO_MARKER),
        ("Because it is", "length", Refusal.CUT_SHORT),
        ("Because. The answer is", "length", Refusal.CUT_SHORT),
        ("Because. The answer is", "stop", Refusal.UNPARSABLE),
        ("Because. The answer is (ye", "length", Refusal.CUT_SHORT),
        ("Because. The answer is ye", "length", Refusal.CUT_SHORT),
        ("Because. The answer is (yes (no", "stop", Refusal.CUT_SHORT),
        ("Because. The answer is (Yes!).", "stop", Refusal.UNPARSABLE),
        ("Because it is. Q: And? A: So. The answer is (yes).", "stop", Refusal.RAN_ON),
    ],
)
def test_reasons(completion: str, finish_reason: str, refusal: Refusal) -> None:
    assert read(completion, finish_reason) is refusal


def test_a_whole_answer_counts_although_the_completion_was_cut_later() -> None:
    for completion in ("Because. The answer is (yes).", "Because. The answer is (yes).\n\nQ: What i", "Because. The answer is (yes).\nMore te"):
        assert read(completion, "length") == Parsed(rationale="Because.", label="yes")


@pytest.mark.parametrize(
    "text, inner, num_open",
    [
        ("(84 / 2).", "84 / 2", 0),
        ("(84 / 2", "84 / 2", 1),
        ("((15 * 19) + (62 * 19)", "(15 * 19) + (62 * 19)", 1),
        ("(3 * 8) + 9.", "(3 * 8) + 9", 0),
        ("((415 - 309) - (41", "(415 - 309) - (41", 2),
        ("(84 / 2). I hope that helps (a lot).", "84 / 2", 0),
        ("42.", "42", 0),
        ("...", "...", 0),
        ("", "", 0),
        (")(", ")(", 0),
    ],
)
def test_brackets(text: str, inner: str, num_open: int) -> None:
    assert unwrap(text) == (inner, num_open)


def test_a_run_on_begins_a_word_and_is_not_the_beginning() -> None:
    assert cut_run_on("FAQ: none. Q: two", ("Q:",)) == "FAQ: none. "
    assert cut_run_on("Q: two", ("Q:",)) == "Q: two"
    assert cut_run_on("a\n\nMessage: b Q: c", ("Q:", "Message:")) == "a\n\n"


WORDS = ["The answer is", "cancel_order", "Q:", "e", "(", ")", ").", " ", "\n", "\x00", "\ud800", "½", "84", " / ", "9" * 400, "**", "-", "1e999", "=", "$"]


def check(completion: str) -> None:
    for answer in ANSWERS:
        for finish_reason in ("stop", "length"):
            result = parse_completion(completion, answer, finish_reason=finish_reason)
            if isinstance(result, Parsed):
                assert result.label
                assert answer.same(result.label, result.label)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(WORDS), max_size=40).map("".join)))
def test_arbitrary_text_never_raises(completion: str) -> None:
    check(completion)


def test_ten_thousand_mangled_completions_never_raise() -> None:
    chance = random.Random(0)
    for number in range(10_000):
        text = f"There were {number} and 2 left. So {number} / 2. The answer is (({number} - 1) / 2).\n\nQ: What? A: The answer is (cancel_order)."
        for _ in range(chance.randrange(1, 5)):
            at, to = sorted(chance.choices(range(len(text) + 1), k=2))
            text = chance.choice([text[:at] + text[to:], text[:to], text[at:], text[:at] + chance.choice(WORDS) + text[at:], text[at:to] + text])
        answer = ANSWERS[number % len(ANSWERS)]
        parse_completion(text, answer, finish_reason=chance.choice(["stop", "length"]))


@pytest.mark.skipif(not SVAMP.is_dir(), reason="the published completions for SVAMP are not here")
def test_real_completions_never_raise_whole_or_cut_anywhere() -> None:
    completions = [text for path in sorted(SVAMP.glob("*_CoT_*.json")) for text in json.loads(path.read_text())]
    results = [parse_completion(text, Equation(), finish_reason="length") for text in completions]
    assert sum(isinstance(result, Parsed) for result in results) > 0.95 * len(completions)
    for number, text in enumerate(completions):
        for cut in range(number % 13, len(text), 149):
            parse_completion(text[:cut], Equation(), finish_reason="length" if cut % 2 else "stop")
            parse_completion(text[cut:] + text[:cut], Number())
