"""From the parsed samples of a row to the one rationale that is taught, or the reason why the row is refused.

Self-consistency (Wang et al. 2023, section 2): the label is the majority's over n samples; the share of all samples that agree is kept as the row's confidence,
unreadable samples counting against it. A tie is no majority. Known labels can be used to refuse wrong rows: never on test rows, which measure the teacher.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from llmdistill.teach.parse import Answer, Parsed, Refusal


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a row must pass.

    check_gold: refuse train and validation rows whose label differs from the known one; rows without a known label pass.
    min_agreement: share of the samples that must agree with the majority.
    min_rationale_characters, max_rationale_characters: limits on the rationale's length.
    """

    check_gold: bool = False
    min_agreement: float = 0.0
    min_rationale_characters: int = 1
    max_rationale_characters: int = 1_000

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_agreement <= 1.0:
            raise ValueError(f"Verification.min_agreement is {self.min_agreement}: it is a share between 0 and 1")
        if not 1 <= self.min_rationale_characters <= self.max_rationale_characters:
            raise ValueError(
                f"Verification.min_rationale_characters is {self.min_rationale_characters} and max_rationale_characters {self.max_rationale_characters}: "
                "the least must be at least 1 and not above the most"
            )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a row: the rationale and label to teach, or a refusal.

    label is what the teacher answered, also where the row was refused for another reason (None where it gave no answer), so that its accuracy can be
    counted over all rows. sample is the index of the sample that decided.
    """

    refusal: Refusal | None
    label: str | None
    rationale: str
    confidence: float
    sample: int


def verify(samples: Sequence[Parsed | Refusal], answer: Answer, verification: Verification, *, gold: str | None = None) -> Verdict:
    """Judge the samples of one row; pass the known label only where it may refuse the row."""
    if not samples:
        raise ValueError("a row has no samples to judge: ask for at least one")
    groups: list[list[int]] = []
    for index, sample in enumerate(samples):
        if isinstance(sample, Parsed):
            for group in groups:
                first = samples[group[0]]
                assert isinstance(first, Parsed)
                if sample.label == first.label or answer.same(sample.label, first.label):
                    group.append(index)
                    break
            else:
                groups.append([index])
    if not groups:
        reason, _ = Counter(sample for sample in samples if isinstance(sample, Refusal)).most_common(1)[0]
        return Verdict(refusal=reason, label=None, rationale="", confidence=0.0, sample=list(samples).index(reason))
    groups.sort(key=len, reverse=True)
    majority = groups[0]
    confidence = len(majority) / len(samples)
    if len(groups) > 1 and len(groups[1]) == len(majority):
        return Verdict(refusal=Refusal.CONTRADICTORY, label=None, rationale="", confidence=confidence, sample=majority[0])
    chosen, refusal = _choose_rationale([(index, _rationale(samples[index])) for index in majority], verification)
    picked = samples[chosen]
    assert isinstance(picked, Parsed)
    if gold is not None and verification.check_gold and not answer.same(picked.label, gold):
        refusal = Refusal.WRONG
    elif confidence < verification.min_agreement:
        refusal = Refusal.LOW_AGREEMENT
    return Verdict(refusal=refusal, label=picked.label, rationale=picked.rationale, confidence=confidence, sample=chosen)


def _rationale(sample: Parsed | Refusal) -> str:
    assert isinstance(sample, Parsed)
    return sample.rationale


def _choose_rationale(rationales: Sequence[tuple[int, str]], verification: Verification) -> tuple[int, Refusal | None]:
    """The first sample whose rationale is within the limits, else the first with the reason that it is not."""
    for index, rationale in rationales:
        if verification.min_rationale_characters <= len(rationale) <= verification.max_rationale_characters:
            return index, None
    index, rationale = rationales[0]
    if not rationale:
        return index, Refusal.EMPTY_RATIONALE
    return index, Refusal.TOO_LONG if len(rationale) > verification.max_rationale_characters else Refusal.TOO_SHORT
