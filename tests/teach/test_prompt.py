"""A prompt renders a row's fields and is known by its text, wherever the file lies."""

from pathlib import Path

import pytest

from llmdistill.teach.prompt import Prompt

TICKETS = Path(__file__).parents[2] / "prompts" / "tickets.jinja"


def write(folder: Path, text: str) -> Path:
    path = folder / "prompt.jinja"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_template_ends_where_the_completion_begins() -> None:
    prompt = Prompt(path=TICKETS, stop=("\n", ")."))
    assert prompt.variables == ("message",)
    text = prompt.render({"message": "Where is {{ my }} parcel?"})
    assert text.endswith("Message: Where is {{ my }} parcel?\nReason:")


def test_identity_is_the_text_and_not_the_path(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    text = "Q: {{ q }}\nA: The answer is ("
    one, other = Prompt(path=write(tmp_path / "a", text)), Prompt(path=write(tmp_path / "b", text))
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != Prompt(path=one.path, stop=("\n\n",)).fingerprint()
    assert one.fingerprint() != Prompt(path=write(tmp_path, text + " ")).fingerprint()
    assert one.sha256 == other.sha256


def test_fields_are_text_and_never_templates(tmp_path: Path) -> None:
    prompt = Prompt(path=write(tmp_path, "{{ q }} The answer is"))
    assert prompt.render({"q": "{{ 1 + 1 }} <b> & {% raw %}"}) == "{{ 1 + 1 }} <b> & {% raw %} The answer is"


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.jinja"):
        _ = Prompt(path=tmp_path / "missing.jinja").text
    with pytest.raises(ValueError, match="answer marker 'The answer is'"):
        Prompt(path=write(tmp_path, "Q: {{ q }}")).render({"q": "?"})
    with pytest.raises(ValueError, match="uses question, but the row has only q"):
        Prompt(path=write(tmp_path, "{{ question }} The answer is")).render({"q": "?"})
    with pytest.raises(ValueError, match="not valid Jinja, line 1"):
        Prompt(path=write(tmp_path, "{{ q The answer is")).render({"q": "?"})
    with pytest.raises(ValueError, match="stop"):
        Prompt(path=TICKETS, stop="\n")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="answer_marker"):
        Prompt(path=TICKETS, answer_marker=" ")
