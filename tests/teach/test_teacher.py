"""The values that teachers and their users exchange."""

import pytest

from llmdistill.teach.teacher import Completion, Sampling, cut_at_stop


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"stop": "\n"},
        {"stop": ("",)},
    ],
)
def test_sampling_refuses_what_has_no_meaning(settings: dict) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"Sampling.{name}"):
        Sampling(**settings)


def test_a_completion_ends_by_itself_or_by_length() -> None:
    with pytest.raises(ValueError, match="finish_reason"):
        Completion(text="", tokens_in=1, tokens_out=1, seconds=0.0, finish_reason="tired")


def test_text_is_cut_at_whichever_stop_comes_first() -> None:
    assert cut_at_stop("a). b\nc", ("\n", ").")) == ("a", True)
    assert cut_at_stop("a b", ("\n",)) == ("a b", False)
    assert cut_at_stop("a b", ()) == ("a b", False)
