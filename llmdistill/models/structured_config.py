"""The configs of models with a structure: the stock config, and beside it `structure` and `ties` (see structure.py), `sizes` (resized.py) and `exits`
(exit_settings.py).

Separate model types, so that stock transformers says that it does not know them and never loads half of one. A config class is all that is registered up
front, since it costs no torch; the first config that is made brings its model class along.
"""

from __future__ import annotations

from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.t5.configuration_t5 import T5Config


class StructuredT5Config(T5Config):
    """T5 with replaced modules."""

    model_type = "llmdistill_t5"
    structure: dict[str, dict[str, Any]] | None = None
    ties: dict[str, str] | None = None
    sizes: dict[str, dict[str, list[int]]] | None = None
    exits: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _register_models()


class StructuredLlamaConfig(LlamaConfig):
    """Llama with replaced modules."""

    model_type = "llmdistill_llama"
    structure: dict[str, dict[str, Any]] | None = None
    ties: dict[str, str] | None = None
    sizes: dict[str, dict[str, list[int]]] | None = None
    exits: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _register_models()


class StructuredQwen2Config(Qwen2Config):
    """Qwen2 with replaced modules."""

    model_type = "llmdistill_qwen2"
    structure: dict[str, dict[str, Any]] | None = None
    ties: dict[str, str] | None = None
    sizes: dict[str, dict[str, list[int]]] | None = None
    exits: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _register_models()


CONFIGS = (StructuredT5Config, StructuredLlamaConfig, StructuredQwen2Config)


def _register_models() -> None:
    from llmdistill.models.structured import register_models

    register_models()
