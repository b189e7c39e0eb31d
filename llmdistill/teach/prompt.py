"""A few-shot chain-of-thought prompt: a Jinja template of text only, rendered with the fields of a row.

The template says by example how a completion ends (`RATIONALE The answer is (LABEL).`), so that one parser reads every task's completions
(Distilling step-by-step, Hsieh et al. 2023, section 3.1). Its identity is the template's text, the marker and the stop strings, never the path:
the same prompt in another folder asks the teacher nothing again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A template file, the words before the answer, and the strings that end a completion.

    path: the Jinja template; every variable in it is a field of the task's rows.
    answer_marker: what stands between the rationale and the answer.
    stop: the teacher stops before the first of these, so that it does not run on into an invented next question.
    """

    path: Path
    answer_marker: str = "The answer is"
    stop: tuple[str, ...] = ("\n",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not self.answer_marker.strip():
            raise ValueError("Prompt.answer_marker is empty: give the words that stand before the answer, such as 'The answer is'")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"Prompt.stop is {self.stop!r}: give a tuple of strings that are not empty, such as ('\\n',)")

    @cached_property
    def text(self) -> str:
        """The template's text, read once."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot read the prompt template {str(self.path)!r} ({error.strerror}): give the path of a Jinja template") from error
        if self.answer_marker not in text:
            raise ValueError(
                f"the prompt template {str(self.path)!r} does not contain the answer marker {self.answer_marker!r}: "
                "end each example with it, or set Prompt.answer_marker to the words that the template uses"
            )
        return text

    @property
    def sha256(self) -> str:
        """Of the template's text, for manifests."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """The fields that the template needs, in alphabetical order."""
        from jinja2 import meta

        return tuple(sorted(meta.find_undeclared_variables(self._template.environment.parse(self.text))))

    def render(self, fields: Mapping[str, str]) -> str:
        """The text that the teacher completes for a row with these fields."""
        missing = [name for name in self.variables if name not in fields]
        if missing:
            raise ValueError(
                f"the prompt template {str(self.path)!r} uses {', '.join(missing)}, but the row has only {', '.join(sorted(fields))}: "
                "rename the variable in the template or the field in the task"
            )
        return self._template.render(dict(fields))

    def fingerprint(self) -> dict[str, object]:
        """What makes two prompts the same prompt."""
        return {"template": self.text, "answer_marker": self.answer_marker, "stop": list(self.stop)}

    @cached_property
    def _template(self) -> jinja2.Template:
        import jinja2

        try:
            return jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the prompt template {str(self.path)!r} is not valid Jinja, line {error.lineno}: {error.message}") from error
