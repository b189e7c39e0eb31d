"""The stock classes with a structure: what transformers' Auto classes build for a checkpoint of ours that is not plain.

Each is the stock class; after its own construction layers get the config's sizes, exits are added, the modules that it names are swapped in, and its ties take
the place of the stock ones. Loading is transformers' own (dtype, device_map, sharding and the rest work as usual), but strict: a tensor that is missing, left
over or of another shape is an error and never a random weight.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration

from llmdistill.models.exit_settings import ExitSettings
from llmdistill.models.exits import attach
from llmdistill.models.resized import resize, sizes_of
from llmdistill.models.structure import dtype_of, install, structure_of, ties_of
from llmdistill.models.structured_config import StructuredLlamaConfig, StructuredQwen2Config, StructuredT5Config


class _Structured(PreTrainedModel):
    """What the three classes below add to their stock classes."""

    _has_structure = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        resize(self, config.sizes or {})
        if config.exits is not None:
            attach(self, ExitSettings.from_json(config.exits))
        install(self, config.structure or {})
        self._has_structure = True
        self._replace_ties(config.ties or {})

    def _replace_ties(self, ties: dict[str, str]) -> None:
        for name in ties_of(self).keys() - ties.keys():  # the stock class tied it, this model does not
            path, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(path), attribute, nn.Parameter(self.get_parameter(name).detach().clone()))
        self._tied_weights_keys = dict(ties)
        self.all_tied_weights_keys = dict(ties)
        self.tie_weights(recompute_mapping=False)

    @property
    def dtype(self) -> torch.dtype:
        """In what the model computes; transformers takes the first floating-point tensor, which may be an int8 weight's scale."""
        return dtype_of(self)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """The stock ties while the stock class is being built, the config's from then on."""
        if self._has_structure:
            return dict(self.config.ties or {})
        return super().get_expanded_tied_weights_keys(all_submodels)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        refuse_partial(info, args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        self.config.structure = structure_of(self)
        self.config.ties = ties_of(self)
        self.config.sizes = sizes_of(self)
        super().save_pretrained(*args, **kwargs)


class StructuredT5ForConditionalGeneration(_Structured, T5ForConditionalGeneration):
    """T5 with replaced modules."""

    config_class = StructuredT5Config


class StructuredLlamaForCausalLM(_Structured, LlamaForCausalLM):
    """Llama with replaced modules."""

    config_class = StructuredLlamaConfig


class StructuredQwen2ForCausalLM(_Structured, Qwen2ForCausalLM):
    """Qwen2 with replaced modules."""

    config_class = StructuredQwen2Config


STOCK_AND_STRUCTURED = (
    (T5ForConditionalGeneration, StructuredT5ForConditionalGeneration),
    (LlamaForCausalLM, StructuredLlamaForCausalLM),
    (Qwen2ForCausalLM, StructuredQwen2ForCausalLM),
)
"""The architectures that students can have, each plain and with a structure."""


def config_classes() -> list[Any]:
    """The configs of all of them."""
    return [model_class.config_class for pair in STOCK_AND_STRUCTURED for model_class in pair]


@functools.cache
def register_models() -> None:
    """Tell transformers' Auto classes which model a structured config means."""
    AutoModelForSeq2SeqLM.register(StructuredT5Config, StructuredT5ForConditionalGeneration)
    AutoModelForCausalLM.register(StructuredLlamaConfig, StructuredLlamaForCausalLM)
    AutoModelForCausalLM.register(StructuredQwen2Config, StructuredQwen2ForCausalLM)


REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def refuse_partial(info: dict[str, Any], where: object) -> None:
    """Raise where transformers' loading report says that tensors and model do not match exactly."""
    problems = {name: sorted(map(str, info[name])) for name in REPORTED if info.get(name)}
    if problems:
        listed = "; ".join(f"{len(keys)} {name.replace('_', ' ')} such as {', '.join(keys[:5])}" for name, keys in problems.items())
        raise ValueError(f"the weights in {where} do not fit its config.json: {listed}. The folder is damaged or was written by something else: make it again")
