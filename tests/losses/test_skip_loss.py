"""The losses of skipping: what they count, a step's gradient however it is split, and REINFORCE against finite differences of the exact expectation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import causal, examples, outcome, t5
from torch import nn

from llmdistill.batches import Batch, Pair, collate
from llmdistill.losses import skip_policy
from llmdistill.losses.gates import deciding_by, gate_costs, hard, target_rows_N
from llmdistill.losses.loss import target_logits_NV
from llmdistill.losses.multitask import LabelOnly, Multitask
from llmdistill.losses.recover import FrozenTeacher, RecoveryLoss
from llmdistill.losses.skip import SkipLoss
from llmdistill.losses.skip_policy import SkipPolicyLoss
from llmdistill.losses.token_noise import TokenNoise
from llmdistill.models.feed_forward import replace_feed_forwards
from llmdistill.models.skipped_feed_forward import SkippedFeedForward
from llmdistill.models.skipped_layer import replace_layers
from llmdistill.models.skipping import skipped
from llmdistill.train import Lessons
from llmdistill.train_settings import Steps

MODELS: dict[str, Any] = {"t5": t5, "causal": causal}
each_model = pytest.mark.parametrize("make", list(MODELS.values()), ids=list(MODELS))


def gated(make: Any, *, is_open: bool = False, layers: bool = False) -> Any:
    """A model with gates at feed-forwards or whole layers: all open, or open for about half of the tokens."""
    model, names = make(), ("encoder", "decoder")
    for module in replace_layers(model, names) if layers else replace_feed_forwards(model, SkippedFeedForward, names):
        module.open_gate(0.8)
        if not is_open:
            nn.init.normal_(module.gate.weight)
            nn.init.zeros_(module.gate.bias)
    return model


def skip_loss(model: Any, make: Any, **settings: Any) -> SkipLoss:
    common: Any = {"multitask": Multitask(rationale_weight=0.3), "compute_weight": 0.2, "teacher": FrozenTeacher(make())}
    return SkipLoss(costs=gate_costs(model), **common | settings)


def batch_of(rows: Any, make: Any) -> Batch:
    return collate(rows, causal=make is causal)


@each_model
@pytest.mark.parametrize("shared", [False, True])
def test_with_all_gates_open_it_is_the_loss_of_recovery(make: Any, shared: bool) -> None:
    model, rows = gated(make, is_open=True), examples(6, shared=shared)
    batch = batch_of(rows, make)
    loss = skip_loss(model, make)
    assert loss.parts == ("label", "rationale", "kl_label", "kl_rationale", "compute")
    assert loss.weights == pytest.approx((0.5, 0.15, 1.0, 0.3, 0.2))
    recovery = RecoveryLoss(make(), loss.multitask, hard_weight=0.5)
    sums_P, counts_P = loss.sums_P(model, batch), loss.counts_P(batch)
    # To rounding: in training the activation of a stock T5 is one operation.
    torch.testing.assert_close(sums_P[:-1], recovery.sums_P(make(), batch), rtol=1e-10, atol=1e-10)
    assert torch.equal(counts_P[:-1], recovery.counts_P(batch))
    assert sums_P[-1].item() == counts_P[-1].item()
    pairs = [pair for row in rows for pair in row]
    read = sum(len(tokens) for tokens in {id(pair.input): pair.input for pair in pairs}.values())
    if make is causal:
        tokens = [sum(len(pair.input) + len(pair.target) - 1 for pair in pairs)]
    else:
        tokens = [read, sum(len(pair.target) for pair in pairs)]
    assert counts_P[-1].item() == sum(number * 3 * 16 * 24 for number in tokens)


@each_model
@pytest.mark.parametrize("layers", [False, True])
def test_what_gates_decide_about_padding_counts_for_nothing(make: Any, layers: bool) -> None:
    model = gated(make, layers=layers)
    loss = skip_loss(model, make)
    rows = examples(6)
    together = loss.sums_P(model, batch_of(rows, make))
    apart = torch.stack([loss.sums_P(model, batch_of([row], make)) for row in rows]).sum(0)
    torch.testing.assert_close(together, apart, rtol=1e-4 if make is causal else 1e-9, atol=1e-6)
    assert 0.1 < together[-1].item() / loss.counts_P(batch_of(rows, make))[-1].item() < 0.9


@each_model
def test_shares_of_rows_and_of_the_batch_agree(make: Any) -> None:
    model, batch = gated(make), batch_of(examples(6, shared=True), make)
    costs = gate_costs(model)
    with deciding_by(model, costs, hard) as decided:
        target_logits_NV(model, batch)
    shares_R = decided.shares_R(batch)
    rows_alone = []
    for row in examples(6, shared=True):
        for pair in row if make is causal else [row]:
            one = batch_of([(pair,) if make is causal else row], make)
            with deciding_by(model, costs, hard) as alone:
                target_logits_NV(model, one)
            rows_alone.append(alone.shares_R(one))
    torch.testing.assert_close(shares_R.sort().values, torch.cat(rows_alone).sort().values)


@each_model
@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("policy", [False, True])
def test_eight_at_once_are_eight_times_one(make: Any, layers: bool, policy: bool, tmp_path: Path) -> None:
    weights = []
    for size in (8, 1):
        model = gated(make, layers=layers)
        loss: Any = skip_loss(model, make)
        loss = SkipPolicyLoss(supervised=loss, num_samples=3) if policy else loss
        trained, _ = outcome(model, Lessons(train=examples(8)), tmp_path / str(size), loss=loss, micro_batch_size=size)
        weights.append(load_file(trained.weights))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_a_penalty_shuts_gates_and_without_one_they_stay_open(tmp_path: Path) -> None:
    share = {}
    for compute_weight in (0.0, 20.0):
        model = gated(t5, is_open=True)
        loss = skip_loss(model, t5, compute_weight=compute_weight)
        lessons = Lessons(train=examples(16), validation=examples(6, seed=1))
        _, journal = outcome(model, lessons, tmp_path / str(compute_weight), loss=loss, duration=Steps(30))
        share[compute_weight] = journal["validation_loss_compute"][-1]
    assert share[0.0] > 0.9
    assert share[20.0] < 0.5


def one_row(make: Any) -> Batch:
    """Two tokens to read and one to say: three decisions of a T5, two of a causal model."""
    tokens = np.array([5, 9], dtype=np.int32), np.array([7], dtype=np.int32)
    return replace(collate([(Pair(part=0, input=tokens[0], target=tokens[1]),)], causal=make is causal), step=3)


class Told:
    """In the place of TokenNoise: the actions of each sample are told."""

    def __init__(self, actions: Any, paths: list[str]) -> None:
        self.actions, self.paths = actions, paths

    def __call__(self, batch: Batch, seed: int) -> Told:
        self.lengths = [
            batch.input_EL.shape[1] if path.startswith("encoder") or not batch.decoded else batch.decoded[0].input_GT.shape[1] for path in self.paths
        ]
        return self

    def uniform_BL(self, stack: str, call: int, number: int, sample: int) -> torch.Tensor:
        first = sum(self.lengths[:number])
        return 1.0 - torch.tensor([self.actions[sample][first : first + self.lengths[number]]], dtype=torch.float64)


def exact_cost(model: Any, loss: SkipPolicyLoss, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> float:
    """The expectation of a row's cost over all actions there are."""
    expectation = 0.0
    for actions in all_actions(model, batch):
        monkeypatch.setattr(skip_policy, "TokenNoise", Told([actions] * 2, list(loss.supervised.costs)))
        probability = probability_of(actions, model, loss, batch)
        expectation += probability * loss.sums_P(model, batch)[-1].item()
    return expectation


def all_actions(model: Any, batch: Batch) -> Iterator[tuple[float, ...]]:
    num = batch.input_EL.shape[1] + sum(decoded.input_GT.shape[1] for decoded in batch.decoded)
    return itertools.product((0.0, 1.0), repeat=num)


def probability_of(actions: Any, model: Any, loss: SkipPolicyLoss, batch: Batch) -> float:
    [rule, _] = loss._drawing(batch)
    with torch.no_grad(), deciding_by(model, loss.supervised.costs, rule) as decided:
        target_logits_NV(model, batch)
        return decided.log_probabilities_R(batch).exp().item()


@each_model
@pytest.mark.parametrize("layers", [False, True])
def test_reinforce_is_the_gradient_of_the_expected_cost(make: Any, layers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = gated(make, layers=layers), one_row(make)
    loss = SkipPolicyLoss(supervised=skip_loss(model, make, multitask=LabelOnly(), compute_weight=0.7))
    gates = [parameter for module in skipped(model).values() for parameter in module.gate.parameters()]
    estimated = [torch.zeros_like(gate) for gate in gates]
    others: list[torch.Tensor] = []
    for pair in itertools.product(all_actions(model, batch), repeat=2):
        probability = 1.0
        for actions in pair:
            monkeypatch.setattr(skip_policy, "TokenNoise", Told([actions] * 2, list(loss.supervised.costs)))
            probability *= probability_of(actions, model, loss, batch)
        monkeypatch.setattr(skip_policy, "TokenNoise", Told(pair, list(loss.supervised.costs)))
        model.zero_grad()
        loss.sums_P(model, batch)[-1].backward()
        for total, gate in zip(estimated, gates, strict=True):
            assert gate.grad is not None
            total += probability * gate.grad
        others += [parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None and ".gate." not in name]
        assert not any(gradient.any() for gradient in others), "a reward moves the gates alone"
        others.clear()
    epsilon = 1e-4 if make is causal else 1e-5  # Llama's norm is in float32 whatever the model is in
    with torch.no_grad():
        for total, gate in zip(estimated, gates, strict=True):
            for place in range(0, gate.numel(), 13):
                flat, before = gate.view(-1), gate.view(-1)[place].item()
                values = []
                for step in (epsilon, -epsilon):
                    flat[place] = before + step
                    values.append(exact_cost(model, loss, batch, monkeypatch))
                flat[place] = before
                difference = (values[0] - values[1]) / (2 * epsilon)
                assert total.view(-1)[place].item() == pytest.approx(difference, rel=1e-3, abs=1e-6)


def test_the_supervised_gradient_does_not_reach_the_gates_where_they_are_drawn() -> None:
    model, batch = gated(t5), batch_of(examples(4), t5)
    model.train()
    loss = SkipPolicyLoss(supervised=skip_loss(model, t5))
    loss.sums_P(model, batch)[:-1].sum().backward()
    gates = {id(parameter) for module in skipped(model).values() for parameter in module.gate.parameters()}
    reached = {id(parameter) for parameter in model.parameters() if parameter.grad is not None and parameter.grad.any()}
    assert not reached & gates
    assert len(reached) > 10


def test_in_evaluation_nothing_is_drawn() -> None:
    model, batch = gated(t5).eval(), batch_of(examples(4), t5)
    supervised = skip_loss(model, t5)
    loss = SkipPolicyLoss(supervised=supervised)
    assert torch.equal(loss.sums_P(model, batch)[:-1], supervised.sums_P(model, batch))
    assert torch.equal(loss.sums_P(model, replace(batch, step=9)), loss.sums_P(model, batch))
    assert loss.parts[-2:] == ("compute", "policy")
    assert loss.weights[-2:] == (0.0, 1.0)


@each_model
def test_noise_belongs_to_the_token(make: Any) -> None:
    rows = examples(40)
    batch = batch_of(rows, make)
    stack = "decoder" if make is causal else "encoder"
    noise_EL = TokenNoise(batch, 0).uniform_BL(stack, 0, 1, 0)
    numbers = noise_EL[batch.mask_EL]
    assert 0 <= numbers.min() < 0.05
    assert 0.95 < numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.05)
    assert numbers.var().item() == pytest.approx(1 / 12, abs=0.02)
    for row in rows[:5]:
        alone = batch_of([row], make)
        mine = TokenNoise(alone, 0).uniform_BL(stack, 0, 1, 0)
        for number in range(len(mine)):
            length = int(alone.mask_EL[number].sum())
            assert any(torch.equal(other[:length], mine[number, :length]) for other in noise_EL)
    for changed in (TokenNoise(batch, 1), TokenNoise(replace(batch, step=1), 0)):
        other_EL = changed.uniform_BL(stack, 0, 1, 0)
        assert abs(torch.corrcoef(torch.stack([other_EL[batch.mask_EL], numbers]))[0, 1].item()) < 0.15
    assert not torch.equal(TokenNoise(batch, 0).uniform_BL(stack, 0, 1, 1), noise_EL)


def test_a_t5_decoders_noise_differs_by_what_was_read() -> None:
    pair = Pair(part=0, input=np.array([5, 9], dtype=np.int32), target=np.array([7, 8], dtype=np.int32))
    other = replace(pair, input=np.array([5, 9, 4], dtype=np.int32))
    noise_GT = TokenNoise(collate([(pair,), (other,)], causal=False), 0).uniform_BL("decoder", 0, 1, 0)
    assert not (noise_GT[0] == noise_GT[1]).any()


@each_model
def test_every_target_has_its_row(make: Any) -> None:
    rows = examples(5, shared=True)
    batch = batch_of(rows, make)
    by_row = target_rows_N(batch).bincount(minlength=len(batch.input_EL)).tolist()
    pairs = [[pair] for pair in sorted((pair for row in rows for pair in row), key=lambda pair: pair.part)] if make is causal else rows
    assert sorted(by_row) == sorted(sum(len(pair.target) for pair in group) for group in pairs)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda loss: replace(loss, compute_weight=-1.0), "compute_weight is -1.0; give 0 or more"),
        (lambda loss: replace(loss, hard_weight=0.0, kl_weight=0.0), "give 0 or more, and one of them more than 0"),
        (lambda loss: replace(loss, temperature=0.0), "temperature is 0.0; give more than 0"),
        (lambda loss: SkipPolicyLoss(supervised=loss, num_samples=1), "num_samples is 1; give 2 or more"),
        (lambda loss: SkipPolicyLoss(supervised=loss, policy_weight=0.0), "policy_weight is 0.0; give more than 0"),
        (lambda loss: gate_costs(t5()), "no gates, so there is nothing to skip"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: Any, message: str) -> None:
    model = gated(t5)
    with pytest.raises(ValueError, match=message):
        wrong(skip_loss(copy.deepcopy(model), t5))
