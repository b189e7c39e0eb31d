"""manifest.json: what a finished folder says about how it came to be."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmdistill.core.artifacts import Artifact
from llmdistill.core.stage import JsonScalar, Stage, upstream

LIBRARIES = ("llmdistill", "torch", "transformers", "tokenizers", "datasets", "peft", "accelerate", "safetensors", "numpy", "vllm", "openai")


def write_manifest(folder: Path, stage: Stage[Artifact], figures: Mapping[str, JsonScalar], *, seconds: float, is_resumed: bool) -> None:
    """Write the manifest whole or not at all."""
    manifest = {
        "stage": stage.name,
        "key": stage.key,
        "settings": describe(stage),
        "upstream": [above.key for above in upstream(stage)],
        "git_commit": _git_commit(),
        "versions": _versions(),
        "finished_unix_s": round(time.time(), 3),
        "seconds": round(seconds, 3),
        "resumed": is_resumed,
        **_peak_memory_bytes(),
        "figures": dict(figures),
    }
    temporary = folder / "manifest.json.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    temporary.rename(folder / "manifest.json")


def describe(value: Any) -> Any:
    """A setting as JSON for people: a stage upstream by its key, a path by its name, a dataclass by its fields (those for speed too)."""
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (tuple, list)):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"type": type(value).__qualname__} | {name: item.key if isinstance(item, Stage) else describe(item) for name, item in fields.items()}
    return str(value)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_commit() -> str | None:
    """The commit of the folder that the run was started in; None where that is no repository."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _peak_memory_bytes() -> dict[str, int]:
    """Of the largest process of this stage; on the accelerator too, where the stage used one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    memory = {"peak_memory_bytes": peak * unit}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        memory["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return memory
