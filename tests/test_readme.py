"""The README's commands are real: every `make` target exists, and every `llmdistill` line is understood."""

import re
import shlex
from pathlib import Path

import pytest

from llmdistill import cli
from llmdistill.core.pipeline import find

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    ")]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)\s*make ([a-z-]+)", README, re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("llmdistill ")])
def test_commands_are_understood(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "run" and words[1] == "pipelines/mine.py":  # which `init` writes
        words = ["init"]
    if words[0] == "run":
        assert find(words[1]).is_file()
    options = [word for word in words if word.startswith("--") and word not in ("--help", "--dry-run")]
    with pytest.raises(SystemExit) as end:
        cli.main([*words[:2], "--help"] if words[0] == "run" else [words[0], "--help"])
    assert end.value.code in (0, None)
    shown = capsys.readouterr().out
    assert all(option in shown for option in options)


def test_every_shipped_pipeline_and_benchmark_is_told_of() -> None:
    for path in (ROOT / "pipelines").glob("*.py"):
        assert f"| `{path.stem}` |" in README
    for path in re.findall(r"benchmarks/\w+\.py", README):
        assert (ROOT / path).is_file()
