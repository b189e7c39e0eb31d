"""Law: what a direction counts is what a finite difference says of the loss when a little of it is taken away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from quantization_models import MODELS, calibration, rows, tiny

from llmdistill.batches import Pair
from llmdistill.compress import low_rank_maths as maths
from llmdistill.compress.answers_loss import TEMPERATURE, AnswersLoss, seen_by
from llmdistill.compress.calibration import Calibration, row_loss
from llmdistill.compress.importance import Importance
from llmdistill.compress.loss_importance import loss_importances
from llmdistill.compress.ranks import Allocation, Budget
from llmdistill.compress.svd import SVD, Scope
from llmdistill.compress.svd_targets import Target, targets_of
from llmdistill.losses.loss import target_logits_NV

ALL = (Scope.ATTENTION, Scope.FEED_FORWARD, Scope.EMBEDDINGS)
STEP = 1e-3  # the norms of transformers compute in float32


def one_token() -> Calibration:
    """A row of one token, and one to be written: a layer's effect on the loss is then that of one token."""
    return replace(calibration(), examples=[(Pair(part=0, input=np.array([7]), target=np.array([11])),)])


def found(model: Any, rows_: Calibration, importance: Importance = Importance.LOSS) -> tuple[list[Target], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    targets = targets_of(model, ALL, Budget.PARAMETERS, rows_, counts_tokens=True)[0]
    lefts = {target.path: maths.spectrum(target.scaled_OI, None).left_OK for target in targets}
    return targets, lefts, loss_importances(model, targets, lefts, seen_by(importance, rows_), 64)


@pytest.mark.parametrize("importance", [Importance.LOSS, Importance.ANSWERS])
@pytest.mark.parametrize("name", ["t5 v1.1", "llama", "qwen2"])
def test_is_the_squared_derivative_of_the_loss(name: str, importance: Importance) -> None:
    model, rows_ = tiny(name, torch.float64), one_token()
    [batch] = rows_.batches(model)
    targets, lefts, importances = found(model, rows_, importance)

    def loss() -> float:
        with torch.no_grad():
            return float(row_loss(seen_by(importance, rows_).loss, model, batch))

    for target in targets:
        if target.head or (target.embeddings and model.config.is_encoder_decoder):  # two effects, whose squares are added
            continue
        weight, left_OK = target.weight_OI, lefts[target.path]
        before = weight.detach().clone()
        directions = importances[target.path].argsort(descending=True)[:2]
        for k in directions.tolist():
            root_O1 = torch.ones(1) if target.row_weight_O is None else target.row_weight_O.sqrt()[:, None]
            part_OI = (left_OK[:, k : k + 1] / root_O1) @ (left_OK[:, k : k + 1].t() @ (before * root_O1))
            losses = []
            for sign in (1, -1):
                weight.data = before + sign * STEP * part_OI
                losses.append(loss())
            weight.data = before
            assert float(importances[target.path][k]) == pytest.approx(((losses[0] - losses[1]) / (2 * STEP)) ** 2, rel=1e-2, abs=1e-9)


@pytest.mark.parametrize("name", ["t5 v1.1", "llama"])
def test_that_of_answers_is_the_second_derivative_of_how_far_the_softened_model_goes(name: str) -> None:
    """KL(p || p without a little of the direction), in expectation over what the model says."""
    model, rows_ = tiny(name, torch.float64), one_token()
    [batch] = rows_.batches(model)
    targets = targets_of(model, (Scope.ATTENTION, Scope.FEED_FORWARD), Budget.PARAMETERS, rows_, counts_tokens=True)[0][-3:]
    lefts = {target.path: maths.spectrum(target.scaled_OI, None).left_OK for target in targets}
    of_draws = [loss_importances(model, targets, lefts, replace(rows_, loss=AnswersLoss(rows_.loss, seed)), 1) for seed in range(600)]
    importances = {path: torch.stack([one[path] for one in of_draws]).mean(0) for path in lefts}

    def log_probabilities() -> torch.Tensor:
        with torch.no_grad():
            return (target_logits_NV(model, batch) / TEMPERATURE).log_softmax(-1)

    before = log_probabilities()
    for target in targets:
        weight, left_OK = target.weight_OI, lefts[target.path]
        kept = weight.detach().clone()
        for k in importances[target.path].argsort(descending=True)[:2].tolist():
            weight.data = kept - 0.03 * left_OK[:, k : k + 1] @ (left_OK[:, k : k + 1].t() @ kept)
            divergence = float((before.exp() * (before - log_probabilities())).sum())
            weight.data = kept
            assert float(importances[target.path][k]) == pytest.approx(2 * divergence / 0.03**2, rel=0.25)


@pytest.mark.parametrize("name", ["t5 v1.1", "llama"])
def test_that_of_answers_asks_for_no_label(name: str) -> None:
    other = replace(one_token(), examples=[(Pair(part=0, input=np.array([7]), target=np.array([12])),)])
    model = tiny(name)
    for importance, is_alike in ((Importance.ANSWERS, True), (Importance.LOSS, False)):
        one, two = found(model, one_token(), importance)[2], found(model, other, importance)[2]
        same = [torch.equal(one[path], two[path]) for path in one if "embed" not in path and "shared" not in path and "head" not in path]
        assert all(same) is is_alike


@pytest.mark.parametrize("name", ["t5 v1.0", "llama tied"])
def test_a_tied_matrix_has_the_effects_of_embedding_and_head(name: str) -> None:
    model, rows_ = tiny(name), calibration(3)
    targets, lefts, importances = found(model, rows_)
    [tied] = [target for target in targets if target.head]
    embedding, head = replace(tied, head=None), replace(tied, path="lm_head", embeddings=(), head=None)
    left_OK = lefts[tied.path]
    lefts = {embedding.path: left_OK, head.path: left_OK}
    parts = loss_importances(model, [embedding, head], lefts, rows_, 64)
    torch.testing.assert_close(importances[tied.path], parts[embedding.path] + parts[head.path], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny(name)
    model.lm_head.weight.requires_grad_(False)
    wanted = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    found(model, calibration(2))
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_bfloat16_is_measured_in_float32() -> None:
    model = tiny("llama", torch.bfloat16)
    same = tiny("llama", torch.bfloat16).float()
    low, high = found(model, calibration(3))[2], found(same, calibration(3))[2]
    assert all(torch.equal(low[path], high[path]) for path in low)


def test_a_layer_that_the_loss_does_not_see_gives_its_ranks_to_the_others() -> None:
    """The last layer's feed-forward is multiplied to nothing, whatever its own energy is."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-6)
    by_loss = SVD(keep=0.5).apply(model, calibration(6))
    ranks = {layer.path: layer.figures.get("rank", 1e9) for layer in by_loss.layers}
    assert ranks["model.layers.1.mlp.up_proj"] == ranks["model.layers.1.mlp.gate_proj"] == 1
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-6)
    by_energy = SVD(keep=0.5, importance=Importance.ENERGY).apply(model, calibration(6))
    assert {layer.path: layer.figures.get("rank", 1e9) for layer in by_energy.layers}["model.layers.1.mlp.up_proj"] > 1


@pytest.mark.parametrize("importance", [Importance.LOSS, Importance.ANSWERS])
def test_a_loss_that_is_no_number_is_refused(importance: Importance) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    targets = targets_of(model, (Scope.ATTENTION,), Budget.PARAMETERS, calibration(1), counts_tokens=False)[0]
    lefts, seen = {target.path: torch.eye(target.weight_OI.shape[0]) for target in targets}, seen_by(importance, calibration(1))
    with pytest.raises(ValueError, match="the loss of calibration row 0 is nan"):
        loss_importances(model, targets, lefts, seen, 4)


def test_other_divisions_ask_for_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nothing was to be run backwards")

    monkeypatch.setattr("llmdistill.compress.svd_apply.loss_importances", refuse)
    for settings in (SVD(ranks=Allocation.UNIFORM), SVD(ranks=Allocation.ENERGY), SVD(importance=Importance.ENERGY)):
        settings.apply(tiny("llama"), replace(calibration(), examples=rows(2)))
