"""Writes the files of a new pipeline."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmdistill.starter.guess import AnswerKind, Guess, Said, guess
from llmdistill.tasks.duplicates import find_duplicates
from llmdistill.tasks.options import ChoiceRows, EquationRows, NumberRows, TextRows
from llmdistill.tasks.task import Row, Task

TEMPLATES = Path(__file__).parent / "templates"
MIN_EXAMPLES = 4
MAX_EXAMPLES = 10
MAX_EXAMPLE_CHARACTERS = 300

OPTIONS = {AnswerKind.CHOICES: ChoiceRows, AnswerKind.NUMBER: NumberRows, AnswerKind.EQUATION: EquationRows, AnswerKind.TEXT: TextRows}


def write(name: str, data: Path, said: Said, folder: Path) -> list[Path]:
    """Write pipelines/NAME.py, prompts/NAME.jinja and tasks/NAME.md under a folder; what is there already is not touched."""
    import jinja2

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"the pipeline's name is {name!r}; use small letters, digits and _, as in a Python module's name")
    files = {
        "pipeline.py.jinja": folder / "pipelines" / f"{name}.py",
        "prompt.jinja.jinja": folder / "prompts" / f"{name}.jinja",
        "card.md.jinja": folder / "tasks" / f"{name}.md",
    }
    for path in files.values():
        if path.exists():
            raise ValueError(f"{path} is there already; choose another name, or remove it first")
    found = guess(data, said)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["quoted"] = _quoted
    values = _values(name, found, folder)
    for template, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(environment.get_template(template).render(values), encoding="utf-8")
    return list(files.values())


def _values(name: str, found: Guess, folder: Path) -> dict[str, Any]:
    task = _task(found)
    rows = task.rows()
    data = found.data.resolve()
    root = folder.resolve()
    return {
        "name": name,
        "guess": found,
        "option": OPTIONS[found.answer].__name__,
        "rows_path": f"FOLDER / {_quoted(data.relative_to(root).as_posix())}" if data.is_relative_to(root) else f"Path({_quoted(str(data))})",
        "input_template": task.input_template,
        "examples": list(_examples(rows, found)),
        "splits": Counter(row.split for row in rows),
        "labels": Counter(row.gold for row in rows),
        "duplicates": find_duplicates(task, rows).lines(),
    }


def _task(found: Guess) -> Task:
    """The task that the pipeline will have, to read the rows with."""
    options: dict[str, Any] = {
        "rows": str(found.data),
        "input": "\n".join(f"{{{column}}}" for column in found.inputs),
        "gold": found.label,
        "id": found.id,
        "split": found.split,
    }
    if found.answer is AnswerKind.CHOICES:
        options["choices"] = found.choices
    return OPTIONS[found.answer](**options).task()


def _examples(rows: Sequence[Row], found: Guess) -> Iterator[dict[str, Any]]:
    """Train rows with a known label: one of each label, and a few in any case."""
    labelled = [row for row in rows if row.split == "train" and row.gold is not None]
    first_of_label = list({row.gold: row for row in reversed(labelled)}.values())[:MAX_EXAMPLES]
    chosen = first_of_label if found.answer is AnswerKind.CHOICES else []
    others = [row for row in labelled if row not in chosen]
    for row in chosen + others[: max(0, MIN_EXAMPLES - len(chosen))]:
        yield {"fields": {column: _one_line(row.fields[column]) for column in found.inputs}, "gold": row.gold}


def _quoted(text: str) -> str:
    """As Python source."""
    return json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    """Short enough for an example, and text to Jinja whatever is in it."""
    text = " ".join(text.split())
    text = text if len(text) <= MAX_EXAMPLE_CHARACTERS else text[: MAX_EXAMPLE_CHARACTERS - 3] + "..."
    return re.sub(r"\{(?=[{%#])", "{{ '{' }}", text)
