"""vLLM's entry point (`vllm.general_plugins` in pyproject.toml): by it `vllm serve CHECKPOINT` knows low-rank and int8 students of the Llama and Qwen2 class.

vLLM calls it in each of its processes before it reads a config. It reads configs by transformers, which knows our model types as soon as llmdistill is
imported (models/register.py); the class is named by a string, so that it is imported only for a checkpoint that needs it. A dense student is a stock
folder and needs none of this.
"""

from __future__ import annotations

ARCHITECTURES = ("StructuredLlamaForCausalLM", "StructuredQwen2ForCausalLM")
MODEL_CLASS = "llmdistill.serve.vllm_model:StructuredCausalLM"


def register() -> None:
    """Tell vLLM of our classes."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports] - in an environment of its own

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, MODEL_CLASS)
