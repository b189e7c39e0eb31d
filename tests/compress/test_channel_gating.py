"""Neurons in groups that the same tokens want, and saliencies that say which: the function stays, and what is kept is what matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_training import causal, examples, t5

from llmdistill.batches import collate
from llmdistill.compress.calibration import Calibration
from llmdistill.compress.channel_gating import BOOST, coactivation_order, fit, gate_channels
from llmdistill.losses.loss import target_logits_NV
from llmdistill.losses.multitask import Multitask
from llmdistill.models.anatomy import stacks
from llmdistill.models.channel_gated_feed_forward import ChannelGatedFeedForward
from llmdistill.models.feed_forward import feed_forward_of

BOTH = ("encoder", "decoder")
MODELS: dict[str, Any] = {"t5": t5, "causal": causal}
each_model = pytest.mark.parametrize("make", list(MODELS.values()), ids=list(MODELS))


def calibration() -> Calibration:
    return Calibration(examples=examples(20), loss=Multitask())


@each_model
def test_in_another_order_and_with_all_groups_the_function_stays(make: Any) -> None:
    model, batch = make(), collate(examples(6, seed=1), causal=make is causal)
    with torch.no_grad():
        before = target_logits_NV(model, batch)
        made = gate_channels(model, calibration(), BOTH, groups=4, kept=4)
        assert len(made) == sum(len(stack.layers) for stack in stacks(model))
        for module in made:
            module.saliency.weight.zero_()
            module.saliency.bias.fill_(1)
        torch.testing.assert_close(target_logits_NV(model, batch), before, rtol=1e-4, atol=1e-6)


def test_neurons_that_write_together_stand_together() -> None:
    generator = torch.Generator().manual_seed(0)
    factor_TG = torch.randn(500, 4, generator=generator).exp()
    group_N = torch.arange(32) % 4
    written_TN = factor_TG[:, group_N] * (1 + 0.1 * torch.randn(500, 32, generator=generator))
    order_N = coactivation_order(written_TN, 4)
    assert sorted(order_N.tolist()) == list(range(32))
    assert all(len(set(group.tolist())) == 1 for group in group_N[order_N].view(4, 8))


def feed_forward() -> Any:
    holder, name = feed_forward_of(stacks(t5(dtype=torch.float32))[0].layers[0])
    return getattr(holder, name)


def test_saliencies_begin_as_the_shares_of_what_is_written() -> None:
    generator = torch.Generator().manual_seed(0)
    module = ChannelGatedFeedForward(feed_forward(), groups=4, kept=2)
    hidden_TD, weight_DG = torch.randn(800, 16, generator=generator), torch.randn(16, 4, generator=generator)
    share_TG = 1 + 0.05 * (hidden_TD @ weight_DG)
    share_TG = share_TG / share_TG.mean(1, keepdim=True)
    written_TN = share_TG.clamp(min=0).repeat_interleave(6, 1)
    with torch.no_grad():
        fit(module, hidden_TD, written_TN)
    salience_TG = module.saliency(hidden_TD)
    assert salience_TG.std().item() == pytest.approx(BOOST, rel=1e-3)
    assert salience_TG.mean().item() == pytest.approx(1, abs=1e-3)
    winners, best = ((one.topk(2, -1).indices.sort(-1).values) for one in (salience_TG, share_TG))
    assert (winners == best).all(-1).float().mean() > 0.9


@each_model
def test_what_is_kept_matters_more_than_as_much_by_chance(make: Any) -> None:
    """How far the logits move, against gates that know nothing of the token."""
    batch = collate(examples(20), causal=make is causal)
    plain = make()
    moved = {}
    for fitted in (True, False):
        model = make()
        for module in gate_channels(model, calibration(), BOTH, groups=8, kept=4):
            if not fitted:
                torch.nn.init.normal_(module.saliency.weight, std=BOOST / 4, generator=torch.Generator().manual_seed(0))
                torch.nn.init.ones_(module.saliency.bias)
        with torch.no_grad():
            moved[fitted] = (target_logits_NV(model, batch) - target_logits_NV(plain, batch)).square().mean().item()
    assert moved[True] < 0.8 * moved[False]


@pytest.mark.parametrize("groups", [1, 6])
def test_numbers_of_groups_that_halving_does_not_give_are_refused(groups: int) -> None:
    with pytest.raises(ValueError, match="halved again and again; give 2, 4, 8"):
        gate_channels(t5(), calibration(), BOTH, groups=groups, kept=1)


def test_other_linears_are_refused() -> None:
    from llmdistill.models.low_rank_linear import LowRankLinear

    model: Any = t5()
    model.set_submodule("encoder.block.0.layer.1.DenseReluDense.wo", LowRankLinear(24, 16, 3, bias=False))
    with pytest.raises(ValueError, match=r"a ffn_out is a low_rank module.*gate channels first"):
        gate_channels(model, calibration(), BOTH, groups=4, kept=2)
