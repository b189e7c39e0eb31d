"""Noise is in the inputs alone, at most the share that was asked for, of about half of the rows, and the same in whatever batch a row is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_training import VOCABULARY_SIZE, examples

from llmdistill.batches import collate
from llmdistill.losses.input_noise import with_noise


@pytest.mark.parametrize("causal", [False, True])
def test_only_inputs_change_and_only_so_many(causal: bool) -> None:
    batch = replace(collate(examples(200), causal=causal), step=7)
    noisy = with_noise(batch, 0.5, VOCABULARY_SIZE, seed=1)
    is_other_EL = noisy.input_EL != batch.input_EL
    assert torch.equal(noisy.target_N, batch.target_N)
    assert torch.equal(noisy.position_N, batch.position_N)
    assert not bool((is_other_EL & ~batch.mask_EL).any())
    length = batch.input_EL.shape[1]
    if causal:
        for position in batch.position_N.tolist():
            row, place = divmod(position, length)
            assert torch.equal(noisy.input_EL[row, place + 1 :], batch.input_EL[row, place + 1 :])
    shares_E = is_other_EL.sum(1) / batch.mask_EL.sum(1)
    assert 0.2 < float((shares_E > 0).float().mean()) < 0.55
    assert float(shares_E.mean()) < 0.5 * 0.5
    assert torch.equal(with_noise(batch, 0.0, VOCABULARY_SIZE, seed=1).input_EL, batch.input_EL)
    for other in (with_noise(batch, 0.5, VOCABULARY_SIZE, seed=2), with_noise(replace(batch, step=8), 0.5, VOCABULARY_SIZE, seed=1)):
        assert not torch.equal(other.input_EL, noisy.input_EL)


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_has_its_noise_in_whatever_batch_it_is(causal: bool) -> None:
    rows = examples(12)
    whole = with_noise(collate(rows, causal=causal), 0.9, VOCABULARY_SIZE, seed=0)
    alone = [with_noise(collate([row], causal=causal), 0.9, VOCABULARY_SIZE, seed=0) for row in rows]
    apart = [row_L[mask_L].tolist() for one in alone for row_L, mask_L in zip(one.input_EL, one.mask_EL, strict=True)]
    together = [row_L[mask_L].tolist() for row_L, mask_L in zip(whole.input_EL, whole.mask_EL, strict=True)]
    assert sorted(together) == sorted(apart)
    assert any(row_L.tolist() != other.tolist() for row_L, other in zip(whole.input_EL, collate(rows, causal=causal).input_EL, strict=True))
