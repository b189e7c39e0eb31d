"""Structured causal students in vLLM: what is refused, how tensors find their places, and the tokens of vLLM itself where it is installed."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llmdistill.decode.engine import Decoding, Engine
from llmdistill.models import checkpoint
from llmdistill.models.int8_embedding import Int8Embedding
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.low_rank_embedding import LowRankEmbedding
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.resized import resize
from llmdistill.models.structured_config import StructuredLlamaConfig
from llmdistill.models.tokenizer import train_tokenizer
from llmdistill.serve.vllm_plugin import MODEL_CLASS, register
from llmdistill.serve.vllm_refusals import refuse
from llmdistill.serve.vllm_weights import fill

SHAPE: dict[str, Any] = {
    "vocab_size": 270,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
PROMPTS = [[5, 9, 31, 7, 8, 22], [40], [17, 4, 33, 2, 11, 10, 9, 8, 50, 260, 100, 30, 77, 41, 12, 13, 14]]


def llama(**settings: Any) -> Any:
    return wandering(LlamaForCausalLM(LlamaConfig(**SHAPE | settings)))


def qwen2(**settings: Any) -> Any:
    return wandering(Qwen2ForCausalLM(Qwen2Config(**SHAPE | settings)))


def wandering(model: Any) -> Any:
    """With random norms and biases; as initialised, a model repeats one token for ever."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model.eval()


def low_rank(model: Any, *names: str, rank: int = 24) -> Any:
    """Linears of these names factorised at random, in all layers."""
    for path, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and path.rpartition(".")[2] in names:
            module = LowRankLinear(linear.in_features, linear.out_features, rank, bias=linear.bias is not None)
            for parameter in module.parameters():
                nn.init.normal_(parameter, 0.0, 0.2)
            model.set_submodule(path, module)
    return model


def shared_down(model: Any) -> Any:
    """As QSVD: q, k and v of a layer have one down-projection."""
    low_rank(model, "q_proj", "k_proj", "v_proj", rank=80)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.k_proj.down.weight = attention.v_proj.down.weight = attention.q_proj.down.weight
    return model


def int8(model: Any, *kept: str) -> Any:
    """Every linear that is left as integers, those with one matrix with one matrix again, and so embedding and head."""
    made: dict[int, Int8Linear] = {}
    for path, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and path.rpartition(".")[2] not in (*kept, "lm_head"):
            module = Int8Linear.from_linear(linear)
            first = made.setdefault(id(linear.weight), module)
            module.weight, module.scale_O = first.weight, first.scale_O
            model.set_submodule(path, module)
    embedding = Int8Embedding.from_embedding(model.model.embed_tokens)
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    model.lm_head = embedding.head() if is_tied else Int8Linear.from_linear(model.lm_head)
    model.model.embed_tokens = embedding
    return model


def low_rank_ends(model: Any) -> Any:
    """Embedding and head as one pair of factors, the table of tokens as integers."""
    embedding = LowRankEmbedding.from_factors(torch.randn(270, 32) * 0.3, torch.randn(32, 128) * 0.3)
    model.model.embed_tokens, model.lm_head = embedding, embedding.head()
    table = Int8Embedding.from_embedding(embedding.table)
    embedding.set_submodule("table", table)
    model.lm_head.up = table.head()  # pyright: ignore[reportAttributeAccessIssue]
    return model


def uneven(model: Any) -> Any:
    resize(model, {"decoder": {"heads": [4, 2], "ffn_widths": [96, 40]}})
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, 0.0, 0.2)
    return model


MODELS = {
    "llama low rank": lambda: low_rank(llama(attention_bias=True, mlp_bias=True), "q_proj", "v_proj", "up_proj", "down_proj"),
    "llama qsvd and int8": lambda: int8(shared_down(llama(tie_word_embeddings=True))),
    "qwen2 qsvd": lambda: shared_down(qwen2(tie_word_embeddings=True)),
    "qwen2 int8": lambda: int8(qwen2(), "k_proj"),
    "qwen2 low rank and int8": lambda: int8(low_rank(qwen2(), "o_proj", "gate_proj", "up_proj"), "down_proj"),
    "llama low-rank ends, uneven": lambda: low_rank_ends(uneven(llama())),
}


def saved(name: str, folder: Path) -> Any:
    """The model, written as a checkpoint too."""
    torch.manual_seed(0)
    model = MODELS[name]()
    tokenizer = train_tokenizer(["some text of a cat"], 270, lower_case=False, ends_every_text=False)
    checkpoint.save(model, tokenizer, folder, lineage=[], card="")
    return model


def structured(**settings: Any) -> StructuredLlamaConfig:
    values: dict[str, Any] = SHAPE | {"structure": {"lm_head": {"kind": "int8"}}} | settings
    return StructuredLlamaConfig(**values)


def allowed(config: Any, **how: Any) -> None:
    settings: dict[str, Any] = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "quantization": None} | how
    refuse(config, **settings)


@pytest.mark.parametrize(
    "settings, how, message",
    [
        (
            {"structure": {"a": {"kind": "int8"}, "b.q": {"kind": "int4"}, "c": {"kind": "tucker"}}},
            {},
            r"int4 \(as at b.q\), tucker \(as at c\).*llmdistill serve",
        ),
        ({"exits": {"layers": [1]}}, {}, "early exits"),
        ({"hidden_act": "gelu"}, {}, "'gelu'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, {}, "sliding-window"),
        ({}, {"tensor_parallel_size": 2}, "--tensor-parallel-size is 2.*--data-parallel-size 2"),
        ({}, {"pipeline_parallel_size": 3}, "--pipeline-parallel-size is 3"),
        ({}, {"quantization": "fp8"}, "'fp8'"),
    ],
)
def test_what_the_class_cannot_do_is_refused_by_name(settings: dict[str, Any], how: dict[str, Any], message: str) -> None:
    allowed(structured())
    with pytest.raises(ValueError, match=message):
        allowed(structured(**settings), **how)


def test_tensors_go_to_all_their_places_and_nowhere_else() -> None:
    one, two, joint = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(5, 3, dtype=torch.int8)
    places = [("a", one), ("b", two), ("c", joint[:2]), ("d", joint[2:])]
    file = {"a": torch.ones(2, 3), "c": torch.ones(2, 3, dtype=torch.int8), "d": torch.full((3, 3), 2, dtype=torch.int8)}
    fill(places, {"b": "a"}, file.items())
    assert torch.equal(one, two)
    assert joint[:, 0].tolist() == [1, 1, 2, 2, 2]
    for changed, message in (
        ({"e": torch.ones(1)}, "a tensor 'e' that its config.json does not speak of"),
        ({"b": torch.ones(2, 3)}, "a tensor 'b'"),
        ({"a": torch.ones(3, 2)}, r"a is torch.float32 of \(3, 2\)"),
        ({"d": torch.ones(3, 3)}, "by config.json it is torch.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            fill(places, {"b": "a"}, (file | changed).items())
    with pytest.raises(ValueError, match="lacks 1 tensors such as d"):
        fill(places, {"b": "a"}, list(file.items())[:2])


def test_the_entry_point_and_the_class_are_where_they_are_said_to_be() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"llmdistill": f"{register.__module__}:{register.__name__}"}
    module, _, name = MODEL_CLASS.partition(":")
    source = importlib.util.find_spec(module)
    assert source is not None
    assert f"class {name}(" in Path(str(source.origin)).read_text(encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name, is_compiled", [*((name, False) for name in MODELS), ("llama qsvd and int8", True)])
def test_vllm_gives_the_tokens_of_our_engine(name: str, is_compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an engine in this process starts sooner
    import vllm  # pyright: ignore[reportMissingImports] - in an environment of its own

    model = saved(name, tmp_path / "student")
    ours = [answer.tokens for answer in Engine(model).generate(PROMPTS, Decoding(max_new_tokens=20, stop_token_ids=()))]
    settings = {"dtype": "float32", "max_model_len": 128, "kv_cache_memory_bytes": 2**26, "enforce_eager": not is_compiled}
    engine = vllm.LLM(model=str(tmp_path / "student"), **settings)
    params = vllm.SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    theirs = [tuple(output.outputs[0].token_ids) for output in outputs]
    assert len({token for answer in ours for token in answer}) > 10
    assert theirs == ours
