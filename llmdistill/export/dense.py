"""What other programs can take: a dense student of a stock class. Everything else is refused before any work, with the reason and what to do instead.

Other programs know an architecture with one size for all layers and one matrix for each linear. Low rank, our int8 (whose inputs are quantized token by
token), 4 bits and so on are modules of ours: such a student is served by `llmdistill serve`, or by vLLM where serve/vllm_llama.py knows it. The programs bring
quantizations of their own, which are an option of the export.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdistill.models.exit_settings import KEY as EXITS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "llmdistill_"
"""Of the model types of our classes (models/structured_config.py)."""


def check(folder: Path, out: Path, program: str, model_types: Sequence[str], *, leave_exits: bool) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The checkpoint's config and tokenizer, or ValueError with every reason, as far as it shows in config.json, why the program cannot have it."""
    if out.exists():
        raise ValueError(f"{out} exists already: name one that does not")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    refuse(folder, program, [*_because_of_class(config, model_types), *_because_of_modules(config), *_because_of_exits(config, leave_exits)])
    from transformers import AutoConfig, AutoTokenizer

    return AutoConfig.from_pretrained(str(folder), local_files_only=True), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def refuse(folder: Path, program: str, reasons: Sequence[str]) -> None:
    """Raise where there is a reason."""
    if reasons:
        raise ValueError(f"{folder} cannot be exported to {program}: {'; and '.join(reasons)}")


def load_dense(folder: Path) -> PreTrainedModel:
    """The student in float32 as a model of the stock class, without exits."""
    import torch

    from llmdistill.models import checkpoint
    from llmdistill.models.structured import STOCK_AND_STRUCTURED
    from llmdistill.models.t5 import saved_tie

    model, tokenizer = checkpoint.load(folder, dtype=torch.float32)
    stock_classes = [stock for stock, _ in STOCK_AND_STRUCTURED]
    if type(model) not in stock_classes:
        _make_stock(model)
        with tempfile.TemporaryDirectory() as plain:
            checkpoint.save(model, tokenizer, Path(plain), lineage=[], card="")
            model, _ = checkpoint.load(Path(plain))
    assert type(model) in stock_classes, type(model)
    model.config.tie_word_embeddings = saved_tie(model)  # T5's config has set it to True meanwhile, and others read from it whether outputs are scaled
    return model


def because_of_positions(config: Any, known: Sequence[str]) -> list[str]:
    """Why a causal model's rotary positions will not do."""
    kind = config.rope_parameters["rope_type"]
    return [] if kind in known else [f"its rotary positions are of type {kind!r}, and those that come out right are {', '.join(known)}"]


def because_of_activation(config: Any) -> list[str]:
    """Why a causal model's feed-forward will not do."""
    return [] if config.hidden_act in ("silu", "swish") else [f"its feed-forward has the activation {config.hidden_act!r}, and what can be written is silu"]


def _because_of_class(config: Mapping[str, Any], model_types: Sequence[str]) -> list[str]:
    model_type = str(config.get("model_type")).removeprefix(PREFIX)
    return [] if model_type in model_types else [f"it is of type {model_type!r}, and what can be written is {', '.join(model_types)}"]


def _because_of_modules(config: Mapping[str, Any]) -> list[str]:
    reasons = []
    kinds = Counter(module["kind"] for path, module in (config.get("structure") or {}).items() if not path.startswith(f"{EXITS}."))
    if kinds:
        listed = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        reasons.append(f"it has modules that are llmdistill's own ({listed}): export the checkpoint from before they came, or use `llmdistill serve`")
    if config.get("sizes"):
        reasons.append("its layers have sizes that no stock config can say: extract a sub-network whose layers are alike, or use `llmdistill serve`")
    if config.get("elastic"):
        reasons.append("it is elastic: take out a sub-network with `llmdistill extract` (`--subnet largest` is the whole) and export that")
    return reasons


def _because_of_exits(config: Mapping[str, Any], leave_exits: bool) -> list[str]:
    if leave_exits or not config.get(EXITS):
        return []
    return ["it has early exits, which would stay behind: write ?leave_exits=true after the format to export the rest, or use `llmdistill serve`"]


def _make_stock(model: Any) -> None:
    """Take away what keeps a dense model from being saved as a stock one: exits, and one tensor in places where the stock class has two."""
    from torch import nn

    from llmdistill.models.structure import ties_of

    if getattr(model.config, EXITS, None):
        del model.exits
        setattr(model.config, EXITS, None)
    for name in ties_of(model):
        if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            path, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(path), attribute, nn.Parameter(model.get_parameter(name).detach().clone()))
