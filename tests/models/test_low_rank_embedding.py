"""Laws: rows are those of the factors' product, the tied head is the same matrix, and both are one after loading, in every architecture and in the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmdistill.decode.decoding import Decoding
from llmdistill.decode.engine import Engine
from llmdistill.models import checkpoint
from llmdistill.models.low_rank_embedding import LowRankEmbedding
from llmdistill.models.t5 import head_is_tied


def embedding(num: int, width: int, rank: int, dtype: torch.dtype = torch.float32) -> LowRankEmbedding:
    generator = torch.Generator().manual_seed(0)
    table, project = torch.randn(num, rank, generator=generator), torch.randn(rank, width, generator=generator)
    return LowRankEmbedding.from_factors(table.to(dtype), project.to(dtype))


def factorise_embedding(model: Any, rank: int = 3) -> LowRankEmbedding:
    """In the place of all embeddings, and of the head where it was tied."""
    low, is_tied = embedding(model.config.vocab_size, model.get_input_embeddings().weight.shape[1], rank, model.dtype), head_is_tied(model)
    for path in ("shared", "encoder.embed_tokens", "decoder.embed_tokens") if model.config.is_encoder_decoder else ("model.embed_tokens",):
        model.set_submodule(path, low)
    if is_tied:
        model.set_submodule("lm_head", low.head())
    return low


def test_rows_are_those_of_the_product() -> None:
    low = embedding(9, 5, 3)
    tokens_BL = torch.tensor([[0, 8], [4, 4]])
    torch.testing.assert_close(low(tokens_BL), nn.functional.embedding(tokens_BL, low.table.weight @ low.project_RD))
    assert low(torch.tensor([3])).shape == (1, 5)


def test_the_head_is_the_same_matrix_and_holds_no_numbers_of_its_own() -> None:
    low = embedding(9, 5, 3)
    head = low.head()
    hidden_BD = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head(hidden_BD), hidden_BD @ (low.table.weight @ low.project_RD).t())
    assert {id(parameter) for parameter in head.parameters()} == {id(parameter) for parameter in low.parameters()}
    with_bias = low.head(torch.arange(9.0))
    torch.testing.assert_close(with_bias(hidden_BD), head(hidden_BD) + torch.arange(9.0))


def test_takes_sizes_and_dtype_from_what_it_replaces() -> None:
    low = LowRankEmbedding.from_settings({"rank": 2}, nn.Embedding(9, 5, dtype=torch.bfloat16))
    assert (low.num_embeddings, low.embedding_dim, low.rank, low.weight.dtype) == (9, 5, 2, torch.bfloat16)
    assert low.settings() == {"rank": 2}


@pytest.mark.parametrize("rank", [0, 6])
def test_refuses_a_rank_that_no_matrix_of_its_size_has(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank is {rank}.* ranks 1 to 5"):
        LowRankEmbedding(9, 5, rank)


def test_refuses_what_is_not_its_own() -> None:
    with pytest.raises(ValueError, match="settings of a low_rank_embedding module"):
        LowRankEmbedding.from_settings({"rank": "2"}, nn.Embedding(9, 5))
    with pytest.raises(ValueError, match="replaces an embedding, and this is a Linear"):
        LowRankEmbedding.from_settings({"rank": 2}, nn.Linear(9, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_as_it_was_saved(
    model: PreTrainedModel, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, logits: Callable[[PreTrainedModel], torch.Tensor], tmp_path: Path
) -> None:
    any_model: Any = model.to(dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
    low = factorise_embedding(any_model)
    was_tied = any_model.lm_head.down.weight is low.project_RD if hasattr(any_model.lm_head, "down") else False
    before, num_before = logits(any_model), sum(parameter.numel() for parameter in any_model.parameters())
    checkpoint.save(any_model, tokenizer, tmp_path / "low", lineage=[], card="")
    loaded, _ = checkpoint.load(tmp_path / "low")
    again: Any = loaded
    assert torch.equal(logits(again), before)
    assert sum(parameter.numel() for parameter in again.parameters()) == num_before
    assert type(again.get_input_embeddings()) is LowRankEmbedding
    if was_tied:
        assert again.lm_head.up.weight is again.get_input_embeddings().table.weight
        assert again.lm_head.down.weight is again.get_input_embeddings().project_RD


def test_the_engine_and_generate_agree(model: PreTrainedModel) -> None:
    any_model: Any = model.double()
    low = factorise_embedding(any_model, rank=8)
    with torch.no_grad():
        low.table.weight.mul_(0.3)
    prompt = [5, 9, 2, 40, 17]
    with torch.inference_mode():
        made = any_model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, use_cache=False, eos_token_id=None)[0].tolist()
    expected = made[1:] if any_model.config.is_encoder_decoder else made[len(prompt) :]
    [row] = Engine(any_model).generate([prompt], Decoding(max_new_tokens=6, stop_token_ids=()))
    assert list(row.tokens) == expected
