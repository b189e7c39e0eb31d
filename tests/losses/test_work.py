"""The count of multiplications is that of the linears' weights, token by token."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from tiny_training import SETTINGS, causal, examples, t5

from llmdistill.losses.work import shares_of_work
from llmdistill.models.channel_gated_feed_forward import ChannelGatedFeedForward
from llmdistill.models.feed_forward import replace_feed_forwards
from llmdistill.models.skipped_feed_forward import SkippedFeedForward

BOTH = ("encoder", "decoder")
ATTENTION, FEED_FORWARD, HEAD = 16 * 12, 3 * 16 * 24, 60 * 16


def gated(make: Any, probability: float, names: tuple[str, ...] = BOTH) -> Any:
    model = make()
    for module in replace_feed_forwards(model, SkippedFeedForward, names):
        module.open_gate(probability)
    return model


def test_of_a_t5() -> None:
    rows = examples(7, shared=True)
    num_read = sum(len(row[0].input) for row in rows)
    num_said = sum(len(pair.target) for row in rows for pair in row)
    whole = num_read * (4 * ATTENTION + FEED_FORWARD + 2 * ATTENTION) + num_said * (4 * ATTENTION + 2 * ATTENTION + FEED_FORWARD + HEAD)
    gates = (num_read + num_said) * 2 * 16
    assert shares_of_work(gated(t5, 0.9), rows, SETTINGS) == pytest.approx(
        {"share_encoder": 1.0, "share_decoder": 1.0, "share_gated": 1.0, "share_model": (whole + gates) / whole}
    )
    shut = shares_of_work(gated(t5, 0.1), rows, SETTINGS)
    assert shut["share_gated"] == 0
    assert shut["share_model"] == pytest.approx(1 + (gates - (num_read + num_said) * FEED_FORWARD) / whole)
    only = shares_of_work(gated(t5, 0.1, ("decoder",)), rows, SETTINGS)
    assert only.keys() == {"share_decoder", "share_gated", "share_model"}
    assert only["share_model"] == pytest.approx(1 + num_said * (2 * 16 - FEED_FORWARD) / whole)


def test_of_groups_of_channels() -> None:
    model = causal()
    replace_feed_forwards(model, partial(ChannelGatedFeedForward, groups=4, kept=1), BOTH)
    shares = shares_of_work(model, examples(5), SETTINGS)
    assert shares["share_gated"] == shares["share_decoder"] == 0.25
    assert 0.25 < shares["share_model"] < 1


def test_a_model_that_decides_nothing_has_no_shares() -> None:
    with pytest.raises(ValueError, match="no module that decides something"):
        shares_of_work(t5(), examples(3), SETTINGS)
