"""The built-in example task: customer-support messages, each with the intent that the desk should act on first. README.md is its card."""

from __future__ import annotations

from pathlib import Path

from llmdistill.tasks.answers.choice import Choice
from llmdistill.tasks.sources.table import Table
from llmdistill.tasks.task import Task

INTENTS = (
    "cancel_order",
    "change_order",
    "delivery_status",
    "wrong_or_damaged",
    "return_refund",
    "billing_problem",
    "account_access",
    "technical_problem",
    "cancel_subscription",
    "product_question",
)

RECORDING = Path(__file__).with_name("recording")  # a teacher's completions for every message, so that the quickstart asks nobody


def tickets() -> Task:
    """2,741 messages over ten intents, all with known answers; the students read the message alone."""
    return Task(
        name="tickets",
        source=Table(path=Path(__file__).with_name("tickets.jsonl")),
        answer=Choice(choices=INTENTS, lettered=False),
        input_template="{message}",
        gold_column="intent",
        id_column="id",
        split_column="split",
    )
