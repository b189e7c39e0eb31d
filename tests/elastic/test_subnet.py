"""Running a sub-network in place: the widest is the plain model, every legal one runs, gradients stay in its slices, and nothing is left behind."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from elastic_models import AXES, MODELS, PROMPTS, elastic_model, logits, random_model, rows

from llmdistill.batches import collate
from llmdistill.decode.engine import Decoding, Engine
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.choice import parse
from llmdistill.elastic.cuts import plan
from llmdistill.elastic.kept import active_of, keep, space_of
from llmdistill.elastic.measure import shape_of
from llmdistill.elastic.space import Space, StackChoice, Subnet
from llmdistill.elastic.subnet import activate, deactivate, running, whole, with_subnet
from llmdistill.losses.multitask import Multitask
from llmdistill.losses.t5_forward import is_plain
from llmdistill.models.feed_forward import replace_feed_forwards
from llmdistill.models.skipped_feed_forward import SkippedFeedForward

LOSS = Multitask(rationale_weight=0.3)


def tokens(model: Any) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in Engine(model, max_batch_rows=4).generate(PROMPTS, Decoding(max_new_tokens=5))]


def loss_of(model: Any, num: int = 2) -> torch.Tensor:
    return LOSS.sums_P(model, collate(rows(num), causal=not model.config.is_encoder_decoder)).sum()


@pytest.mark.parametrize("name", MODELS)
def test_the_widest_is_the_plain_model_bitwise(name: str) -> None:
    model, space = elastic_model(name)
    plain_logits, plain_tokens, plain_loss = logits(model), tokens(model), loss_of(model)
    made = plan(model, space, space.largest())
    assert (made.cuts, made.changes, made.kept) == ([], [], [])
    with with_subnet(model, space.largest()):
        assert torch.equal(logits(model), plain_logits)
        assert tokens(model) == plain_tokens
        assert torch.equal(loss_of(model), plain_loss)


@pytest.mark.parametrize("name", ["t5 v1.0", "t5 low rank", "llama grouped", "qwen2"])
def test_every_legal_subnet_runs_forward_and_decode(name: str) -> None:
    """Two values of every axis. Every pair of values occurs many times in so many samples, though not every sub-network."""
    model, space = elastic_model(name, Axes(ffn=(0.25,), heads=(0.5,), depth=(0.5,), width=(0.5,), rank=(0.5,)))
    subnets = [space.sample(random.Random(seed)) for seed in range(60)]
    plain = logits(model)
    seen = []
    for subnet in [*subnets, space.smallest()]:
        with with_subnet(model, subnet):
            seen.append(logits(model))
            assert torch.isfinite(seen[-1]).all()
            assert len(tokens(model)) == len(PROMPTS)
    assert torch.equal(logits(model), plain)
    assert len({tuple(one.flatten()[:5].tolist()) for one in seen}) > len(set(subnets)) * 0.9  # each computes something else


@pytest.mark.parametrize("name", ["t5 v1.1", "llama grouped"])
def test_every_subnet_of_a_small_space_runs(name: str) -> None:
    """All there are."""
    model, space = elastic_model(name, Axes(ffn=(0.5,), heads=(0.5,), depth=(0.5,), even=True))
    assert space.num_subnets in (8, 16)
    for subnet in space.every():
        with with_subnet(model, subnet):
            assert torch.isfinite(logits(model)).all()
            assert len(tokens(model)) == len(PROMPTS)
            loss_of(model).backward()


@pytest.mark.parametrize("name", MODELS)
def test_engine_and_transformers_generate_the_same_in_place(name: str) -> None:
    model, space = elastic_model(name, decoder=(2, 1, 0))
    for seed in range(3):
        subnet = space.sample(random.Random(seed))
        with with_subnet(model, subnet):
            theirs = [
                model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=5, do_sample=False)[0].tolist()
                for prompt in PROMPTS
            ]
            skipped = [1] * len(PROMPTS) if model.config.is_encoder_decoder else [len(prompt) for prompt in PROMPTS]
            expected = [tuple(token for token in answer[skip:] if token not in (0, 1)) for answer, skip in zip(theirs, skipped, strict=True)]
            assert [tuple(token for token in answer if token not in (0, 1)) for answer in tokens(model)] == expected


@pytest.mark.parametrize("name", MODELS)
def test_gradients_touch_only_the_slices(name: str) -> None:
    model, space = elastic_model(name)
    for seed in range(4):
        subnet = space.sample(random.Random(seed))
        model.zero_grad()
        with with_subnet(model, subnet):
            loss_of(model).backward()
        prefixes = {id(cut.whole): (cut.rows, cut.columns) for cut in plan(model, space, subnet).cuts}
        for parameter_name, parameter in model.named_parameters():
            if parameter.grad is None:  # a layer that is left out
                continue
            rows_kept, columns_kept = prefixes.get(id(parameter), (parameter.shape[0], None))
            outside = parameter.grad.clone()
            if parameter.dim() == 1:
                outside[:rows_kept] = 0.0
            else:
                outside[:rows_kept, :columns_kept] = 0.0
            assert not outside.any(), parameter_name
            assert parameter.grad.any() or "bias" in parameter_name or "layer_norm" in parameter_name, parameter_name


@pytest.mark.parametrize("name", ["t5 v1.1", "llama grouped"])
def test_training_in_place_changes_the_shared_weights(name: str) -> None:
    """Several steps within one context: the views follow the optimizer, and what is outside stays bitwise."""
    model, space = elastic_model(name)
    subnet = space.smallest()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    with with_subnet(model, subnet):
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = model.state_dict()
    changed = [key for key in after if not torch.equal(after[key], before[key])]
    assert changed
    name_of = {id(parameter): key for key, parameter in model.named_parameters()}
    for cut in plan(model, space, subnet).cuts:
        key = name_of[id(cut.whole)]
        outside = (after[key] != before[key]).clone()
        if cut.columns is None:
            outside[: cut.rows] = False
        else:
            outside[: cut.rows, : cut.columns] = False
        assert not outside.any()


def test_the_fast_training_forward_stays_in_use() -> None:
    model, space = elastic_model("t5 v1.1")
    with with_subnet(model, space.smallest()):
        assert is_plain(model.encoder)
        assert is_plain(model.decoder)


@pytest.mark.parametrize("name", ["t5 v1.1", "llama grouped"])
def test_nothing_is_left_behind(name: str) -> None:
    model, space = elastic_model(name)
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    try:
        with with_subnet(model, space.smallest()):
            assert {key: id(value) for key, value in model.named_parameters()} == {key: id(value) for key, value in parameters.items()}
            with with_subnet(model, space.largest()), whole(model):
                assert running(model) is None
            assert running(model) == space.smallest()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert running(model) is None
    for path, module in model.named_modules():
        assert set(vars(module)) == set(attributes[path])
        assert all(vars(module)[key] is value for key, value in attributes[path].items())


def test_activation_stays_until_it_is_taken_back() -> None:
    model, space = elastic_model("llama")
    plain = logits(model)
    with torch.inference_mode():
        activate(model, space.smallest())
    small = logits(model)
    loss_of(model).backward()  # the views were made for training too
    assert model.model.embed_tokens._parameters["weight"].grad is not None
    activate(model, space.largest())
    assert torch.equal(logits(model), plain)
    activate(model, space.smallest())
    assert torch.equal(logits(model), small)
    deactivate(model)
    assert torch.equal(logits(model), plain)


def test_layers_are_those_that_the_order_keeps() -> None:
    """By hand: a T5 decoder whose first layer, the one with the table of position biases, leaves."""
    model, space = elastic_model("t5 v1.1", Axes(ffn=(1.0,), heads=(1.0,), depth=(0.34,)), decoder=(2, 1, 0))
    subnet = parse("decoder.depth=1", space)
    with with_subnet(model, subnet):
        small = logits(model)
    by_hand = random_model("t5 v1.1")
    table = by_hand.decoder.block[0].layer[0].SelfAttention.relative_attention_bias
    last = by_hand.decoder.block[2]
    last.layer[0].SelfAttention.relative_attention_bias = table
    last.layer[0].SelfAttention.has_relative_attention_bias = True
    by_hand.decoder.block = torch.nn.ModuleList([last])
    assert torch.equal(small, logits(by_hand))
    with pytest.raises(ValueError, match=r"decoder.depth is 2"):
        parse("decoder.depth=2", space)


def test_a_half_is_what_zeros_for_the_other_half_give() -> None:
    """Heads and neurons that are cut are as if their outputs were zero."""
    for name in ("t5 v1.0", "llama grouped"):
        model, space = elastic_model(name, Axes(ffn=(0.5,), heads=(0.5,), depth=(1.0,)), torch.float64)
        with with_subnet(model, space.smallest()):
            small = logits(model)
        with torch.no_grad():
            for path, module in model.named_modules():
                if path.rpartition(".")[2] in ("o", "wo", "o_proj", "down_proj"):
                    module.weight[:, module.in_features // 2 :] = 0.0
        torch.testing.assert_close(logits(model), small, rtol=1e-6, atol=1e-6)


def test_what_is_not_elastic_says_so() -> None:
    model = random_model("llama")
    with pytest.raises(ValueError, match="not elastic"):
        activate(model, Subnet(width=32, stacks=()))
    space = AXES.space(shape_of(random_model("llama grouped")))
    with pytest.raises(ValueError, match="made for a model of other sizes"):
        keep(model, space)
    own = AXES.space(shape_of(model))
    keep(model, own, own.smallest())
    assert (space_of(model), active_of(model)) == (own, own.smallest())
    with pytest.raises(ValueError, match="width is 7"):
        activate(model, replace(own.largest(), width=7))
    assert running(model) is None
    model.lm_head = torch.nn.Identity()
    with pytest.raises(ValueError, match="quantize after extraction"):
        shape_of(model)


def test_heads_of_a_t5_stack_are_equal() -> None:
    space: Space = elastic_model("t5 v1.1")[1]
    decoder = StackChoice(heads=(2, 4, 4), ffn_widths=(32,) * 3, ranks=(1.0,) * 3)
    with pytest.raises(ValueError, match="share one table"):
        space.check(replace(space.largest(), stacks=(space.largest().stacks[0], decoder)))


def test_a_model_whose_feed_forwards_decide_is_refused() -> None:
    model = random_model("t5 v1.1")
    replace_feed_forwards(model, SkippedFeedForward, ("decoder",))
    with pytest.raises(ValueError, match=r"decoder.block.0.layer.2.DenseReluDense is a skipped module.*extract one first"):
        shape_of(model)
