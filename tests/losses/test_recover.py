"""The loss of recovery: its value and gradient are those of a reference by hand in float64, however a step is split; the teacher is never touched."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_training import SETTINGS, Journal, causal, examples, outcome, t5
from torch import Tensor

from llmdistill.batches import collate
from llmdistill.losses import recover
from llmdistill.losses.multitask import LabelOnly, Multitask
from llmdistill.losses.recover import RecoveryLoss, token_kl_N
from llmdistill.train import Lessons, Objective, train
from llmdistill.train_settings import Best, Precision, Steps

MODELS: dict[str, Any] = {"t5": t5, "causal": causal}
each_model = pytest.mark.parametrize("make", list(MODELS.values()), ids=list(MODELS))


def other(make: Any, **settings: Any) -> Any:
    """A model of the same shape with other weights."""
    model = make(**settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype) * 0.3)
    return model


def logits_TV(model: Any, pair: Any) -> Tensor:
    """One pair alone through transformers, so that nothing is padded."""
    target_T, input_L = (torch.from_numpy(tokens.astype(np.int64)) for tokens in (pair.target, pair.input))
    if model.config.is_encoder_decoder:
        decoder_input = torch.cat([torch.tensor([pair.start]), target_T[:-1]])
        return model(input_ids=input_L[None], decoder_input_ids=decoder_input[None]).logits[0]
    return model(input_ids=torch.cat([input_L, target_T])[None]).logits[0, len(input_L) - 1 : -1]


def by_hand(model: Any, teacher: Any, rows: Any, temperature: float) -> Tensor:
    """Sums of label, rationale, kl_label and kl_rationale by the formulas."""
    sums: list[Any] = [0.0, 0.0, 0.0, 0.0]
    for pair in (pair for row in rows for pair in row):
        student_TV, teacher_TV = logits_TV(model, pair).double(), logits_TV(teacher, pair).double().detach()
        log_s_TV, log_q_TV = (F.log_softmax(one / temperature, -1) for one in (student_TV, teacher_TV))
        sums[pair.part] += F.cross_entropy(student_TV, torch.from_numpy(pair.target.astype(np.int64)), reduction="sum")
        sums[2 + pair.part] += temperature**2 * (log_q_TV.exp() * (log_q_TV - log_s_TV)).sum()
    return torch.stack(sums)


@each_model
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_value_and_gradient_are_those_of_the_formulas(make: Any, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "CHUNK_NUMBERS", 300)  # several chunks
    rows = examples(6)
    model, again, teacher = make(), make(), other(make)
    loss = RecoveryLoss(teacher, Multitask(rationale_weight=0.3), hard_weight=0.5, kl_weight=2.0, temperature=temperature)
    batch = collate(rows, causal=make is causal)
    assert loss.parts == ("label", "rationale", "kl_label", "kl_rationale")
    assert loss.weights == pytest.approx((0.5, 0.15, 2.0, 0.6))
    sums_P, expected_P = loss.sums_P(model, batch), by_hand(again, teacher, rows, temperature)
    rtol, atol = (1e-4, 1e-6) if make is causal else (1e-8, 1e-10)  # Llama's norm and rotation are in float32 whatever the model is in
    torch.testing.assert_close(sums_P.double(), expected_P, rtol=rtol, atol=atol)
    counts_P = loss.counts_P(batch)
    assert counts_P.tolist() == [sum(len(pair.target) for row in rows for pair in row if pair.part == part) for part in (0, 1, 0, 1)]
    weights_P = torch.tensor(loss.weights, dtype=torch.float64) / counts_P
    (weights_P * sums_P).sum().backward()
    (weights_P * expected_P).sum().backward()
    for (name, parameter), reference in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_the_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = (torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda logits_NV: token_kl_N(logits_NV, teacher_NV, 1.7), (student_NV,))
    token_kl_N(student_NV, teacher_NV, 2.0).sum().backward()
    assert teacher_NV.grad is None


@each_model
def test_a_model_has_nothing_to_learn_from_itself(make: Any) -> None:
    model = make().eval()
    loss = RecoveryLoss(copy.deepcopy(model), Multitask(), hard_weight=0.0, temperature=2.0)
    sums_P = loss.sums_P(model, collate(examples(4), causal=make is causal))
    assert sums_P[2:].abs().max() < 1e-12
    sums_P[2:].sum().backward()
    assert all(parameter.grad is None or parameter.grad.abs().max() < 1e-12 for parameter in model.parameters())


def test_kl_is_never_negative_and_is_zero_where_the_logits_differ_by_a_number() -> None:
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = (torch.randn(50, 9, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    assert token_kl_N(student_NV, teacher_NV, 1.0).min() > 0
    torch.testing.assert_close(token_kl_N(teacher_NV + 3, teacher_NV, 1.5), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-12)


def test_at_high_temperature_it_is_the_squared_difference_of_centred_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = (torch.randn(20, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    difference_NV = (student_NV - student_NV.mean(-1, keepdim=True)) - (teacher_NV - teacher_NV.mean(-1, keepdim=True))
    limit_N = difference_NV.square().mean(-1) / 2
    for temperature, rtol in ((1e2, 2e-1), (1e4, 2e-3)):
        torch.testing.assert_close(token_kl_N(student_NV, teacher_NV, temperature), limit_N, rtol=rtol, atol=0)


def test_it_is_computed_in_float32_or_above() -> None:
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = (torch.randn(8, 40, generator=generator).bfloat16() for _ in range(2))
    kl_N = token_kl_N(student_NV, teacher_NV, 2.0)
    assert kl_N.dtype == torch.float32
    torch.testing.assert_close(kl_N.double(), token_kl_N(student_NV.double(), teacher_NV.double(), 2.0), rtol=1e-5, atol=1e-6)


@each_model
def test_eight_at_once_are_eight_times_one(make: Any, tmp_path: Path) -> None:
    weights = []
    for size in (8, 1):
        loss = RecoveryLoss(other(make), Multitask(rationale_weight=0.3), temperature=2.0)
        trained, _ = outcome(make(), Lessons(train=examples(8)), tmp_path / str(size), loss=loss, micro_batch_size=size)
        weights.append(load_file(trained.weights))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-8, atol=1e-10)


def test_the_teacher_is_neither_trained_nor_saved_nor_made_to_forget(tmp_path: Path) -> None:
    teacher: Any = other(t5, dropout=0.4)
    before = copy.deepcopy(teacher.state_dict())
    loss = RecoveryLoss(teacher.train(), Multitask(), temperature=2.0)
    objective = Objective(t5(), loss)
    assert not any("teacher" in name for name in objective.state_dict())
    assert {id(parameter) for parameter in teacher.parameters()}.isdisjoint(id(parameter) for parameter in objective.parameters())
    lessons = Lessons(train=examples(8), validation=examples(4, seed=1))
    trained, journal = outcome(t5(), lessons, tmp_path, loss=loss, evaluate_every_steps=2, best=Best.LOSS)
    assert not teacher.training, "dropout would make it say something else each time"
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert load_file(trained.weights).keys() == dict(t5().named_parameters()).keys()
    for part in ("label", "rationale", "kl_label", "kl_rationale"):
        assert len(journal[f"loss_{part}"]) == 4
        assert len(journal[f"validation_loss_{part}"]) == 2
    line = next(line for line in journal.lines if "validation_loss" in line)
    assert line["validation_loss"] == pytest.approx(sum(line[f"validation_loss_{part}"] for part in loss.parts), rel=1e-6)


def test_a_student_comes_near_its_teacher(tmp_path: Path) -> None:
    loss = RecoveryLoss(other(t5), Multitask(), hard_weight=0.0)
    _, journal = outcome(t5(), Lessons(train=examples(16)), tmp_path, loss=loss, duration=Steps(30))
    assert journal["loss_kl_label"][-1] < 0.5 * journal["loss_kl_label"][0]
    assert journal["loss_kl_rationale"][-1] < 0.5 * journal["loss_kl_rationale"][0]


def test_in_bfloat16_it_is_nearly_the_same(tmp_path: Path) -> None:
    losses = []
    for precision in (Precision.FLOAT32, Precision.BFLOAT16):
        loss, journal = RecoveryLoss(other(t5, dtype=torch.float32), LabelOnly(), temperature=2.0), Journal()
        settings = replace(SETTINGS, precision=precision, learning_rate=1e-3)
        rows = [tuple(pair for pair in row if pair.part == 0) for row in examples(8)]
        train(t5(dtype=torch.float32), Lessons(train=rows), loss, settings, tmp_path / precision.name, seed=0, journal=journal)
        losses.append(journal["loss_kl_label"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


def test_what_cannot_be_is_refused() -> None:
    for settings, message in (
        ({"hard_weight": -1.0}, "hard_weight is -1.0"),
        ({"hard_weight": 0.0, "kl_weight": 0.0}, "one of them more than 0"),
        ({"temperature": 0.0}, "temperature is 0.0; give more than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RecoveryLoss(t5(), Multitask(), **settings)
    model: Any = t5()
    batch = collate(examples(2), causal=False)
    with pytest.raises(ValueError, match="is its teacher too"):
        RecoveryLoss(model, Multitask()).sums_P(model, batch)
    larger: Any = t5()
    larger.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(ValueError, match="has 70 tokens and the student 60"):
        RecoveryLoss(larger, Multitask()).sums_P(t5(), batch)
