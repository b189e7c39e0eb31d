"""A dense student as a folder for CTranslate2, by CTranslate2's own converter.

The converter gets our model and not the folder, for three reasons, seen with CTranslate2 4.8 and transformers 5.24: it takes every T5 for one with a tied head
and scales the logits of all (models/t5.py says why); of a Llama whose tokenizer has no start token it writes a config.json that cannot be read; and a student
that leaves its exits behind is in no folder. Refused is what came out otherwise there: rotary positions of type llama3 (logits of 4.6 were off by 0.3 after
400 tokens), and heads that do not make up the model's width. The tokenizer is written beside the model.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdistill.export.dense import because_of_activation, because_of_positions, check, load_dense, refuse
from llmdistill.export.whole import whole

if TYPE_CHECKING:
    from llmdistill.export.formats import CTranslate2

PROGRAM = "CTranslate2"
MODEL_TYPES = ("t5", "llama", "qwen2")
POSITIONS = ("default", "linear")


def write(settings: CTranslate2, folder: Path, out: Path) -> None:
    """Convert the checkpoint in `folder` to the new folder `out`."""
    config, tokenizer = check(folder, out, PROGRAM, MODEL_TYPES, leave_exits=settings.leave_exits)
    refuse(folder, PROGRAM, _reasons(config))
    converter, model = _converter(), load_dense(folder)
    with whole(out) as writing, tempfile.TemporaryDirectory() as config_alone:
        model.config.save_pretrained(config_alone)
        converter(config_alone, model, tokenizer).convert(str(writing), quantization=settings.numbers.value)
        tokenizer.save_pretrained(writing)


def _reasons(config: Any) -> list[str]:
    if config.is_encoder_decoder:
        return []
    reasons = because_of_positions(config, POSITIONS) + because_of_activation(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width * config.num_attention_heads != config.hidden_size:
        reasons.append(f"its {config.num_attention_heads} heads of width {width} do not make up the model width {config.hidden_size}: use gguf")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        reasons.append("it has sliding-window attention")
    return reasons


def _converter() -> Any:
    try:
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        raise ValueError("the format ctranslate2 needs the package of that name: pip install 'llmdistill[export]'") from None

    class Converter(TransformersConverter):
        """Of a model that is loaded; only the config is read from a folder."""

        def __init__(self, folder: str, model: Any, tokenizer: Any) -> None:
            super().__init__(folder)
            self.model, self.tokenizer = model, copy.deepcopy(tokenizer)
            if tokenizer.bos_token is None:
                self.tokenizer.bos_token = tokenizer.pad_token or tokenizer.eos_token  # what the converter itself takes for a Qwen2 without one

        def load_model(self, model_class: Any, model_name_or_path: str, **settings: Any) -> Any:
            return self.model

        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **settings: Any) -> Any:
            return self.tokenizer

    return Converter
