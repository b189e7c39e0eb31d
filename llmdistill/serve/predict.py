"""How a distilled student is asked: the text it reads for a row of the task, and the label in what it writes.

The distil stage writes this into config.json under `llmdistill`; it is plain data, so a server needs none of the code that trained the student:

    {"task": "tickets", "input_template": "{message}", "choices": ["cancel_order", ...], and the fields of llmdistill.losses.prompts}

A checkpoint without it is asked with the usual prefixes, by `input` only.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmdistill.losses.prompts import EXPLAIN, Prompts, prefixed
from llmdistill.serve.errors import ServeError
from llmdistill.tasks.answers.choice import Choice

SECTION = "llmdistill"


@dataclass(frozen=True, kw_only=True)
class TaskSection:
    """The task of a checkpoint, as its config.json tells it."""

    prompts: Prompts
    task: str = ""
    input_template: str = ""
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        texts = (self.task, self.input_template, self.prompts.suffix, *self.prompts.prefixes, *self.prompts.prefixes.values(), *self.choices)
        wrong = [text for text in texts if not isinstance(text, str)]
        if wrong:
            raise ValueError(f"config.json: {SECTION} has {wrong[0]!r} where text is expected")
        try:
            names = self.field_names
        except ValueError as error:
            raise ValueError(f"config.json: {SECTION}.input_template is {self.input_template!r}: {error}") from None
        for name in names:
            if not name.isidentifier():
                raise ValueError(f"config.json: {SECTION}.input_template names {name!r}; a field is a plain name, as in '{{message}}'")
        if self.choices:
            self.label("")  # says what is wrong with the choices, if anything is

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, is_encoder_decoder: bool) -> TaskSection:
        """Reads the section out of a config.json; all defaults when it is not there."""
        section = config.get(SECTION, {})
        if not isinstance(section, Mapping):
            raise ValueError(f"config.json: {SECTION} is {section!r}; expected an object")
        return cls(
            prompts=Prompts.from_config(section) if "prefixes" in section else prefixed(is_encoder_decoder=is_encoder_decoder),
            task=section.get("task", ""),
            input_template=section.get("input_template", ""),
            choices=tuple(section.get("choices") or ()),
        )

    @property
    def field_names(self) -> list[str]:
        """The fields of a row, in the order of the template."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.input_template) if name is not None]
        return list(dict.fromkeys(names))

    def text(self, fields: Mapping[str, str]) -> str:
        """A row's text; 400 when the fields are not exactly the task's."""
        if not self.input_template:
            raise ServeError(400, "this checkpoint does not say what fields its task has; give the student's text as 'input'", param="fields")
        missing = [name for name in self.field_names if name not in fields]
        unknown = [name for name in fields if name not in self.field_names]
        if missing or unknown:
            wrong = f"Missing field: '{missing[0]}'" if missing else f"Unknown field: '{unknown[0]}'"
            raise ServeError(400, f"{wrong}. The fields of the task are: {', '.join(self.field_names)}", param=f"fields.{(missing or unknown)[0]}")
        return self.input_template.format(**fields)

    def prompt(self, kind: str, text: str) -> str:
        """What the student reads to "predict" or to "explain"."""
        if kind not in self.prompts.prefixes:
            raise ServeError(400, f"this checkpoint was not trained to {kind}", param="rationale" if kind == EXPLAIN else None)
        return self.prompts.text(kind, text)

    def label(self, output: str) -> str | None:
        """The label in the student's output: itself, or the choice that it names; None when it names none."""
        return Choice(choices=self.choices).parse(output) if self.choices else output.strip() or None
