"""Votes, ties, known labels and limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.teach.parse import Parsed, Refusal
from llmdistill.teach.verify import Verification, verify


class Letters:
    """Labels are the same whatever their case."""

    def parse(self, text: str) -> str | None:
        return text

    def same(self, a: str, b: str) -> bool:
        return a.lower() == b.lower()


def sample(label: str, rationale: str = "so") -> Parsed:
    return Parsed(rationale=rationale, label=label)


def judge(*samples: Parsed | Refusal, gold: str | None = None, **limits: float):
    return verify(samples, Letters(), Verification(**limits), gold=gold)  # type: ignore[arg-type]


def test_the_majority_wins_with_its_share_as_confidence() -> None:
    verdict = judge(sample("b"), sample("A", "first"), Refusal.NO_MARKER, sample("a", "second"))
    assert (verdict.refusal, verdict.label, verdict.rationale, verdict.confidence, verdict.sample) == (None, "A", "first", 0.5, 1)


def test_a_tie_is_contradictory() -> None:
    verdict = judge(sample("a"), sample("b"), sample("c"), sample("A"), sample("B"))
    assert verdict.refusal is Refusal.CONTRADICTORY
    assert verdict.label is None


def test_the_first_rationale_within_the_limits_is_taken() -> None:
    verdict = judge(sample("a", "far too long"), sample("a", "good"), max_rationale_characters=5)
    assert (verdict.refusal, verdict.rationale, verdict.sample) == (None, "good", 1)
    assert judge(sample("a", "far too long"), max_rationale_characters=5).refusal is Refusal.TOO_LONG
    assert judge(sample("a", "")).refusal is Refusal.EMPTY_RATIONALE
    assert judge(sample("a", ""), sample("a", "good")).rationale == "good"
    assert judge(sample("a", "no"), min_rationale_characters=5).refusal is Refusal.TOO_SHORT


def test_a_known_label_refuses_only_when_asked_to() -> None:
    assert judge(sample("a"), gold="b").refusal is None
    verdict = judge(sample("a"), gold="b", check_gold=True)
    assert (verdict.refusal, verdict.label) == (Refusal.WRONG, "a")
    assert judge(sample("a"), gold="A", check_gold=True).refusal is None
    assert judge(sample("a"), gold=None, check_gold=True).refusal is None


def test_too_little_agreement() -> None:
    verdict = judge(sample("a"), sample("a"), sample("b"), min_agreement=0.7)
    assert (verdict.refusal, verdict.label) == (Refusal.LOW_AGREEMENT, "a")


def test_without_any_answer_the_commonest_reason_counts() -> None:
    verdict = judge(Refusal.CUT_SHORT, Refusal.NO_MARKER, Refusal.NO_MARKER)
    assert (verdict.refusal, verdict.label, verdict.confidence, verdict.sample) == (Refusal.NO_MARKER, None, 0.0, 1)


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="min_agreement"):
        Verification(min_agreement=2)
    with pytest.raises(ValueError, match="max_rationale_characters"):
        Verification(min_rationale_characters=10, max_rationale_characters=5)
    with pytest.raises(ValueError, match="no samples"):
        judge()


@given(st.lists(st.sampled_from([sample("a"), sample("A"), sample("b"), sample("c"), Refusal.NO_MARKER]), min_size=1, max_size=9))
def test_laws_of_voting(samples: list[Parsed | Refusal]) -> None:
    verdict, turned = judge(*samples), judge(*samples[::-1])
    assert (verdict.label or "").lower() == (turned.label or "").lower()
    assert verdict.confidence == turned.confidence
    votes = [s.label.lower() for s in samples if isinstance(s, Parsed)]
    if verdict.label is not None:
        assert verdict.confidence == votes.count(verdict.label.lower()) / len(samples)
        assert all(votes.count(label) < votes.count(verdict.label.lower()) for label in set(votes) - {verdict.label.lower()})
