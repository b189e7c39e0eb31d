"""Published completions: numbers and order are checked, and an error says where."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from llmdistill.teach.alignment import align
from llmdistill.teach.published import check_published, equation_by_published_rule, read_published

SVAMP = Path(__file__).parents[3] / "shared" / "data" / "svamp"
NAMES = ["Ann", "Bob", "Cyd", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jon"]
THINGS = ["apples", "stamps", "pencils", "tickets", "marbles", "cards", "books", "shells", "coins", "kites"]


def problems(num: int) -> tuple[list[str], list[str]]:
    """Questions, and rationales that speak of the same names and numbers."""
    chance = random.Random(0)
    texts, completions = [], []
    for _ in range(num):
        name, thing, a, b = chance.choice(NAMES), chance.choice(THINGS), chance.randrange(10, 999), chance.randrange(10, 999)
        texts.append(f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?")
        completions.append(f"{name} had {a} {thing}. With {b} more that is {a + b}. The answer is ({a}.0 + {b}).\n\nQ: Zoe has 3 zebras. A: 3")
    return texts, completions


def write(folder: Path, completions: list[str], size: int = 500, split: str = "train") -> Path:
    for number, start in enumerate(range(0, len(completions), size)):
        (folder / f"{split}_CoT_{number}.json").write_text(json.dumps(completions[start : start + size]))
    return folder


def check(folder: Path, texts: list[str], **options: float):
    return check_published(read_published(folder, "train"), texts, **{"run_on": ("Q:",), "max_misplaced_share": 0.0, **options})  # type: ignore[arg-type]


def test_files_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    completions = [f"completion {number}" for number in range(5_700)]
    files = read_published(write(tmp_path, completions), "train")
    assert [file.path.name for file in files] == [f"train_CoT_{number}.json" for number in range(12)]
    assert [text for file in files for text in file.completions] == completions
    assert read_published(tmp_path, "test") == []


def test_whole_files_in_order_pass(tmp_path: Path) -> None:
    texts, completions = problems(1_300)
    alignment = check(write(tmp_path, completions, size=1_000), texts)
    assert (alignment.num_completions, alignment.misplaced) == (1_300, ())
    assert alignment.num_in_place > 1_250


def drop(completions: list[str]) -> list[str]:
    return completions[:620] + completions[621:]


def add(completions: list[str]) -> list[str]:
    return [*completions[:300], "An extra one. The answer is (1).", *completions[300:]]


def swap(completions: list[str]) -> list[str]:
    return [*completions[:100], completions[700], *completions[101:700], completions[100], *completions[701:]]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c[:-1], r"800 rows but 799 completions \(train_CoT_0.json 500, train_CoT_1.json 299\).*it is the end that differs"),
        (drop, r"800 rows but 799 completions.*completion 120 of train_CoT_1.json .*stands at row 620 .*fits row 621 .*most belong 1 row later"),
        (add, r"800 rows but 801 completions.*completion 301 of train_CoT_0.json .*stands at row 301 .*fits row 300 .*most belong 1 row earlier"),
        (lambda c: c[1:] + c[:1], r"do not stand in the order.*completion 0 of train_CoT_0.json .*fits row 1 .*most belong 1 row later"),
        (lambda c: c[500:] + c[:500], r"do not stand in the order.*completion 0 of train_CoT_0.json .*fits row 500 "),
        (swap, r"do not stand in the order of the rows: 2 of 800.*completion 100 of train_CoT_0.json .*fits row 700 .*max_misplaced_share=0.0025"),
    ],
)
def test_a_wrong_number_or_order_says_where(tmp_path: Path, change: Callable[[list[str]], list[str]], message: str) -> None:
    texts, completions = problems(800)
    write(tmp_path, change(completions))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        check(tmp_path, texts)


def test_beside_the_point_is_allowed_when_said(tmp_path: Path) -> None:
    texts, completions = problems(800)
    completions[7] = completions[600]
    write(tmp_path, completions)
    with pytest.raises(ValueError, match="1 of 800"):
        check(tmp_path, texts)
    assert len(check(tmp_path, texts, max_misplaced_share=0.01).misplaced) == 1


def test_a_gap_an_odd_size_and_what_is_no_list_of_texts(tmp_path: Path) -> None:
    write(tmp_path, ["a"] * 1_200)
    (tmp_path / "train_CoT_1.json").write_text(json.dumps(["a"] * 499))
    with pytest.raises(ValueError, match=r"train_CoT_1.json holds 499 completions"):
        read_published(tmp_path, "train")
    (tmp_path / "train_CoT_1.json").unlink()
    with pytest.raises(ValueError, match=r"train_CoT_2.json but no train_CoT_1.json"):
        read_published(tmp_path, "train")
    for text, message in (("{", "is not JSON"), ('{"a": 1}', "holds a dict"), ('["a", 7]', "entry 1: a int")):
        (tmp_path / "test_CoT_0.json").write_text(text)
        with pytest.raises(ValueError, match=f"test_CoT_0.json.*{message}"):
            read_published(tmp_path, "test")


@pytest.mark.skipif(not SVAMP.is_dir(), reason="SVAMP is not here")
def test_on_the_published_files_order_is_seen_and_exchanged_rows_are_found() -> None:
    texts = [json.loads(line)["input"] for line in (SVAMP / "svamp_train.json").read_text().splitlines()]
    files = read_published(SVAMP / "llm", "train")
    alignment = check_published(files, texts, run_on=("Q:",), max_misplaced_share=0.0)
    assert alignment.num_in_place > 0.9 * len(texts)
    completions = [text.split("Q:")[0] for file in files for text in file.completions]
    order = random.Random(0).sample(range(len(texts)), 200)
    exchanged = list(completions)
    for first, second in zip(order[::2], order[1::2], strict=True):
        exchanged[first], exchanged[second] = exchanged[second], exchanged[first]
    found = {place.index for place in align(texts, exchanged).misplaced}
    assert found <= set(order)
    assert len(found) >= 0.97 * len(order)


@pytest.mark.parametrize(
    "completion, equation",
    [
        ("They share 84. The answer is (84 / 2).\n\nQ: Next? A: 3. The answer is (3).", "(84 / 2)"),
        ("So 12 - 2 is left. The answer is (12 - 2) - 7.", "(12 - 2)"),
        ("The answer is ((17 + 3) and (6 - 2)).", "(6 - 2))"),
        ("The answer is 84 / 2.", ""),
        ("84 / 2 = 42.", ""),
        ("The answer is (1). The answer is (2).", ""),
        ("The answer is\n(1).", "(1)"),
        ("The answer is (1\n+ 2).", ""),
        ("Q: What? The answer is (1).", ""),
    ],
)
def test_the_published_rule_takes_what_stands_in_brackets(completion: str, equation: str) -> None:
    assert equation_by_published_rule(completion) == equation
