import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.tasks.answers import Choice

INTENTS = Choice(choices=("cancel_order", "change_order", "cancel_subscription"), lettered=False)
LETTERED = Choice(choices=("river bank", "library", "bank"))
LETTERS = Choice(choices=("a", "b", "c", "d"))
NLI = Choice(choices=("entailment", "not_entailment"))


@pytest.mark.parametrize(
    "text",
    [
        "cancel_order",
        " Cancel_Order. ",
        "(cancel_order)",
        "(cancel_order",
        "cancel order",
        "cancel-order",
        "**cancel_order**",
        '"cancel_order"',
        "CANCEL ORDER",
    ],
)
def test_a_choice_is_read_by_its_text(text: str) -> None:
    assert INTENTS.parse(text) == "cancel_order"


@pytest.mark.parametrize(
    "text, choice",
    [
        ("the intent is cancel_order", "cancel_order"),
        ("not cancel_order but change_order", "change_order"),
        ("cancel_order, and cancel_order again", "cancel_order"),
        ("cancel_order or change_order", None),
        ("not cancel_order", None),
        ("it isn't a cancel_order", None),
        ("cancel_orders", None),
        ("cancel", None),
        ("(b)", None),
        ("", None),
        ("...", None),
    ],
)
def test_a_sentence_is_read_where_it_names_one_choice(text: str, choice: str | None) -> None:
    assert INTENTS.parse(text) == choice


@pytest.mark.parametrize(
    "text", ["(b)", "b", "B", "b)", "B.", "b:", "(b", "(B) library", "b) library", "b. library", "option b", "Choice (b)", "it is (b)", "(b)."]
)
def test_a_choice_is_read_by_its_letter(text: str) -> None:
    assert LETTERED.parse(text) == "library"


@pytest.mark.parametrize("text, choice", [("(b) bank", None), ("(z)", None), ("(a) or (b)", None), ("a bank", "bank"), ("river bank", "river bank")])
def test_a_letter_that_contradicts_or_is_none_is_refused(text: str, choice: str | None) -> None:
    assert LETTERED.parse(text) == choice


@pytest.mark.parametrize("text, choice", [("(c)", "c"), ("c) a tall tree", "c"), ("(c) a tree", "c"), ("D", "d"), ("a tree", None), ("e", None)])
def test_choices_that_are_letters(text: str, choice: str | None) -> None:
    assert LETTERS.parse(text) == choice


def test_the_longest_choice_counts_where_one_contains_another() -> None:
    assert NLI.parse("this is not entailment") == "not_entailment"
    assert NLI.parse("this is entailment") == "entailment"


def test_sameness_goes_by_meaning() -> None:
    assert INTENTS.same("cancel_order", "(Cancel order)")
    assert not INTENTS.same("cancel_order", "change_order")
    assert not INTENTS.same("nonsense", "nonsense")


@settings(deadline=None)
@given(st.text(max_size=300) | st.lists(st.sampled_from([*INTENTS.choices, *LETTERED.choices, "(b)", "not", "a", ".", "\n", "or"]), max_size=6).map(" ".join))
def test_reading_never_raises_and_gives_a_choice_or_nothing(text: str) -> None:
    for answer in (INTENTS, LETTERED, LETTERS, NLI):
        parsed = answer.parse(text)
        assert parsed is None or parsed in answer.choices
        assert parsed is None or answer.parse(parsed) == parsed


@pytest.mark.parametrize("choices", [(), ("one",), "yes", ("a b", "A_B"), ("ok", "..")])
def test_choices_that_cannot_be_told_apart_are_refused(choices: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"Choice\.choices"):
        Choice(choices=choices)
