"""Which process of a launch this is, told from the environment alone."""

import pytest

from llmdistill.core import processes

LAUNCHERS = {
    "torchrun": {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"},
    "accelerate, several": {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500", "ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_VERSION": "2"},
    "mpirun": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processes._RANK + processes._NUM_PROCESSES + ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # a setting of the user's, who has started no launcher
    assert (processes.rank(), processes.num_processes(), processes.is_launched()) == (0, 1, False)
    assert processes.environment_without_launcher()["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_with_one(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    assert (processes.rank(), processes.num_processes(), processes.is_launched()) == (1, 2, True)
    left = processes.environment_without_launcher()
    assert left["HOME"] == "/home/user"
    assert not left.keys() & LAUNCHERS[launcher].keys()


@pytest.mark.parametrize("environment", [{"ACCELERATE_MIXED_PRECISION": "no"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_is_a_launch_too(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (processes.rank(), processes.num_processes(), processes.is_launched()) == (0, 1, True)


def test_launches_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for port in ("29500", "29501"):
        monkeypatch.setenv("MASTER_PORT", port)
        names.add(processes.launch_id())
    assert len(names) == 2
