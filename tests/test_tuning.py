"""Tuning: merged updates give the logits that they gave beside their weights, and weights that were one stay one."""

import copy
from typing import Any

import pytest
import torch
from tiny_training import VOCABULARY_SIZE, causal, t5
from torch import Tensor, nn

from llmdistill.models.low_rank_embedding import LowRankEmbedding
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.structure import structure_of, ties_of
from llmdistill.tuning import Full, LoRA, adapt, merge


def logits(model: Any) -> Tensor:
    ids_BL = torch.randint(3, VOCABULARY_SIZE, (3, 7), generator=torch.Generator().manual_seed(1))
    inputs: Any = {"input_ids": ids_BL} | ({"decoder_input_ids": ids_BL[:, :5]} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        return model.eval()(**inputs).logits


def low_rank(model: Any, path: str, rank: int) -> LowRankLinear:
    linear = model.get_submodule(path)
    left_OR, values_R, right_RI = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    module = LowRankLinear.from_factors(left_OR[:, :rank] * values_R[:rank], right_RI[:rank], linear.bias)
    model.set_submodule(path, module)
    return module


def shared_down() -> Any:
    """A Llama whose q, k and v share their down-projection, with a low-rank o, and an embedding of low rank that is the head too."""
    model: Any = causal()
    q, k, v = (low_rank(model, f"model.layers.0.self_attn.{name}_proj", 4) for name in "qkv")
    k.down.weight = v.down.weight = q.down.weight
    low_rank(model, "model.layers.0.self_attn.o_proj", 3)
    generator = torch.Generator().manual_seed(0)
    embedding = LowRankEmbedding.from_factors(*(torch.randn(size, dtype=torch.float64, generator=generator) for size in ((VOCABULARY_SIZE, 6), (6, 16))))
    model.set_submodule("model.embed_tokens", embedding)
    model.set_submodule("lm_head", embedding.head())
    return model


def move_updates(model: nn.Module) -> None:
    """Stands for training: every trainable number moves."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator) * 0.2)


@pytest.mark.parametrize("make", [t5, shared_down])
def test_merged_updates_give_the_same_logits(make: Any) -> None:
    model, tuning = make(), LoRA(rank=2)
    before, structure, ties, names = logits(model), structure_of(model), ties_of(model), [name for name, _ in model.named_parameters()]
    adapt(model, tuning, seed=0)
    assert torch.equal(logits(model), before), "updates begin at nothing"
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    move_updates(model)
    tuned = logits(model)
    merge(model, tuning)
    torch.testing.assert_close(logits(model), tuned, rtol=1e-6, atol=1e-6)
    assert (tuned - before).abs().max() > 0.01
    assert (structure_of(model), ties_of(model), [name for name, _ in model.named_parameters()]) == (structure, ties, names)


def test_one_weight_has_one_update_which_is_merged_once() -> None:
    model, tuning = shared_down(), LoRA(rank=2, modules=("q_proj", "k_proj", "v_proj"))
    attention = model.model.layers[0].self_attn
    before_RI = attention.q_proj.down.weight.detach().clone()
    adapt(model, tuning, seed=0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * (1 + 3), "one down-projection and three up-projections"
    assert attention.k_proj.down.lora_A.default.weight is attention.q_proj.down.lora_A.default.weight
    move_updates(model)
    layer = attention.q_proj.down
    update_RI = 16 * layer.lora_B.default.weight @ layer.lora_A.default.weight  # alpha 32 by rank 2
    merge(model, tuning)
    assert attention.q_proj.down.weight is attention.k_proj.down.weight is attention.v_proj.down.weight
    torch.testing.assert_close(attention.q_proj.down.weight, before_RI + update_RI)


def test_the_head_is_left_alone_unless_it_is_named() -> None:
    for make in (t5, shared_down):
        model = make()
        adapt(model, LoRA(rank=2), seed=0)
        assert not any(name.startswith("lm_head") and parameter.requires_grad for name, parameter in model.named_parameters())
    model = t5()
    adapt(model, LoRA(rank=2, modules=("lm_head",)), seed=0)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "lm_head.lora_A.default.weight",
        "lm_head.lora_B.default.weight",
    }


def test_the_same_seed_gives_the_same_updates() -> None:
    first, second, other = t5(), t5(), t5()
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        adapt(model, LoRA(), seed=seed)
    changed = [name for name, tensor in first.state_dict().items() if not torch.equal(tensor, other.state_dict()[name])]
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert changed
    assert all("lora_A" in name for name in changed)


def test_full_changes_nothing() -> None:
    model: Any = t5()
    before = copy.deepcopy(model.state_dict())
    adapt(model, Full(), seed=0)
    merge(model, Full())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_updates_that_would_part_a_weight_are_refused() -> None:
    for modules, message in (
        (
            ("q_proj",),
            r"update model.layers.0.self_attn.q_proj.down, whose weight is model.layers.0.self_attn.k_proj.down.weight, .*v_proj.down.weight as well",
        ),
        (("lm_head",), r"update lm_head.down, whose weight is model.embed_tokens.project_RD as well"),
        (("q_proj", "query"), r"LoRA.modules has 'query', and no linear has that name; there are down, down_proj, gate_proj, k_proj, lm_head, o_proj"),
    ):
        with pytest.raises(ValueError, match=message):
            adapt(shared_down(), LoRA(modules=modules), seed=0)
