"""`import llmdistill` is cheap, and after it transformers loads our checkpoints, whichever of the two is imported first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import llmdistill
from llmdistill.models.checkpoint import save

NAMES = {"t5": "t5 v1.1", "llama": "llama tied", "qwen2": "qwen2"}

LOAD = """
import sys, torch
from pathlib import Path
folder = Path(sys.argv[1])
for name, auto_class in (("llama", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM), ("qwen2", AutoModelForCausalLM)):
    model = auto_class.from_pretrained(folder / name)
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
    assert type(model).__module__ == "llmdistill.models.structured", type(model)
    assert torch.equal(model(**inputs).logits, torch.load(folder / f"{name}.pt", weights_only=True)), name
assert not any("llmdistill" in type(finder).__module__ for finder in sys.meta_path), sys.meta_path
"""

OURS_FIRST = """
import sys, importlib.util
import llmdistill
assert "transformers" not in sys.modules and "torch" not in sys.modules
assert importlib.util.find_spec("transformers.models.auto.configuration_auto") is not None  # looking does not use the hook up
import peft  # imports transformers in its own order
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
"""

THEIRS_FIRST = """
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
import llmdistill
"""


@pytest.fixture
def folder(
    build_model: Callable[[str], PreTrainedModel], factorise: Callable[[PreTrainedModel], list[str]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Path:
    """A structured checkpoint of each architecture, and its logits."""
    ids_BL = torch.tensor([[5, 6, 7]])
    for name, model_name in NAMES.items():
        model = build_model(model_name)
        factorise(model)
        save(model, tokenizer, tmp_path / name, lineage=[], card="")
        inputs = {"input_ids": ids_BL} | ({"decoder_input_ids": ids_BL} if name == "t5" else {})
        torch.save(model(**inputs).logits.detach(), tmp_path / f"{name}.pt")
    return tmp_path


def run(code: str, *arguments: str) -> None:
    assert llmdistill.__file__ is not None
    path = os.pathsep.join([str(Path(llmdistill.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", [OURS_FIRST, THEIRS_FIRST], ids=["ours first", "theirs first"])
def test_checkpoints_load_in_a_fresh_process(first: str, folder: Path) -> None:
    run(first + LOAD, str(folder))


def test_what_pipelines_import_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    run(f"import sys, llmdistill.models.student; heavy = [name for name in {heavy} if name in sys.modules]; assert not heavy, heavy")
