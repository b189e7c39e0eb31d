import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.tasks.answers import FreeText

TEXT = FreeText()


@pytest.mark.parametrize(
    "text, canonical",
    [("  Paris \n", "Paris"), ("(Paris)", "Paris"), ('"the  Seine"', "the Seine"), ("(a) or (b)", "(a) or (b)"), ("...", None), ("", None), ("Zoë", "Zoë")],
)
def test_the_canonical_form_is_the_bare_text(text: str, canonical: str | None) -> None:
    assert TEXT.parse(text) == canonical


def test_sameness_ignores_case_punctuation_articles_and_spacing() -> None:
    assert TEXT.same("The Eiffel Tower.", "eiffel  tower")
    assert TEXT.same("A", "a.")
    assert not TEXT.same("Eiffel", "Eiffel tower")
    assert not TEXT.same("", "")


@settings(deadline=None)
@given(st.text(max_size=300))
def test_reading_never_raises(text: str) -> None:
    parsed = TEXT.parse(text)
    assert parsed is None or TEXT.parse(parsed) == parsed
    assert TEXT.same(text, text) == (parsed is not None)
