"""What `llmdistill export --to` chooses from; each writes a file or folder that must not exist yet, whole or not at all.

No torch at import: these are options of a command.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias


class Numbers(enum.Enum):
    """In what a converted model's matrices are stored; the value is CTranslate2's name for it."""

    F32 = "float32"
    F16 = "float16"
    BF16 = "bfloat16"
    INT8 = "int8"


class Blocks(enum.Enum):
    """In what a GGUF's matrices are stored; the name is GGML's. Norms and biases are F32 in all of them."""

    F32 = enum.auto()
    F16 = enum.auto()
    BF16 = enum.auto()
    Q8_0 = enum.auto()
    """8 bits, with a scale for each 32 inputs."""


@dataclass(frozen=True, kw_only=True)
class Rationales:
    """A pipeline's rationales as a .jsonl or .parquet file, or a folder for a Hugging Face dataset."""

    kind: ClassVar[str] = "rationales"
    source_file: ClassVar[str] = "rationales.jsonl"
    """What the folder that is exported has."""

    def write(self, folder: Path, out: Path) -> None:
        from llmdistill.core.artifacts import Rationales as Artifact
        from llmdistill.teach.rationale_files import export_rationales

        export_rationales(Artifact(folder).rows(), out)


@dataclass(frozen=True, kw_only=True)
class CTranslate2:
    """A dense T5, Llama or Qwen2 as a folder for CTranslate2, with its tokenizer.

    leave_exits: of a student with early exits write the rest.
    """

    kind: ClassVar[str] = "ctranslate2"
    source_file: ClassVar[str] = "config.json"
    numbers: Numbers = Numbers.F32
    leave_exits: bool = False

    def write(self, folder: Path, out: Path) -> None:
        from llmdistill.export.ctranslate2_folder import write

        write(self, folder, out)


@dataclass(frozen=True, kw_only=True)
class GGUF:
    """A dense Llama or Qwen2 with a byte-level tokenizer as a file for llama.cpp.

    leave_exits: of a student with early exits write the rest.
    """

    kind: ClassVar[str] = "gguf"
    source_file: ClassVar[str] = "config.json"
    numbers: Blocks = Blocks.F32
    leave_exits: bool = False

    def write(self, folder: Path, out: Path) -> None:
        from llmdistill.export.gguf_file import write

        write(self, folder, out)


ExportFormat: TypeAlias = Rationales | CTranslate2 | GGUF
