"""What must not be lost where tokens leave early; a setting, so that neither torch nor numpy is loaded for it."""

import enum


class Quality(enum.Enum):
    """What must not be lost."""

    CORRECT = "correct"
    """Answers that are right, by the task's known ones."""
    SAME = "same"
    """The full student's answers."""
