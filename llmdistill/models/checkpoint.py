"""A checkpoint: one ordinary Hugging Face folder, whatever was done to the model.

    config.json  model.safetensors  generation_config.json  tokenizer files   what from_pretrained reads
    README.md                                                                 the model card
    lineage.json                                                              every technique applied, the first one first

A model whose modules are all stock is saved as a stock folder that needs nothing of ours. One with replaced modules is saved with its structure in
config.json (structure.py) under a model type of ours, and loads through transformers' Auto classes once llmdistill is imported. Either gives the same logits
after loading as before saving, bitwise in the same dtype. Saving first builds the model that loading would build, without memory, and compares: what could
not be loaded again is never written.

One exception to "bitwise" is transformers': T5's `wo` is held in float32 where the rest is loaded in float16.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from logging import Filter, LogRecord
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from llmdistill.models.exit_settings import read_exits
from llmdistill.models.exits import digest, keep_settings
from llmdistill.models.resized import sizes_of
from llmdistill.models.structure import dtype_of, structure_of, ties_of
from llmdistill.models.structured import STOCK_AND_STRUCTURED, refuse_partial
from llmdistill.models.t5 import protect_head, saved_tie

log = logging.getLogger(__name__)

CONFIG, WEIGHTS, CARD, LINEAGE = "config.json", "model.safetensors", "README.md", "lineage.json"


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, lineage: Sequence[Mapping[str, Any]], card: str) -> None:
    """Write the checkpoint. `lineage` is that of the checkpoint it came from and one entry more; `card` is the text of README.md."""
    _forget_other_calibration(model)
    state, built_again = _state(model), _built_again(model)
    _check_loads_again(built_again, state)
    _check_elastic(model)
    built_again.config.tie_word_embeddings = saved_tie(model)  # T5's config has set it to True meanwhile
    folder.mkdir(parents=True, exist_ok=True)
    built_again.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / LINEAGE).write_text(json.dumps(list(lineage), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(
    folder: Path, *, dtype: torch.dtype | Literal["stored"] = "stored", device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, ready to evaluate, and its tokenizer. Tensors whose dtype is part of their format (int8 weights) keep it in any `dtype`."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no {CONFIG}")
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    model, info = load_model(config, str(folder), dtype="auto" if dtype == "stored" else dtype, local_files_only=True)
    refuse_partial(info, folder)
    return model.to(device), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)  # pyright: ignore[reportArgumentType]


def load_model(config: PreTrainedConfig, name_or_path: str, *, dtype: torch.dtype | Literal["auto"], **where: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model that transformers finds there, encoder-decoder or causal by its config, and transformers' report on its tensors. Pickles are refused."""
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with _no_progress_bars(), _no_tie_warning():
        loaded: Any = auto_class.from_pretrained(name_or_path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **where)
    model, info = loaded
    protect_head(model)
    return model, info


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A stage has one bar, and it is not transformers'."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _no_tie_warning() -> Iterator[None]:
    """transformers sets `tie_word_embeddings` on every T5 it reads, and then warns where the file says otherwise; `protect_head` has seen to that (t5.py)."""
    logger = transformers_logging.get_logger("transformers.modeling_utils")

    class Keep(Filter):
        def filter(self, record: LogRecord) -> bool:
            return "specifies to tie shared.weight to lm_head.weight" not in record.getMessage()

    keep = Keep()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _built_again(model: PreTrainedModel) -> PreTrainedModel:
    """The model that loading would build, on the meta device: the stock class where all modules are stock, else the structured one."""
    for stock, structured in STOCK_AND_STRUCTURED:
        if type(model) in (stock, structured):
            break
    else:
        names = ", ".join(stock.__name__ for stock, _ in STOCK_AND_STRUCTURED)
        raise ValueError(f"a {type(model).__name__} cannot be saved as a checkpoint: use one of {names} (unwrap it first, and merge adapters into it)")
    settings = {
        name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "transformers_version", "structure", "ties", "sizes")
    }
    settings["dtype"] = dtype_of(model)
    settings["tie_word_embeddings"] = saved_tie(model)
    structure, ties, sizes = structure_of(model), ties_of(model), sizes_of(model)
    plain = _without_memory(stock, settings)
    if not structure and not sizes and read_exits(model.config) is None and ties.items() <= plain.all_tied_weights_keys.items():
        return plain
    return _without_memory(structured, settings | {"structure": structure, "ties": ties, "sizes": sizes})


def _without_memory(model_class: Any, settings: dict[str, Any]) -> PreTrainedModel:
    config = model_class.config_class(**settings | {"architectures": [model_class.__name__]})
    default = torch.get_default_dtype()
    torch.set_default_dtype(settings["dtype"])
    try:
        with torch.device("meta"):
            return model_class(config)
    finally:
        torch.set_default_dtype(default)


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor once, a tied one under its first name; those that are views of a larger storage are copied out."""
    ties = ties_of(model)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name not in ties}
    return {name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone() for name, tensor in state.items()}


def _check_loads_again(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Raise where the tensors to write are not those that the model built again would read."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys() - model.all_tied_weights_keys.keys())
    left_over = sorted(state.keys() - expected.keys())
    if missing or left_over:
        raise ValueError(
            f"the model cannot be loaded again: it lacks {missing[:5]} and has {left_over[:5]} where its config and structure say otherwise; "
            "merge adapters, and replace modules only by kinds that the structure knows"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, and config.json would give it {tuple(expected[name].shape)}: bring the config in line")
        if tensor.dtype != expected[name].dtype and model.config.dtype != torch.float16:  # in float16 transformers keeps some weights in float32
            raise ValueError(f"{name} is {tensor.dtype}, and loading would make it {expected[name].dtype}: cast the whole model to one dtype first")


def _forget_other_calibration(model: PreTrainedModel) -> None:
    """Thresholds are for the weights that they were calibrated for: a technique that changed these leaves exits without."""
    settings = read_exits(model.config)
    if settings is not None and settings.calibration is not None and settings.calibration.weights != digest(model):
        log.warning("the weights have changed since the thresholds of the exits were calibrated: calibrate again (they are left out of this checkpoint)")
        keep_settings(model, replace(settings, calibration=None))


def _check_elastic(model: PreTrainedModel) -> None:
    """Raise where modules were replaced after the model was made elastic: the config would speak of sub-networks that it has no more (elastic/kept.py)."""
    elastic = getattr(model.config, "elastic", None)
    if isinstance(elastic, dict) and elastic.get("structure", {}) != structure_of(model):
        raise ValueError(
            "the model is elastic, and modules were replaced after it was made so: its sub-networks are no more. Extract one first (`llmdistill extract`) and "
            "change that, or change the model first and make it elastic then"
        )
