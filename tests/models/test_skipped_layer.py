"""Law: open gates leave the model bitwise as it is; a skipped token keeps its state and leaves its keys and values."""

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
from llmdistill.models.skipped_layer import SKIPPED_LAYERS, SkippedLayer, SkippedT5Block, replace_layers
from llmdistill.models.skipping import decided_by, skipped

Build = Callable[[str], PreTrainedModel]
Logits = Callable[[PreTrainedModel], torch.Tensor]
BOTH = ("encoder", "decoder")


def gated(model: Any) -> Sequence[SkippedLayer]:
    return with_random_gates(replace_layers(model, BOTH))


def test_open_gates_are_no_gates(model: Any, logits: Logits) -> None:
    plain, plain_in_training = logits(model), with_gradients(model)
    modules = replace_layers(model, BOTH)
    assert len(modules) == sum(len(stack.layers) for stack in stacks(model))
    for module in modules:
        module.open_gate(0.9)
    assert torch.equal(logits(model), plain)
    assert torch.equal(with_gradients(model), plain_in_training)


def test_shut_gates_leave_the_embedding(model: Any, logits: Logits) -> None:
    for module in replace_layers(model, BOTH):
        module.open_gate(0.1)
    shut = logits(model)
    for parameter in (parameter for module in skipped(model).values() for name, parameter in module.named_parameters() if "norm" not in name):
        nn.init.normal_(parameter)
    for module in skipped(model).values():
        module.open_gate(0.1)
    assert torch.equal(logits(model), shut)


def test_a_skipped_token_is_still_seen(build_model: Build) -> None:
    """The first token skips the last layer, and its keys and values there are what the second one attends to."""
    model: Any = build_model("llama untied")
    [*_, last] = replace_layers(model, BOTH)
    for module in skipped(model).values():
        module.open_gate(0.9)

    def but_the_first(module: Any, read_BLD: torch.Tensor) -> torch.Tensor:
        open_BL = torch.ones(read_BLD.shape[:2])
        open_BL[:, 0] = 0 if module is last else 1
        return open_BL

    ids_BL = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        plain = model(input_ids=ids_BL).logits
        with decided_by(model, but_the_first):
            skipping = model(input_ids=ids_BL).logits
    assert torch.equal(skipping[:, 1:], plain[:, 1:])
    assert not torch.equal(skipping[:, 0], plain[:, 0])


def test_it_loads_as_it_was(model: Any, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    gated(model)
    save(model, tokenizer, tmp_path, lineage=[], card="")
    auto_class: Any = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    loaded = auto_class.from_pretrained(str(tmp_path))
    assert skipped(loaded).keys() == skipped(model).keys()
    assert torch.equal(logits(loaded), logits(model))


def test_its_linears_are_where_they_were_and_can_be_replaced(
    model: Any, logits: Logits, factorise: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    places = [slot.path for slot in slots(model)]
    gated(model)
    assert [slot.path for slot in slots(model)] == places
    factorise(model, lambda path: path in places and "lm_head" not in path)
    save(model, tokenizer, tmp_path, lineage=[], card="")
    auto_class: Any = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    assert torch.equal(logits(auto_class.from_pretrained(str(tmp_path))), logits(model))


def test_gates_learn_from_what_the_layer_changes(build_model: Build) -> None:
    """To first order, what opening a gate does to the loss is its gradient by the sigmoid's derivative."""
    model: Any = build_model("t5 v1.1").double()
    gated(model)
    with_gradients(model).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    [*_, last] = skipped(model).values()
    assert last.gate.bias.grad is not None
    before: dict[str, torch.Tensor] = {}
    hook = last.register_forward_pre_hook(lambda _, inputs: before.update(hidden=inputs[0].detach()))
    model.zero_grad()
    found = {}

    def as_now(module: Any, read_BLD: torch.Tensor) -> torch.Tensor:
        logits_BL = module.logits(read_BLD)
        soft_BL = torch.sigmoid(logits_BL)
        open_BL = (logits_BL >= 0).double() + soft_BL - soft_BL.detach()
        if module is last:
            open_BL.retain_grad()
            found.update(open=open_BL, logits=logits_BL)
        return open_BL

    with decided_by(model, as_now):
        with_gradients(model).square().sum().backward()
    hook.remove()
    soft_BL = torch.sigmoid(found["logits"].detach())
    expected = (found["open"].grad * soft_BL * (1 - soft_BL)).sum()
    torch.testing.assert_close(last.gate.bias.grad[1], expected)
    torch.testing.assert_close(last.gate.bias.grad[0], -expected)


def test_multiplications_are_those_that_a_skipped_token_does_not_make(build_model: Build) -> None:
    model: Any = build_model("t5 v1.1")
    encoder, *_, decoder = replace_layers(copy.deepcopy(model), BOTH)
    assert encoder.num_multiplications == 2 * 16 * 16 + 3 * 16 * 24
    assert decoder.num_multiplications == 4 * 16 * 16 + 3 * 16 * 24
    [llama, _] = replace_layers(build_model("llama untied"), BOTH)
    assert llama.num_multiplications == 2 * 16 * 16 + 3 * 16 * 24


def test_what_does_not_fit_is_refused(build_model: Build) -> None:
    model: Any = build_model("t5 v1.1")
    with pytest.raises(ValueError, match="replaces a T5Block, and this is a Linear"):
        SkippedT5Block.from_settings({}, model.lm_head)
    with pytest.raises(ValueError, match="has no settings"):
        SkippedT5Block.from_settings({"threshold": 1}, model.encoder.block[0])
    replace_layers(model, BOTH)
    with pytest.raises(ValueError, match="layer 0 of the encoder is a SkippedT5Block"):
        replace_layers(model, BOTH)
    assert len({kind.kind for kind in SKIPPED_LAYERS}) == 3
