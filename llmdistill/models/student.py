"""The students that a pipeline can name: T5 or causal, built from scratch at a named size, or pretrained.

A student from scratch brings a tokenizer trained on the task's text (tokenizer.py) and starts with a loss close to ln(vocabulary): it is as unsure as it
should be, and the first steps are not spent on unlearning. What that takes differs between the architectures; t5.py says it for T5. Llama's stock
initialisation (0.02 everywhere) is fine at these widths.

Nothing here imports torch until `prepare`: students are options of pipelines.
"""

import contextlib
import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from llmdistill.models.source import ModelSource
from llmdistill.models.tokenizer import check_vocabulary_size, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class T5Form(enum.Enum):
    """T5 v1.0 has ReLU feed-forwards, v1.1 (and flan) gated GELU ones."""

    V1_0 = "v1.0"
    V1_1 = "v1.1"


class T5Size(enum.Enum):
    """Named sizes; the parameters are without the vocabulary's."""

    TINY = "tiny"
    """2 + 2 layers of width 128: 0.8 million."""
    MINI = "mini"
    """3 + 3 layers of width 192: 3 million."""
    DEEP = "deep"
    """12 + 12 layers of width 128: 5 million."""
    MIDI = "midi"
    """4 + 4 layers of width 256: 9 million."""
    SMALL = "small"
    """6 + 6 layers of width 512, the shape of T5-small: 44 million (57 million with gated feed-forwards)."""


T5_SHAPES: dict[T5Size, dict[str, int]] = {
    T5Size.TINY: {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 256, "num_layers": 2},
    T5Size.MINI: {"d_model": 192, "d_kv": 32, "num_heads": 6, "d_ff": 512, "num_layers": 3},
    T5Size.DEEP: {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 256, "num_layers": 12},
    T5Size.MIDI: {"d_model": 256, "d_kv": 32, "num_heads": 8, "d_ff": 1024, "num_layers": 4},
    T5Size.SMALL: {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 2048, "num_layers": 6},
}


class CausalSize(enum.Enum):
    """Named sizes; the parameters are without the vocabulary's."""

    TINY = "tiny"
    """4 layers of width 128: 0.7 million."""
    MINI = "mini"
    """6 layers of width 192: 2.4 million."""
    SMALL = "small"
    """30 layers of width 576, the shape of SmolLM2-135M: 106 million."""


CAUSAL_SHAPES: dict[CausalSize, dict[str, int]] = {
    CausalSize.TINY: {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 352, "num_hidden_layers": 4},
    CausalSize.MINI: {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 512, "num_hidden_layers": 6},
    CausalSize.SMALL: {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "num_hidden_layers": 30},
}


@dataclass(frozen=True, kw_only=True)
class ScratchT5:
    """A T5 built from scratch.

    vocabulary_size: the tokenizer has at most so many tokens; fewer where the text is short.
    tied_head: one matrix for embedding and head. T5 v1.1 has two; for a small student the vocabulary is much of its size.
    lower_case: fold capitals in all text, also in what the student writes.
    """

    kind: ClassVar[str] = "t5"
    size: T5Size = T5Size.TINY
    form: T5Form = T5Form.V1_1
    vocabulary_size: int = 4096
    tied_head: bool = False
    lower_case: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _check(self.vocabulary_size, self.dropout)

    def prepare(self, texts: Iterable[str], seed: int) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The model, initialised with this seed, and its tokenizer, trained on these texts."""
        from transformers import T5Config

        from llmdistill.models.t5 import new_t5

        tokenizer = train_tokenizer(_some(texts), self.vocabulary_size, lower_case=self.lower_case, ends_every_text=True)
        settings: dict[str, Any] = {
            **T5_SHAPES[self.size],
            "vocab_size": len(tokenizer),
            "feed_forward_proj": "relu" if self.form is T5Form.V1_0 else "gated-gelu",
            "dropout_rate": self.dropout,
            "tie_word_embeddings": self.tied_head,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "decoder_start_token_id": tokenizer.pad_token_id,
        }
        with _seeded(seed):
            return new_t5(T5Config(**settings)), tokenizer


@dataclass(frozen=True, kw_only=True)
class ScratchCausal:
    """A causal student of the Llama class, built from scratch. The fields are ScratchT5's."""

    kind: ClassVar[str] = "causal"
    size: CausalSize = CausalSize.TINY
    vocabulary_size: int = 4096
    tied_head: bool = True
    lower_case: bool = False
    max_tokens: int = 2048
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check(self.vocabulary_size, self.dropout)
        if self.max_tokens < 1:
            raise ValueError(f"ScratchCausal.max_tokens is {self.max_tokens}: prompt and answer together need at least 1")

    def prepare(self, texts: Iterable[str], seed: int) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The model, initialised with this seed, and its tokenizer, trained on these texts."""
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = train_tokenizer(_some(texts), self.vocabulary_size, lower_case=self.lower_case, ends_every_text=False)
        settings: dict[str, Any] = {
            **CAUSAL_SHAPES[self.size],
            "vocab_size": len(tokenizer),
            "max_position_embeddings": self.max_tokens,
            "attention_dropout": self.dropout,
            "tie_word_embeddings": self.tied_head,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        }
        with _seeded(seed):
            return LlamaForCausalLM(LlamaConfig(**settings)), tokenizer


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A student that is trained already: T5 (v1.0, v1.1, flan), or causal of the Llama or Qwen2 class; `source` as in source.py, or a checkpoint's folder."""

    kind: ClassVar[str] = "pretrained"
    source: str

    def __post_init__(self) -> None:
        ModelSource(self.source)

    def fingerprint(self) -> dict[str, str]:
        """The source's identity: where a file lies does not count."""
        return ModelSource(self.source).fingerprint()

    def prepare(self, texts: Iterable[str], seed: int) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The model in float32, and its own tokenizer. Nothing is random here and the texts are not read."""
        import torch

        from llmdistill.models.structured import config_classes

        source = ModelSource(self.source)
        known = sorted({config_class.model_type for config_class in config_classes()})
        if source.config.model_type not in known:
            raise ValueError(f"the model of {self.source!r} is of type {source.config.model_type!r}; a student is one of {', '.join(known)}")
        return source.load_model(torch.float32), source.load_tokenizer()


Student: TypeAlias = ScratchT5 | ScratchCausal | Pretrained
"""What a pipeline takes as its student."""


def _check(vocabulary_size: int, dropout: float) -> None:
    check_vocabulary_size(vocabulary_size)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}: it must be at least 0 and below 1")


def _some(texts: Iterable[str]) -> Iterator[str]:
    """The texts; at least one must have a character."""
    num_characters = 0
    for text in texts:
        num_characters += len(text)
        yield text
    if not num_characters:
        raise ValueError("there is no text to train the student's tokenizer on: the rows that it learns from are empty")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global generator at this seed within, and as it was afterwards: transformers' initialisation takes no other."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
