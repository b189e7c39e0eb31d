"""Which process of a launch this is, read from the environment that the launchers set."""

from __future__ import annotations

import os

# What accelerate.state reads: torchrun's names, then those of three makes of MPI.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_NUM_PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "ROLE_", "GROUP_")
_LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """Number of this process in its launch; 0 where there is no launcher."""
    return _first_number(_RANK, 0)


def num_processes() -> int:
    """Processes in this launch; 1 where there is no launcher."""
    return _first_number(_NUM_PROCESSES, 1)


def is_launched() -> bool:
    """Whether `accelerate launch` (or torchrun, or mpirun) started this process."""
    return any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", *_NUM_PROCESSES))


def launch_id() -> str:
    """A name that all processes of one launch share, and no other launch that runs at the same time has."""
    return f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"


def environment_without_launcher() -> dict[str, str]:
    """This environment without what a launcher added to it, for a process that is none of its ranks.

    Where there was no launcher these names are the user's own settings for accelerate, and stay.
    """
    if not is_launched():
        return dict(os.environ)
    return {name: value for name, value in os.environ.items() if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)}


def _first_number(names: tuple[str, ...], default: int) -> int:
    for name in names:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return default
