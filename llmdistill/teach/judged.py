"""What became of every row that a teacher was asked about, and the three files that say so: rationales.jsonl, refused.jsonl, summary.json.

The teacher's accuracy counts all rows with a known label, an unreadable answer as a wrong one and a right answer as right even where its rationale was refused:
it measures the teacher, not what was kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmdistill.core.artifacts import RationaleRow
from llmdistill.core.stage import JsonScalar
from llmdistill.teach.parse import Answer
from llmdistill.teach.verify import Verdict


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A row, what became of it, and the raw text that decided."""

    id: str
    split: str
    input: str
    gold: str | None
    verdict: Verdict
    completion: str


@dataclass(frozen=True, kw_only=True)
class Account:
    """What the completions took; NaN where nobody counted (imported completions)."""

    num_completions: int
    num_asked: int
    tokens_in: float
    tokens_out: float
    seconds: float
    cost_dollars: float


def uncounted(num_completions: int) -> Account:
    """The account of completions that came from elsewhere: asked of nobody here, and nobody says what they took."""
    return Account(num_completions=num_completions, num_asked=0, tokens_in=math.nan, tokens_out=math.nan, seconds=math.nan, cost_dollars=math.nan)


def figures_of(summary: Mapping[str, object]) -> dict[str, JsonScalar]:
    """The single figures of a summary, for a manifest."""
    return {name: value for name, value in summary.items() if isinstance(value, (int, float, str)) or value is None}


def write_judged(folder: Path, judged: Sequence[Judged], *, answer: Answer, model: str, revision: str, account: Account) -> dict[str, object]:
    """Write the three files and return the summary. Raises when nothing was kept: that is a prompt and a parser that do not fit, not a result."""
    kept = [row for row in judged if row.verdict.refusal is None]
    refused = [row for row in judged if row.verdict.refusal is not None]
    reasons = Counter(row.verdict.refusal.value for row in refused if row.verdict.refusal)
    if refused and not kept:
        raise ValueError(
            f"all {len(refused)} rows were refused ({', '.join(f'{reason}: {num}' for reason, num in reasons.most_common())}), so there is nothing to teach. "
            f"The first completion reads {refused[0].completion[:300]!r}: does the template end its examples with the answer marker, "
            "and does the task read such an answer?"
        )
    _write_lines(folder / "rationales.jsonl", [dataclasses.asdict(_rationale_row(row)) for row in kept])
    _write_lines(folder / "refused.jsonl", [_refused_row(row) for row in refused])
    test = [row for row in judged if row.split == "test"]
    other = [row for row in judged if row.split != "test"]
    summary: dict[str, object] = {
        "model": model,
        "revision": revision,
        "accuracy": _accuracy(test, answer),
        "num_rows_accuracy": _num_known(test),
        "accuracy_train": _accuracy(other, answer),
        "num_rows_accuracy_train": _num_known(other),
        "num_rows": len(judged),
        "num_completions": account.num_completions,
        "num_refused": len(refused),
        "refused_by_reason": dict(sorted(reasons.items())),
        "mean_confidence": _rounded(sum(row.verdict.confidence for row in kept) / len(kept)) if kept else None,
        "tokens_in": _rounded(account.tokens_in),
        "tokens_out": _rounded(account.tokens_out),
        "seconds": _rounded(account.seconds),
        "tokens_per_second": _rounded(account.tokens_out / account.seconds) if account.seconds else None,
        "cost_dollars": _rounded(account.cost_dollars),
        "num_asked": account.num_asked,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return summary


def _rationale_row(row: Judged) -> RationaleRow:
    verdict = row.verdict
    assert verdict.label is not None, "a row without a label was kept"
    return RationaleRow(
        id=row.id, split=row.split, input=row.input, label=verdict.label, rationale=verdict.rationale, gold=row.gold, confidence=verdict.confidence
    )


def _refused_row(row: Judged) -> dict[str, object]:
    refusal = row.verdict.refusal
    assert refusal is not None, "a kept row among the refused"
    label = row.verdict.label  # where the answer was read and the row refused for something else: it counts for the teacher's accuracy
    return {"id": row.id, "split": row.split, "input": row.input, "gold": row.gold, "label": label, "reason": refusal.value, "completion": row.completion}


def _num_known(rows: Sequence[Judged]) -> int:
    return sum(row.gold is not None for row in rows)


def _accuracy(rows: Sequence[Judged], answer: Answer) -> float | None:
    """Share of the rows with a known label whose label the teacher gave; None where no label is known."""
    right = [row.verdict.label is not None and answer.same(row.verdict.label, row.gold) for row in rows if row.gold is not None]
    return sum(right) / len(right) if right else None


def _rounded(value: float) -> float | None:
    """Whole numbers stay whole; NaN is null."""
    if math.isnan(value):
        return None
    return int(value) if value == int(value) else round(value, 6)


def _write_lines(path: Path, rows: Sequence[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
