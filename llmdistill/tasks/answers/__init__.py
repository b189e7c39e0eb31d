"""The kinds of answers."""

from llmdistill.tasks.answers.answer import Answer
from llmdistill.tasks.answers.choice import Choice
from llmdistill.tasks.answers.equation import Equation
from llmdistill.tasks.answers.free_text import FreeText
from llmdistill.tasks.answers.number import Number

__all__ = ["Answer", "Choice", "Equation", "FreeText", "Number"]
