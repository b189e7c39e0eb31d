"""An elastic student in the one training loop: its gradient is that of whole and extracted sub-networks, however a step is split or a run is broken."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_models import elastic_model, rows
from safetensors.torch import load_file
from tiny_training import Journal, in_two_processes

from llmdistill.batches import Batch, collate
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.extract import extracted
from llmdistill.elastic.space import Space
from llmdistill.elastic.strategy import Progressive, Sandwich, watched
from llmdistill.elastic.subnet import running, with_subnet
from llmdistill.losses.in_place import InPlaceLoss
from llmdistill.losses.loss import cross_entropy_P, target_logits_NV
from llmdistill.losses.multitask import LabelOnly, Multitask
from llmdistill.losses.recover import FrozenTeacher
from llmdistill.train import Lessons, train
from llmdistill.train_settings import Best, Steps, TrainSettings

AXES = Axes(ffn=(0.5,), heads=(0.5,), depth=(0.34,), width=(0.5,))
FORMS = pytest.mark.parametrize("name", ["t5 v1.0", "t5 v1.1", "llama grouped", "qwen2"])


def loss_of(space: Space, strategy: Sandwich | Progressive = Sandwich(), **settings: Any) -> InPlaceLoss:
    at = strategy.subnets(space, seed=0, num_steps=6)
    return InPlaceLoss(
        multitask=Multitask(rationale_weight=0.5),
        guises=lambda step: [partial(with_subnet, subnet=subnet) for subnet in at(step)],
        watched=[partial(with_subnet, subnet=subnet) for subnet in watched(space, seed=0)],
        num_subnets=strategy.num_subnets,
        **settings,
    )


def batch_of(model: Any, step: int = 4) -> Batch:
    batch = collate(rows(5), causal=not model.config.is_encoder_decoder)
    return Batch(**{**vars(batch), "step": step})


@FORMS
@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_sums_are_those_of_the_whole_and_of_extracted_sub_networks(name: str, is_frozen: bool) -> None:
    model, space = elastic_model(name, AXES, torch.float64)
    model.train()
    other: Any = perturbed(model) if is_frozen else None
    loss, batch = loss_of(space, temperature=2.0, hard_weight=0.25, teacher=FrozenTeacher(other) if is_frozen else None), batch_of(model)
    with torch.no_grad():
        sums_P, whole_NV = loss.sums_P(model, batch), target_logits_NV(model, batch)
        q_NV = ((target_logits_NV(other, batch) if is_frozen else whole_NV) / 2).softmax(-1)

        def kl_Q(logits_NV: torch.Tensor) -> torch.Tensor:
            kl_N = 4 * (q_NV * (q_NV.log() - (logits_NV / 2).log_softmax(-1))).sum(-1)
            return torch.stack([kl_N[batch.part_N == part].sum() for part in (0, 1)])

        expected = [cross_entropy_P(whole_NV, batch, num_parts=2), *([kl_Q(whole_NV)] if is_frozen else [])]
        small = [target_logits_NV(extracted(model, subnet), batch) for subnet in Sandwich().subnets(space, seed=0, num_steps=6)(batch.step)]
        expected.append(torch.stack([cross_entropy_P(logits_NV, batch, num_parts=2) for logits_NV in small]).sum(0))
        expected.append(torch.stack([kl_Q(logits_NV) for logits_NV in small]).sum(0))
    torch.testing.assert_close(sums_P, torch.cat(expected), rtol=1e-5, atol=1e-6)
    counts_Q = torch.bincount(batch.part_N)
    assert loss.counts_P(batch).tolist() == torch.cat([*[counts_Q] * (1 + is_frozen), 3 * counts_Q, 3 * counts_Q]).tolist()
    own = ("label", "rationale", *(("whole_kl_label", "whole_kl_rationale") if is_frozen else ()))
    assert loss.parts == (*own, "subnets_label", "subnets_rationale", "kl_label", "kl_rationale")
    assert loss.weights == (*((0.25, 0.125, 1.0, 0.5) if is_frozen else (1.0, 0.5)), 0.75, 0.375, 3.0, 1.5)
    assert running(model) is None


def perturbed(model: Any) -> Any:
    """Another model of the same shape."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    return other


@FORMS
def test_a_sub_networks_gradient_touches_only_its_slices(name: str) -> None:
    model, space = elastic_model(name, AXES)
    smallest = space.smallest()
    with with_subnet(model, smallest):
        target_logits_NV(model, batch_of(model)).square().sum().backward()
    small = extracted(model, smallest)
    target_logits_NV(small, batch_of(model)).square().sum().backward()
    touched = sum(int((parameter.grad != 0).sum()) for parameter in model.parameters() if parameter.grad is not None)
    theirs = sum(int((parameter.grad != 0).sum()) for parameter in small.parameters() if parameter.grad is not None)
    assert 0 < touched == theirs <= sum(parameter.numel() for parameter in small.parameters())


@FORMS
def test_the_teacher_gets_no_gradient_from_its_pupils(name: str) -> None:
    model, space = elastic_model(name, AXES)
    model.train()
    loss = loss_of(space, Sandwich(num_random=0))
    loss.sums_P(model, batch_of(model))[4:].sum().backward()
    layers = model.decoder.block if model.config.is_encoder_decoder else model.model.layers
    stays = space.stacks[-1].kept_layers(1)
    for number, layer in enumerate(layers):
        reached = any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in layer.parameters())
        assert reached == (number in stays)


def trained(
    name: str, folder: Path, *, strategy: Sandwich | Progressive = Sandwich(), is_frozen: bool = False, dtype: torch.dtype = torch.float64, **settings: Any
) -> Any:
    model, space = elastic_model(name, AXES, dtype)
    loss = loss_of(space, strategy, teacher=FrozenTeacher(perturbed(model)) if is_frozen else None)
    chosen = TrainSettings(duration=Steps(6), batch_size=8, evaluate_every_steps=2, learning_rate=1e-2, best=Best.LAST, **settings)
    journal = Journal()
    done = train(model, Lessons(train=rows(20), validation=rows(5, seed=1)), loss, chosen, folder, seed=0, journal=journal)
    return load_file(done.weights), journal


@FORMS
@pytest.mark.parametrize("strategy", [Sandwich(), Progressive()])
def test_eight_at_once_are_eight_times_one(name: str, strategy: Sandwich | Progressive, tmp_path: Path) -> None:
    whole, _ = trained(name, tmp_path / "8x1", micro_batch_size=8, strategy=strategy)
    pieces, _ = trained(name, tmp_path / "1x8", micro_batch_size=1, strategy=strategy)
    rtol, atol = (1e-6, 1e-8) if "t5" in name else (1e-4, 1e-6)  # Llama's norm is in float32 whatever the model is in
    torch.testing.assert_close(pieces, whole, rtol=rtol, atol=atol)


PROCESS_RUNS: dict[str, dict[str, Any]] = {
    "t5 v1.1": {"strategy": Sandwich(), "is_frozen": True, "micro_batch_size": 2},
    "qwen2": {"strategy": Progressive(), "micro_batch_size": 8},
}


def all_of_processes(folder: Path) -> None:
    """A run of each strategy, by however many processes there are."""
    for name, settings in PROCESS_RUNS.items():
        trained(name, folder / name, **settings)


def test_two_processes_are_one(tmp_path: Path) -> None:
    in_two_processes(all_of_processes, tmp_path / "two")
    for name, settings in PROCESS_RUNS.items():
        one, _ = trained(name, tmp_path / name, **settings)
        two = load_file(tmp_path / "two" / name / "weights-00000006.safetensors")
        rtol, atol = (1e-6, 1e-8) if "t5" in name else (1e-4, 1e-6)
        torch.testing.assert_close(two, one, rtol=rtol, atol=atol)


def test_a_broken_run_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    unbroken, _ = trained("t5 v1.1", tmp_path / "unbroken", dtype=torch.float32)

    class Killed(Exception):
        pass

    class Deadly(Journal):
        def log_metrics(self, **values: Any) -> None:
            super().log_metrics(**values)
            if values["step"] == 4 and "validation_loss" in values:
                raise Killed

    for journal in (Deadly(), Journal()):
        model, space = elastic_model("t5 v1.1", AXES)
        settings = TrainSettings(duration=Steps(6), batch_size=8, evaluate_every_steps=2, learning_rate=1e-2, best=Best.LAST, checkpoint_every_s=1e-9)
        lessons = Lessons(train=rows(20), validation=rows(5, seed=1))
        if isinstance(journal, Deadly):
            with pytest.raises(Killed):
                train(model, lessons, loss_of(space), settings, tmp_path / "broken", seed=0, journal=journal)
        else:
            done = train(model, lessons, loss_of(space), settings, tmp_path / "broken", seed=0, journal=journal)
            assert journal["step"][0] > 1
            resumed = load_file(done.weights)
            assert all(torch.equal(resumed[weight], unbroken[weight]) for weight in unbroken)


def test_sub_networks_say_what_the_whole_says_as_they_do_not_when_it_is_trained_alone(tmp_path: Path) -> None:
    divergence = {}
    for together in (True, False):
        model, space = elastic_model("t5 v1.1", AXES)
        elastic = loss_of(space)
        settings = TrainSettings(duration=Steps(40), batch_size=8, evaluate_every_steps=40, learning_rate=1e-2, best=Best.LAST)
        loss = elastic if together else elastic.multitask
        train(model, Lessons(train=rows(20)), loss, settings, tmp_path / str(together), seed=0, journal=Journal())
        model.eval()
        with torch.no_grad():
            divergence[together] = float(elastic.sums_P(model, batch_of(model))[4:].sum())
    assert divergence[True] < 0.75 * divergence[False]


@pytest.mark.parametrize("wrong", [{"hard_weight": -1.0}, {"hard_weight": 0.0, "kl_weight": 0.0}, {"temperature": 0.0}, {"num_subnets": 0}, {"watched": []}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    guise: Any = None
    settings: dict[str, Any] = {"multitask": LabelOnly(), "guises": lambda step: [guise], "watched": [guise], "num_subnets": 1}
    with pytest.raises(ValueError, match="; give "):
        InPlaceLoss(**settings | wrong)
