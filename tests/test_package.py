"""What `pip install` brings: a wheel is built, unpacked and used from an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="hatchling, of the test extra, is not installed")

ROOT = Path(__file__).parents[1]
NOT_IN_THE_PACKAGE = {"__pycache__"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the module path, as pip would fill it."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_every_file_of_the_package_and_every_pipeline_and_prompt_is_in_the_wheel(installed: Path) -> None:
    missing = []
    for folder, place in (
        (ROOT / "llmdistill", "llmdistill"),
        (ROOT / "pipelines", "llmdistill/shipped/pipelines"),
        (ROOT / "prompts", "llmdistill/shipped/prompts"),
    ):
        for path in folder.rglob("*"):
            if path.is_file() and not NOT_IN_THE_PACKAGE & set(path.parts) and not (installed / place / path.relative_to(folder)).is_file():
                missing.append(str(path.relative_to(ROOT)))
    assert not missing


def test_the_quickstart_is_planned_from_an_empty_folder_and_has_the_keys_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    plans = []
    for place, folder in ((installed, tmp_path), (ROOT, ROOT)):
        script = "import llmdistill, sys; print(llmdistill.__file__); from llmdistill.cli import main; main(['run', 'quickstart', '--dry-run'])"
        environment = os.environ | {"PYTHONPATH": str(place), "LLMDISTILL_RUNS": str(tmp_path / "runs")}
        printed = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
        file, _, plan = printed.partition("\n")
        assert Path(file).is_relative_to(place)
        plans.append(plan)
    assert plans[0] == plans[1]
    assert "num_completions_missing=0" in plans[0]
    assert not list(tmp_path.iterdir())
