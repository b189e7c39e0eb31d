"""Law: slices of the kept groups are the masked whole; with all groups kept and salience 1 it is the stock feed-forward, bitwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from llmdistill.models import channel_gated_feed_forward as module_file
from llmdistill.models.channel_gated_feed_forward import ChannelGatedFeedForward
from llmdistill.models.checkpoint import save
from llmdistill.models.deciding import deciding
from llmdistill.models.feed_forward import replace_feed_forwards
from llmdistill.models.low_rank_linear import LowRankLinear

Logits = Callable[[PreTrainedModel], torch.Tensor]


def gated(model: Any, kept: int) -> list[ChannelGatedFeedForward]:
    modules = replace_feed_forwards(model, partial(ChannelGatedFeedForward, groups=8, kept=kept), ("encoder", "decoder"))
    for module in modules:
        nn.init.normal_(module.saliency.weight)
    return modules


def feed_forward(model: Any) -> ChannelGatedFeedForward:
    return next(iter(deciding(model).values()))  # pyright: ignore[reportReturnType]


def test_all_groups_at_salience_one_are_the_stock_module(model: Any, logits: Logits) -> None:
    plain = logits(model)
    replace_feed_forwards(model, partial(ChannelGatedFeedForward, groups=8, kept=8), ("encoder", "decoder"))
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("num_tokens", [1, 2, 40])
def test_slices_are_the_masked_whole(model: Any, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gated(model.double(), kept=2)
    module = feed_forward(model)
    if "mlp" in next(iter(deciding(model))):
        for linear in (*module.reads, module.out):
            linear.bias = nn.Parameter(torch.randn(linear.out_features, dtype=torch.float64))
    hidden_MD = torch.randn(num_tokens, module.width, dtype=torch.float64)
    masked_MD = module.masked(hidden_MD, module.salience(hidden_MD))
    counts: list[int] = []
    inner_of = ChannelGatedFeedForward._inner_of

    def counted(self: Any, group: int, hidden_TD: torch.Tensor) -> torch.Tensor:
        counts.append(len(hidden_TD))
        return inner_of(self, group, hidden_TD)

    monkeypatch.setattr(ChannelGatedFeedForward, "_inner_of", counted)
    with torch.inference_mode():
        assert torch.equal(module(hidden_MD), masked_MD)
        assert not counts, "such thin slices are slower than the whole"
        monkeypatch.setattr(module_file, "LEAST_SLICE", 0)
        torch.testing.assert_close(module(hidden_MD), masked_MD, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(module(hidden_MD[None]), masked_MD[None], rtol=1e-10, atol=1e-12)
    assert sum(counts) <= 2 * num_tokens * 2


def test_the_kept_ones_are_the_most_salient() -> None:
    module = ChannelGatedFeedForward(stock(), groups=4, kept=2)
    with torch.no_grad():
        module.saliency.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]))
        module.saliency.bias.zero_()
    assert module.salience(torch.tensor([[3.0, 2.0], [-1.0, -4.0]])).tolist() == [[3.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 4.0]]
    only_one = module.salience(torch.tensor([5.0, 0.0]))
    assert only_one.tolist() == [5.0, 0.0, 0.0, 0.0], "what is not salient at all is not kept to make up the number"


def stock() -> Any:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

    torch.manual_seed(0)
    return T5DenseGatedActDense(T5Config(d_model=2, d_ff=8, feed_forward_proj="gated-gelu")).eval()


def test_it_loads_as_it_was(model: Any, logits: Logits, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    gated(model, kept=3)
    save(model, tokenizer, tmp_path, lineage=[], card="")
    auto_class: Any = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    loaded = auto_class.from_pretrained(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))


def test_linears_that_have_no_slices_are_masked() -> None:
    module = ChannelGatedFeedForward(stock(), groups=4, kept=1)
    nn.init.normal_(module.saliency.weight)
    module.wi_0 = LowRankLinear(2, 8, 1, bias=False)
    hidden_MD = torch.randn(1, 2)
    with torch.inference_mode():
        assert torch.equal(module(hidden_MD), module.masked(hidden_MD, module.salience(hidden_MD)))


def test_salience_learns_through_what_is_kept() -> None:
    module = ChannelGatedFeedForward(stock(), groups=4, kept=2)
    module(torch.randn(5, 2)).square().sum().backward()
    gradient = module.saliency.bias.grad
    assert gradient is not None
    assert gradient.count_nonzero() == 2


@pytest.mark.parametrize(
    "settings, message",
    [({"groups": 4}, "settings of a channel_gated"), ({"groups": 4, "kept": 5}, "keep 1 to all"), ({"groups": 3, "kept": 1}, "no 3 groups of one size")],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelGatedFeedForward.from_settings(settings, stock())
