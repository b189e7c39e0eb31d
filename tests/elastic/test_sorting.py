"""Sorting leaves the function as it was, and importance is what it says: the first-order change of the loss without a unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elastic_models import MODELS, Drift, exact_logits, logits, random_model, rows

from llmdistill.elastic.importance import importance
from llmdistill.elastic.layer_order import layer_orders
from llmdistill.elastic.rows import part_weights_P
from llmdistill.elastic.rows import rows as batches
from llmdistill.elastic.sorting import LayerOrder, Order, order_by, sort
from llmdistill.losses.multitask import Multitask
from llmdistill.models.anatomy import stacks

LOSS = Multitask(rationale_weight=0.3)


def random_order(model: Any) -> Order:
    """One that moves everything: the heads of a T5 stack alike."""
    layers = {}
    for stack in stacks(model):
        num_groups = stack.layers[0].attention_places[0][1].module.out_features // stack.head_width
        shared = torch.randperm(num_groups)
        layers[stack.name] = tuple(
            LayerOrder(
                neurons_U=torch.randperm(layer.feed_forward[-1].module.in_features),
                groups_U=(shared if stack.has_bias_table else torch.randperm(num_groups), *(torch.randperm(num_groups) for _ in layer.attentions[1:])),
            )
            for layer in stack.layers
        )
    return Order(layers=layers, channels_U=torch.randperm(32))


@pytest.mark.parametrize("name", MODELS)
def test_any_order_leaves_the_function(name: str) -> None:
    model = random_model(name, torch.float64)
    before, weights = exact_logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    sort(model, random_order(model))
    torch.testing.assert_close(exact_logits(model), before, rtol=1e-12, atol=1e-12)
    moved = [not torch.equal(value, weights[key]) for key, value in model.state_dict().items() if value.dim() == 2]
    assert sum(moved) > 0.9 * len(moved)  # chance leaves two groups of heads where they are now and then


@pytest.mark.parametrize("name", ["t5 v1.1", "t5 low rank", "llama grouped"])
def test_after_sorting_what_comes_first_matters_most(name: str) -> None:
    model = random_model(name, torch.float64)
    before = exact_logits(model)
    sort(model, order_by(importance(model, rows(4), LOSS), channels=True))
    torch.testing.assert_close(exact_logits(model), before, rtol=1e-12, atol=1e-12)
    again = importance(model, rows(4), LOSS)
    assert is_descending(again.channels_M)
    for stack in again.layers.values():
        assert all(is_descending(layer.neurons_N) for layer in stack)
        first = [layer.groups[0] for layer in stack]
        assert all(map(is_descending, first if len(again.layers) == 1 else [torch.stack(first).sum(0)]))
        assert all(is_descending(groups) for layer in stack for groups in layer.groups[1:])


def test_without_channels_the_model_width_keeps_its_order() -> None:
    model = random_model("llama")
    embedding = model.model.embed_tokens.weight.clone()
    sort(model, order_by(importance(model, rows(2), LOSS), channels=False))
    assert torch.equal(model.model.embed_tokens.weight, embedding)


@pytest.mark.parametrize("name", ["t5 v1.0", "t5 low rank", "llama grouped", "qwen2"])
def test_importance_is_the_change_of_the_loss_by_a_gate_on_each_unit(name: str) -> None:
    """The same by another way: gates of one on what the out-going linears read and the norms give, and their gradients row by row."""
    model, examples = random_model(name, torch.float64), rows(3)
    measured = importance(model, examples, LOSS)
    gates: dict[Any, torch.Tensor] = {}
    hooks = []
    for stack in stacks(model):
        for layer in stack.layers:
            for place in (place for place in layer.places if place.role in ("o", "cross_o", "ffn_out")):
                gates[place.module] = torch.ones(place.module.in_features, dtype=torch.float64, requires_grad=True)
                hooks.append(place.module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * gates[module],)))
        for norm in (*(norm for layer in stack.layers for norm in layer.norms), stack.norm):
            gates[norm] = torch.ones(32, dtype=torch.float64, requires_grad=True)
            hooks.append(norm.register_forward_hook(lambda module, _, output: output * gates[module]))
    weights_P = part_weights_P(model, examples, LOSS)
    sums = {module: torch.zeros_like(gate) for module, gate in gates.items()}
    head_sums: dict[Any, Any] = {}
    for batch in batches(model, examples):
        gradients = torch.autograd.grad((weights_P * LOSS.sums_P(model, batch)).sum(), list(gates.values()))
        for module, gradient in zip(gates, gradients, strict=True):
            sums[module] = sums[module] + gradient.abs()
            head_sums[module] = head_sums.get(module, 0) + gradient.unflatten(0, (4 if name != "qwen2" and "grouped" not in name else 2, -1)).sum(1).abs()
    for stack in stacks(model):
        for layer, of_layer in zip(stack.layers, measured.layers[stack.name], strict=True):
            torch.testing.assert_close(of_layer.neurons_N, sums[layer.feed_forward[-1].module])
            for places, groups in zip(layer.attention_places, of_layer.groups, strict=True):
                torch.testing.assert_close(groups, head_sums[places[-1].module])
    norms = [norm for stack in stacks(model) for norm in (*(norm for layer in stack.layers for norm in layer.norms), stack.norm)]
    torch.testing.assert_close(measured.channels_M, torch.stack([sums[norm] for norm in norms]).sum(0))


def test_importance_leaves_the_model_as_it_was() -> None:
    model = random_model("t5 v1.1").train()
    model.shared.weight.requires_grad_(False)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    importance(model, rows(1), LOSS)
    assert model.training
    assert trained == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["t5 v1.1", "llama"])
def test_a_layer_that_does_nothing_leaves_first(name: str) -> None:
    model = random_model(name)
    idle = stacks(model)[-1].layers[0]  # the one that has T5's table of position biases
    with torch.no_grad():
        for place in idle.places:
            if place.role in ("o", "cross_o", "ffn_out"):
                place.module.weight.zero_()
                if place.module.bias is not None:
                    place.module.bias.zero_()
    before = logits(model)
    for greedy in (True, False):
        orders = layer_orders(model, rows(3), Drift(model), greedy=greedy)
        assert orders["decoder"][-1] == 0
        assert all(sorted(orders[stack.name]) == list(range(len(stack.layers))) for stack in stacks(model))
    assert torch.equal(logits(model), before)


def test_rows_are_needed() -> None:
    with pytest.raises(ValueError, match="no rows"):
        importance(random_model("llama"), [], LOSS)


def is_descending(values: torch.Tensor) -> bool:
    return bool((values.diff() <= 1e-12).all())
