"""No test reads or writes the user's cache or runs, asks a model hub, or takes more than one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest

# A machine that is busy is no failure.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], database=None)
hypothesis.settings.load_profile("busy")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("llmdistill")
    monkeypatch.setenv("LLMDISTILL_CACHE", str(folder / "cache"))
    monkeypatch.setenv("LLMDISTILL_RUNS", str(folder / "runs"))
