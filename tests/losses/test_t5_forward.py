"""The training forward pass: the numbers and gradients of transformers' modules, plain or replaced, and dropout of the right size."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from llmdistill.losses.t5_forward import decode, dropout, encode, is_plain
from llmdistill.models.low_rank_linear import LowRankLinear


def model_of(**settings: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, num_heads=3, d_ff=24, num_layers=2, dropout_rate=0.0, **settings)
    return T5ForConditionalGeneration(config).double()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    input_BL = torch.randint(2, 50, (3, 7))
    mask_BL = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    return input_BL, mask_BL, torch.randint(2, 50, (3, 5))


class Replaced(nn.Linear):
    """A linear that is not the plain one: its output is that of twice its weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
@pytest.mark.parametrize("replaced", [(), ("q", "wo"), ("k", "o", "v", "wi", "wi_0")])
def test_outputs_and_gradients_are_those_of_transformers(feed_forward: str, replaced: tuple[str, ...]) -> None:
    model = model_of(feed_forward_proj=feed_forward)
    for path, module in list(model.named_modules()):
        if path.rpartition(".")[2] in replaced and isinstance(module, nn.Linear):
            module.__class__ = Replaced
    assert is_plain(model.encoder)
    assert is_plain(model.decoder)
    input_BL, mask_BL, decoder_BL = inputs()
    weight = torch.randn(3, 5, 16, dtype=torch.float64)
    parameters = [parameter for name, parameter in model.named_parameters() if "lm_head" not in name]

    ours = decode(model, decoder_BL, encode(model, input_BL, mask_BL), mask_BL)
    encoded = model.encoder(input_ids=input_BL, attention_mask=mask_BL).last_hidden_state
    theirs = model.decoder(input_ids=decoder_BL, encoder_hidden_states=encoded, encoder_attention_mask=mask_BL).last_hidden_state
    torch.testing.assert_close(ours, theirs)
    for mine, stock in zip(torch.autograd.grad((ours * weight).sum(), parameters), torch.autograd.grad((theirs * weight).sum(), parameters), strict=True):
        torch.testing.assert_close(mine, stock)


@pytest.mark.parametrize("is_shared", [False, True])
def test_low_rank_linears_give_the_same_and_a_shared_down_projection_runs_once(is_shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = model_of()
    groups = [[block.layer[0].SelfAttention] for stack in (model.encoder, model.decoder) for block in stack.block]
    groups += [[block.layer[1].EncDecAttention for block in model.decoder.block]]  # one for all layers
    for attentions, names in zip(groups, [*["qkv"] * 4, "kv"], strict=True):
        down_RI = nn.Parameter(torch.randn(5, 16, dtype=torch.float64))
        for attention in attentions:
            for name in names:
                module = LowRankLinear.from_factors(torch.randn(12, 5, dtype=torch.float64), down_RI, None)
                module.down.weight = down_RI if is_shared else module.down.weight
                setattr(attention, name, module)
    input_BL, mask_BL, decoder_BL = inputs()
    weight = torch.randn(3, 5, 16, dtype=torch.float64)
    parameters = [parameter for name, parameter in model.named_parameters() if "lm_head" not in name]
    encoded = model.encoder(input_ids=input_BL, attention_mask=mask_BL).last_hidden_state
    theirs = model.decoder(input_ids=decoder_BL, encoder_hidden_states=encoded, encoder_attention_mask=mask_BL).last_hidden_state

    num_calls = 0
    forward = nn.Linear.forward

    def counting(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += self.out_features == 5
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    ours = decode(model, decoder_BL, encode(model, input_BL, mask_BL), mask_BL)
    assert num_calls == (5 if is_shared else 16)
    torch.testing.assert_close(ours, theirs)
    for mine, stock in zip(torch.autograd.grad((ours * weight).sum(), parameters), torch.autograd.grad((theirs * weight).sum(), parameters), strict=True):
        torch.testing.assert_close(mine, stock)


def test_an_adapter_on_a_shared_down_projection_counts_for_its_own_linear_only() -> None:
    model: Any = model_of()
    attention: Any = model.encoder.block[0].layer[0].SelfAttention
    down_RI = nn.Parameter(torch.randn(5, 16, dtype=torch.float64))
    for name in "qkv":
        module = LowRankLinear.from_factors(torch.randn(12, 5, dtype=torch.float64), down_RI, None)
        module.down.weight = down_RI
        setattr(attention, name, module)
    attention.k.down.__class__ = Replaced
    input_BL, mask_BL, _ = inputs()
    theirs = model.encoder(input_ids=input_BL, attention_mask=mask_BL).last_hidden_state
    torch.testing.assert_close(encode(model, input_BL, mask_BL), theirs)


def test_modules_that_somebody_listens_to_are_called() -> None:
    model = model_of()
    calls: list[str] = []
    model.encoder.block[1].register_forward_hook(lambda *_: calls.append("block"))
    assert not is_plain(model.encoder)
    input_BL, mask_BL, _ = inputs()
    encode(model, input_BL, mask_BL)
    assert calls == ["block"]


def test_dropout_keeps_the_mean_and_the_share() -> None:
    torch.manual_seed(0)
    hidden = torch.ones(1000, 1003, requires_grad=True)
    for p in (0.1, 0.5):
        dropped = dropout(hidden, p)
        assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=0.003)
        assert dropped.mean().item() == pytest.approx(1, abs=0.005)
        (gradient,) = torch.autograd.grad(dropped.sum(), hidden)
        assert torch.equal(gradient, dropped)
    assert dropout(hidden, 0.0) is hidden


def test_dropout_is_on_in_training_and_off_otherwise() -> None:
    model = model_of().train()
    model.encoder.config.dropout_rate = 0.5
    input_BL, mask_BL, _ = inputs()
    assert not torch.equal(encode(model, input_BL, mask_BL), encode(model, input_BL, mask_BL))
    model.eval()
    assert torch.equal(encode(model, input_BL, mask_BL), encode(model, input_BL, mask_BL))
