"""Parity: with what tokens skip, or use parts of, the engine's tokens are those of transformers, which reads all tokens again at every step."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from random_models import KINDS, random_model, random_prompts
from torch import nn
from transformers_reference import assert_same, beams, generate

from llmdistill.decode.decoding import Decoding
from llmdistill.decode.engine import Engine
from llmdistill.decode.skipped import NormedGate, SkippedResidual, layer_gate
from llmdistill.models import channel_gated_feed_forward
from llmdistill.models.channel_gated_feed_forward import ChannelGatedFeedForward
from llmdistill.models.exit_settings import ExitSettings
from llmdistill.models.exits import add_exits
from llmdistill.models.feed_forward import replace_feed_forwards
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.skipped_feed_forward import SkippedFeedForward
from llmdistill.models.skipped_layer import replace_layers
from llmdistill.models.skipping import skipped

BOTH = ("encoder", "decoder")


def skipping(kind: str, seed: int, **settings: Any) -> Any:
    """A model of which each token skips some feed-forwards."""
    model = random_model(kind, seed, **settings)
    for module in replace_feed_forwards(model, SkippedFeedForward, BOTH):
        nn.init.normal_(module.gate.weight)
        nn.init.zeros_(module.gate.bias)
    return model


def skipping_layers(kind: str, seed: int, **settings: Any) -> Any:
    """A model of which each token skips some layers."""
    model = random_model(kind, seed, **settings)
    for module in replace_layers(model, BOTH):
        nn.init.normal_(module.gate.weight)
        nn.init.zeros_(module.gate.bias)
    return model


def gating(kind: str, seed: int, **settings: Any) -> Any:
    """A model of which each token uses two groups of four."""
    model = random_model(kind, seed, **settings)
    for module in replace_feed_forwards(model, partial(ChannelGatedFeedForward, groups=4, kept=2), BOTH):
        nn.init.normal_(module.saliency.weight)
        nn.init.ones_(module.saliency.bias)
    return model


@pytest.mark.parametrize("make", [skipping, skipping_layers, gating])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_generate(kind: str, seed: int, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_gated_feed_forward, "LEAST_SLICE", 0)
    model = make(kind, seed)
    prompts = random_prompts(seed, 6, 12, model.config.vocab_size)
    reference = generate(model, prompts, max_new_tokens=9, use_cache=False)
    assert_same(Engine(model).generate(prompts[:1], Decoding(max_new_tokens=9)), reference[:1])
    for max_batch_rows in (1, 4):
        assert_same(Engine(model, max_batch_rows=max_batch_rows).generate(prompts, Decoding(max_new_tokens=9)), reference)


@pytest.mark.parametrize("kind", KINDS)
def test_the_open_ones_alone_pass_through(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = skipping(kind, 1, dtype=torch.float32)
    num_all, num_through = [0], [0]
    call, through = SkippedResidual.__call__, SkippedResidual._through

    def counted_call(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        num_all[0] += hidden.numel() // hidden.shape[-1]
        return call(self, hidden)

    def counted_through(self: Any, hidden_OM: torch.Tensor, normed_OM: torch.Tensor) -> torch.Tensor:
        num_through[0] += len(normed_OM)
        return through(self, hidden_OM, normed_OM)

    monkeypatch.setattr(SkippedResidual, "__call__", counted_call)
    monkeypatch.setattr(SkippedResidual, "_through", counted_through)
    prompts = random_prompts(1, 5, 12, model.config.vocab_size)
    Engine(model).generate(prompts, Decoding(max_new_tokens=9))
    assert 0.1 < num_through[0] / num_all[0] < 0.9
    for module in skipped(model).values():
        module.open_gate(0.1)
    num_through[0] = 0
    Engine(model).generate(prompts, Decoding(max_new_tokens=9))
    assert num_through[0] == 0


@pytest.mark.parametrize("make", [skipping, skipping_layers, gating])
@pytest.mark.parametrize("kind", KINDS)
def test_with_linears_in_int8_too(kind: str, make: Any) -> None:
    model = make(kind, 2, dtype=torch.float32)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not path.endswith(("lm_head", "gate", "saliency")):
            model.set_submodule(path, Int8Linear.from_linear(module))
    prompts = random_prompts(2, 4, 9, model.config.vocab_size)
    ours = Engine(model).generate(prompts, Decoding(max_new_tokens=6))
    reference = generate(model, prompts, max_new_tokens=6)
    assert [one.tokens for one in ours] == [one.tokens for one in reference]


@pytest.mark.parametrize("make", [skipping, skipping_layers])
@pytest.mark.parametrize("kind", KINDS)
def test_beams_are_those_of_generate(kind: str, make: Any) -> None:
    model = make(kind, 1)
    prompts = random_prompts(1, 4, 9, model.config.vocab_size)
    ours = Engine(model).beams(prompts, Decoding(max_new_tokens=6, num_beams=3))
    reference = beams(model, prompts, max_new_tokens=6, num_beams=3)
    assert [[one.tokens for one in row] for row in ours] == [[one.tokens for one, _ in row] for row in reference]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_all_skip_is_not_computed(kind: str) -> None:
    """But for its keys and values; a single token goes by as fast as a norm and a small product."""
    model = skipping_layers(kind, 1, dtype=torch.float32)
    for module in skipped(model).values():
        module.open_gate(0.1)
    engine = Engine(model)
    assert engine.generate([[5, 6, 7]], Decoding(max_new_tokens=5))
    for module in skipped(model).values():
        for name, parameter in module.named_parameters():
            if not name.startswith("gate") and "norm" not in name:
                nn.init.constant_(parameter, torch.nan)
    [one] = Engine(model).generate([[5, 6, 7]], Decoding(max_new_tokens=5))
    assert one.logprob_sum == one.logprob_sum


@pytest.mark.parametrize("kind, threshold", [("t5 v1.1", 0.02), ("llama", 0.1)])
def test_with_exits_a_row_says_the_same_alone_and_at_full_depth_what_it_said(kind: str, threshold: float) -> None:
    settings: dict[str, Any] = {"num_layers": 3, "num_decoder_layers": 3} if kind.startswith("t5") else {"num_hidden_layers": 3}
    model = skipping_layers(kind, 4, **settings)
    prompts = random_prompts(4, 5, 9, model.config.vocab_size)
    before = Engine(model).generate(prompts, Decoding(max_new_tokens=8))
    add_exits(model, ExitSettings(layers=(1, 2)))
    assert [one.tokens for one in Engine(model).generate(prompts, Decoding(max_new_tokens=8, exit_threshold=1.0))] == [one.tokens for one in before]
    leaving = Decoding(max_new_tokens=8, exit_threshold=threshold)
    together, alone = (Engine(model, max_batch_rows=number).generate(prompts, leaving) for number in (5, 1))
    assert {layers for one in together for layers in one.layers} == {1, 2, 3}
    assert [(one.tokens, one.layers) for one in together] == [(one.tokens, one.layers) for one in alone]


@pytest.mark.parametrize("make", [skipping, skipping_layers])
@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_it_runs(kind: str, make: Any) -> None:
    model = make(kind, 1, dtype=torch.bfloat16)
    [one] = Engine(model).generate([[5, 6, 7]], Decoding(max_new_tokens=5))
    assert len(one.tokens) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_norm_and_gate_at_once_decide_alike(kind: str) -> None:
    model = skipping_layers(kind, 1, dtype=torch.float32)
    modules: list[Any] = list(skipped(model).values())
    for module in modules:
        nn.init.normal_(module.gate.bias)
        gate = layer_gate(module)
        assert isinstance(gate, NormedGate)
        hidden_NM = torch.randn(200, module.width) * torch.rand(200, 1) * 3
        logits_N = module.logits(module.first_norm(hidden_NM))
        sure_N = logits_N.abs() > 1e-4
        assert torch.equal(gate(hidden_NM)[sure_N], (logits_N >= 0)[sure_N])
        assert 0 < gate(hidden_NM).sum() < 200
