"""Law: open gates leave the model bitwise as it is, shut ones leave the residual; what is not computed is what would have been multiplied by zero."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gated_models import with_gradients, with_random_gates
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from llmdistill.compress.slots import slots
from llmdistill.models.anatomy import stacks
from llmdistill.models.checkpoint import save
from llmdistill.models.feed_forward import replace_feed_forwards
from llmdistill.models.skipped_feed_forward import SkippedFeedForward
from llmdistill.models.skipping import Skipping, decided_by, skipped, straight_through

Build = Callable[[str], PreTrainedModel]
Logits = Callable[[PreTrainedModel], torch.Tensor]
BOTH = ("encoder", "decoder")


def gated(model: Any) -> Sequence[SkippedFeedForward]:
    return with_random_gates(replace_feed_forwards(model, SkippedFeedForward, BOTH))


def test_open_gates_are_no_gates(model: Any, logits: Logits) -> None:
    plain, plain_in_training = logits(model), with_gradients(model)
    modules = replace_feed_forwards(model, SkippedFeedForward, BOTH)
    assert len(modules) == sum(len(stack.layers) for stack in stacks(model))
    for module in modules:
        module.open_gate(0.9)
        assert module.gate.bias.softmax(-1)[1].item() == pytest.approx(0.9)
    assert torch.equal(logits(model), plain)
    assert torch.equal(with_gradients(model), plain_in_training)


def test_shut_gates_leave_the_residual(model: Any, logits: Logits) -> None:
    modules = replace_feed_forwards(model, SkippedFeedForward, BOTH)
    for module in modules:
        module.open_gate(0.1)
    shut = logits(model)
    for module in modules:
        nn.init.zeros_(module.out.weight)
        module.open_gate(0.9)
    assert torch.equal(logits(model), shut)


def test_what_is_skipped_is_what_would_be_multiplied_by_zero(model: Any, logits: Logits) -> None:
    gated(model)
    seen: list[torch.Tensor] = []

    def decide(module: Skipping, hidden_BLD: torch.Tensor) -> torch.Tensor:
        seen.append(straight_through(module.logits(hidden_BLD)))
        return seen[-1]

    with decided_by(model, decide):
        masked = logits(model)
    assert {value.item() for open_BL in seen for value in open_BL.unique()} == {0.0, 1.0}
    torch.testing.assert_close(logits(model), masked, rtol=1e-4, atol=1e-5)
    assert not any(module.decide for module in skipped(model).values())


def test_every_token_decides_by_itself(model: Any) -> None:
    """A row says the same alone as among others, and a token the same whatever comes after it."""
    gated(model)
    ids_BL = torch.randint(2, 96, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            many = model(input_ids=ids_BL, decoder_input_ids=ids_BL).logits
            one = model(input_ids=ids_BL[:1], decoder_input_ids=ids_BL[:1, :4]).logits
        else:
            many, one = model(input_ids=ids_BL).logits, model(input_ids=ids_BL[:1, :4]).logits
    torch.testing.assert_close(one, many[:1, :4], rtol=1e-4, atol=1e-5)


def test_it_loads_as_it_was(model: Any, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    gated(model)
    save(model, tokenizer, tmp_path, lineage=[], card="")
    auto_class: Any = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    loaded = auto_class.from_pretrained(str(tmp_path))
    assert skipped(loaded).keys() == skipped(model).keys()
    assert torch.equal(logits(loaded), logits(model))


def test_its_linears_are_where_they_were_and_can_be_replaced(
    build_model: Build, logits: Logits, factorise: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model: Any = build_model("t5 v1.1")
    places = [slot.path for slot in slots(model)]
    gated(model)
    assert [slot.path for slot in slots(model)] == places
    factorise(model, lambda path: path in places and "lm_head" not in path)
    save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))


def test_forward_is_hard_and_backward_is_soft() -> None:
    logits = torch.tensor([-3.0, -0.1, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    hard = straight_through(logits)
    assert hard.tolist() == [0.0, 0.0, 1.0, 1.0]
    hard.sum().backward()
    soft = torch.sigmoid(logits.detach())
    torch.testing.assert_close(logits.grad, soft * (1 - soft))


def test_in_training_every_weight_gets_a_gradient_and_a_shut_token_gives_the_block_none(build_model: Build) -> None:
    model: Any = build_model("t5 v1.1").double()
    gated(model)
    with_gradients(model).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    shut = copy.deepcopy(model)
    shut.zero_grad()
    modules = [module for module in shut.modules() if isinstance(module, SkippedFeedForward)]
    for module in modules:
        module.open_gate(0.1)
    with_gradients(shut).square().sum().backward()
    for module in modules:
        assert module.gate.bias.grad is not None
        assert module.gate.bias.grad.any()
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in module.out.parameters())


@pytest.mark.parametrize("path, settings", [("encoder.block.0", {}), ("encoder.block.0.layer.1.DenseReluDense", {"threshold": 1})])
def test_what_does_not_fit_is_refused(build_model: Build, path: str, settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"skipped module (replaces|has)"):
        SkippedFeedForward.from_settings(settings, build_model("t5 v1.1").get_submodule(path))
