import re
from collections import Counter
from pathlib import Path

import pytest

from llmdistill.tasks import tickets as package
from llmdistill.tasks.baseline import BagOfWords
from llmdistill.tasks.duplicates import find_duplicates
from llmdistill.tasks.splits import split_of
from llmdistill.tasks.task import Row
from llmdistill.tasks.tickets import INTENTS, tickets
from llmdistill.tasks.tickets.keyword_rule import keyword_rule

CARD = Path(package.__file__).with_name("README.md").read_text()


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return tickets().rows()


def accuracy(rows: list[Row], predicted: list[str]) -> float:
    return sum(row.gold == label for row, label in zip(rows, predicted, strict=True)) / len(rows)


def test_there_are_enough_distinct_labelled_messages(rows: list[Row]) -> None:
    normal = {" ".join(re.findall(r"\w+", row.fields["message"].lower())) for row in rows}
    assert len(normal) == len(rows) >= 2_500
    assert {row.gold for row in rows} == set(INTENTS)
    assert max(Counter(row.gold for row in rows).values()) < 0.2 * len(rows)
    assert all(row.fields["message"].isascii() for row in rows)


def test_the_splits_are_those_of_the_stable_hash(rows: list[Row]) -> None:
    counts = Counter(row.split for row in rows)
    assert counts["test"] >= 300
    assert counts["validation"] >= 200
    assert all(row.split == split_of(row.id, test_share=0.145, validation_share=0.087) for row in rows)


def test_every_intent_stands_in_every_split_and_style(rows: list[Row]) -> None:
    assert min(Counter((row.gold, row.split) for row in rows).values()) >= 15
    assert len({(row.gold, row.split) for row in rows}) == 30
    assert min(Counter((row.gold, row.fields["style"]) for row in rows).values()) >= 20


def test_no_two_messages_are_near_duplicates(rows: list[Row]) -> None:
    assert find_duplicates(tickets(), rows, threshold=0.7).pairs == ()


def test_the_card_counts_what_is_there(rows: list[Row]) -> None:
    for intent in INTENTS:
        mine = [row for row in rows if row.gold == intent]
        splits, styles = Counter(row.split for row in mine), Counter(row.fields["style"] for row in mine)
        counts = [splits[split] for split in ("train", "validation", "test")]
        counts += [styles[style] for style in ("direct", "indirect", "two_topics", "typos", "negation")]
        assert f"| {intent} | {' | '.join(map(str, [*counts, len(mine)]))} |" in CARD


def test_a_keyword_rule_scores_under_75_percent_and_the_card_says_what(rows: list[Row]) -> None:
    test = [row for row in rows if row.split == "test"]
    rule = accuracy(test, [keyword_rule(row.fields["message"]) for row in test])
    assert 0.5 < rule < 0.75
    assert f"weighed by hand | {rule:.1%} |" in CARD


def test_a_bag_of_words_scores_what_the_card_says(rows: list[Row]) -> None:
    train, test = ([row for row in rows if row.split == split] for split in ("train", "test"))
    bag = BagOfWords.fit([row.fields["message"] for row in train], [str(row.gold) for row in train])
    figure = re.search(r"known labels \| ([0-9.]+)% \|", CARD)
    assert figure is not None
    assert accuracy(test, bag.predict([row.fields["message"] for row in test])) == pytest.approx(float(figure[1]) / 100, abs=0.006)
