"""The loop: its gradient is that of transformers' own forward pass however a step is split; the best weights are kept; figures go where they should."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import Journal, causal, examples, in_two_processes, loss_by_hand, outcome, run, t5
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel

from llmdistill.batches import Example
from llmdistill.losses.multitask import LabelOnly, Multitask
from llmdistill.train import Lessons, train
from llmdistill.train_settings import AdamW, BatchUnit, Best, Precision, Steps, Tracker, TrainSettings

MODELS: dict[str, tuple[Callable[[], PreTrainedModel], list[Example]]] = {
    "two-pass": (t5, examples(8)),
    "shared encoder": (t5, examples(8, shared=True)),
    "causal": (causal, examples(8)),
}
each_form = pytest.mark.parametrize("form", list(MODELS))


class Gradients:
    """The clipped gradients that each optimizer step of this thread was given, by parameter's number."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def __enter__(self) -> "Gradients":
        self._hook = register_optimizer_step_pre_hook(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _note(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.steps.append([parameter.grad.clone() for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None])

    def norms(self) -> list[float]:
        return [torch.stack([gradient.norm() for gradient in step]).norm().item() for step in self.steps]


def first_gradients(form: str, folder: Path, **settings: Any) -> list[Tensor]:
    make, rows = MODELS[form]
    with Gradients() as gradients:
        run(make(), rows, folder, duration=Steps(1), max_gradient_norm=1e9, **settings)
    return gradients.steps[0]


# The counts are divided by in float32, and Llama's norm and rotation are in float32 whatever the model is in.
@each_form
@pytest.mark.parametrize("micro_batch_size", [8, 3, 1])
def test_a_steps_gradient_is_that_of_the_unpadded_rows(form: str, micro_batch_size: int, tmp_path: Path) -> None:
    make, rows = MODELS[form]
    model = make()
    ours = first_gradients(form, tmp_path, micro_batch_size=micro_batch_size)
    loss_by_hand(model, rows, (1.0, 0.3)).backward()
    by_size = [parameter for parameter in model.parameters() if parameter.ndim >= 2] + [parameter for parameter in model.parameters() if parameter.ndim < 2]
    theirs = [parameter.grad for parameter in by_size if parameter.grad is not None]
    assert max(gradient.abs().max().item() for gradient in ours) > 1e-3
    rtol, atol = (1e-4, 1e-7) if form == "causal" else (1e-6, 1e-9)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "form, unit",
    [(form, BatchUnit.EXAMPLES) for form in MODELS] + [("two-pass", BatchUnit.PADDED_TOKENS)],
)
def test_eight_at_once_are_eight_times_one(form: str, unit: BatchUnit, tmp_path: Path) -> None:
    make, rows = MODELS[form]
    size = 8 if unit is BatchUnit.EXAMPLES else 400
    whole, journal = run(make(), rows, tmp_path / "8x1", batch_unit=unit, batch_size=size, micro_batch_size=size)
    pieces, _ = run(make(), rows, tmp_path / "1x8", batch_unit=unit, batch_size=size, micro_batch_size=1)
    before = dict(make().named_parameters())
    assert journal["loss"][-1] < journal["loss"][0]
    for name, weight in whole.items():
        torch.testing.assert_close(weight, pieces[name], rtol=1e-9, atol=1e-11)
        assert not torch.equal(weight, before[name]), f"{name} was not trained"


@each_form
def test_in_float32_they_differ_by_rounding(form: str, tmp_path: Path) -> None:
    make, rows = MODELS[form]
    optimizer = AdamW(epsilon=1e-3)  # with 1e-8 Adam's first steps turn the rounding of a gradient near 0 into a whole step
    whole, pieces = (
        run(make().float(), rows, tmp_path / str(size), micro_batch_size=size, optimizer=optimizer)[0]
        for size in (8, 1)
    )  # fmt: skip
    torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=2e-6)


def test_the_loss_of_a_step_is_logged_with_its_parts(tmp_path: Path) -> None:
    make, rows = MODELS["two-pass"]
    _, journal = run(make(), rows, tmp_path, duration=Steps(2), micro_batch_size=3)
    model = make()
    label, rationale = (loss_by_hand(model, rows, weights).item() for weights in ((1.0, 0.0), (0.0, 1.0)))
    first = journal.lines[0]
    assert first["loss_label"] == pytest.approx(label)
    assert first["loss_rationale"] == pytest.approx(rationale)
    assert first["loss"] == pytest.approx(label + 0.3 * rationale)
    assert (first["step"], journal.lines[1]["step"]) == (1, 2)
    assert 0 < first["padding_percent"] < 100


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    make, rows = MODELS["two-pass"]
    with Gradients() as gradients:
        _, journal = run(make(), rows, tmp_path / "clipped", duration=Steps(3), max_gradient_norm=1e-3)
    assert gradients.norms() == pytest.approx([1e-3] * 3, rel=1e-2)  # torch divides by the norm and a millionth
    with Gradients() as gradients:
        _, loose = run(make(), rows, tmp_path / "loose", duration=Steps(1), max_gradient_norm=1e6)
    assert gradients.norms() == pytest.approx(loose["gradient_norm"])
    assert journal["gradient_norm"][0] == pytest.approx(loose["gradient_norm"][0])
    assert loose["gradient_norm"][0] > 1e-2


SCORES = {2: 0.5, 4: 0.8, 6: 0.8, 8: 0.1, 10: 0.9}


class Scripted:
    """A score that goes up and down as written, by the number of the evaluation."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.num_evaluations = 0
        self.model = model
        self.weights: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module) -> dict[str, float]:
        assert model is self.model
        assert not model.training
        self.weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        self.num_evaluations += 1
        return {"validation_accuracy": SCORES[2 * self.num_evaluations]}


@pytest.mark.parametrize("patience, kept, ended", [(0, 10, 10), (2, 4, 8), (3, 10, 10)])
def test_the_best_weights_are_kept_and_patience_ends_it(patience: int, kept: int, ended: int, tmp_path: Path) -> None:
    model = t5()
    score = Scripted(model)
    lessons = Lessons(train=examples(20), validation=examples(5, seed=1), score=score)
    settings: dict[str, Any] = {"duration": Steps(10), "evaluate_every_steps": 2, "best": Best.ACCURACY, "patience_evaluations": patience}
    trained, journal = outcome(model, lessons, tmp_path, **settings)
    assert journal["validation_accuracy"] == list(SCORES.values())[: ended // 2]
    assert (trained.figures["kept_step"], trained.figures["kept_validation_accuracy"], trained.figures["num_steps"]) == (kept, SCORES[kept], ended)
    for name, weight in load_file(trained.weights).items():
        assert torch.equal(weight, score.weights[kept // 2 - 1][name])


@pytest.mark.parametrize("best", [Best.LOSS, Best.LABEL_LOSS])
def test_the_validation_loss_is_that_of_the_kept_weights(best: Best, tmp_path: Path) -> None:
    model, validation = t5(), examples(7, seed=1)
    lessons = Lessons(train=examples(4), validation=validation)
    trained, journal = outcome(model, lessons, tmp_path, duration=Steps(24), evaluate_every_steps=4, best=best, micro_batch_size=3, learning_rate=0.05)
    losses = journal[best.figure]
    assert losses.index(min(losses)) < 5, "this test needs a student that overfits"
    assert trained.figures["kept_step"] == 4 * (losses.index(min(losses)) + 1)
    model.load_state_dict(load_file(trained.weights), strict=False)
    weights = (1.0, 0.3) if best is Best.LOSS else (1.0, 0.0)
    assert loss_by_hand(model.eval(), validation, weights).item() == pytest.approx(min(losses), rel=1e-6)
    assert trained.figures[f"kept_{best.figure}"] == min(losses)


def test_evaluation_does_not_change_what_is_learned(tmp_path: Path) -> None:
    model = t5(dropout=0.2)
    seen, _ = outcome(model, Lessons(train=examples(20), validation=examples(5)), tmp_path / "a", evaluate_every_steps=1)
    unseen, _ = outcome(t5(dropout=0.2), Lessons(train=examples(20)), tmp_path / "b")
    other, _ = outcome(t5(dropout=0.2), Lessons(train=examples(20)), tmp_path / "c", seed=1)
    weights, again, differently = (load_file(trained.weights) for trained in (seen, unseen, other))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not any(torch.equal(weights[name], differently[name]) for name in weights)


def test_what_is_logged_is_said_in_what_unit(tmp_path: Path) -> None:
    _, journal = outcome(t5(), Lessons(train=examples(8), validation=examples(4)), tmp_path)
    plain = {"step", "learning_rate", "gradient_norm", "loss", "loss_label", "loss_rationale"}  # losses are in nats a token
    plain |= {"validation_loss", "validation_loss_label", "validation_loss_rationale"}
    units = ("_per_second", "_percent")
    names = {name for line in journal.lines for name in line}
    assert plain <= names
    assert {name for name in names - plain if not name.endswith(units)} == set()
    assert {"examples_per_second", "tokens_per_second", "padding_percent"} <= names


def test_tensorboard_is_told(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lessons = Lessons(train=examples(8), validation=examples(4))
    _, journal = outcome(t5(), lessons, tmp_path / "training", trackers=(Tracker.TENSORBOARD,), evaluate_every_steps=3)
    (file,) = (tmp_path / "trackers").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    for name in ("loss", "learning_rate", "validation_loss_label"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(line["step"], pytest.approx(line[name])) for line in journal.lines if name in line]


@each_form
def test_bfloat16_trains_float32_weights(form: str, tmp_path: Path) -> None:
    make, rows = MODELS[form]
    bfloat16, journal = run(make().float(), rows, tmp_path / "bfloat16", precision=Precision.BFLOAT16, learning_rate=1e-3)
    float32, exact = run(make().float(), rows, tmp_path / "float32", learning_rate=1e-3)
    assert {weight.dtype for weight in bfloat16.values()} == {torch.float32}
    assert journal["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert journal["loss"] != exact["loss"]
    assert journal["loss"][-1] < journal["loss"][0]
    assert all(torch.equal(float32[name], again) for name, again in run(make().float(), rows, tmp_path / "again", learning_rate=1e-3)[0].items())


def test_a_diverged_training_says_so(tmp_path: Path) -> None:
    model = t5()
    torch.nn.init.constant_(model.get_input_embeddings().weight, torch.nan)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"loss is nan at step 1; lower learning_rate"):
        run(model, examples(8), tmp_path)


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for settings, loss, message in (
        (TrainSettings(), Multitask(), "there are none; give some, or set best=LAST"),
        (TrainSettings(best=Best.LAST), None, "no examples to train on"),
    ):
        rows = examples(4) if loss else []
        with pytest.raises(ValueError, match=message):
            train(t5(), Lessons(train=rows), loss or LabelOnly(), settings, tmp_path, seed=0, journal=Journal())
    frozen = t5().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        run(frozen, examples(4), tmp_path)
    with pytest.raises(ValueError, match=r"best=ACCURACY looks at validation_accuracy, and this training has validation_loss, "):
        outcome(t5(), Lessons(train=examples(4), validation=examples(2)), tmp_path, best=Best.ACCURACY)


PROCESS_RUNS: dict[str, dict[str, Any]] = {
    "t5": {"batch_size": 7, "micro_batch_size": 2},
    "t5 idle": {"batch_size": 5, "micro_batch_size": 1},  # five rows for two processes, one at a time
    "causal tokens": {"batch_size": 60, "batch_unit": BatchUnit.PADDED_TOKENS, "micro_batch_size": 25},
    "float32": {"batch_size": 8, "optimizer": AdamW(epsilon=1e-3)},
}


def of_processes(name: str, folder: Path) -> tuple[dict[str, Tensor], Journal]:
    """One of the runs, by however many processes there are."""
    model = causal() if "causal" in name else t5(dtype=torch.float32 if name == "float32" else torch.float64)
    lessons = Lessons(train=examples(23), validation=examples(5, seed=1), score=lambda model: {"validation_accuracy": 1.0})
    trained, journal = outcome(model, lessons, folder, evaluate_every_steps=2, **PROCESS_RUNS[name])
    (folder / f"journal-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(journal.lines))  # a file for each process
    return load_file(trained.weights), journal


def all_of_processes(folder: Path) -> None:
    """All of the runs."""
    for name in PROCESS_RUNS:
        of_processes(name, folder / name)


def test_two_processes_are_one(tmp_path: Path) -> None:
    in_two_processes(all_of_processes, tmp_path / "two")
    for name in PROCESS_RUNS:
        one, journal = of_processes(name, tmp_path / "one" / name)
        two = load_file(tmp_path / "two" / name / "weights-00000004.safetensors")
        told = json.loads((tmp_path / "two" / name / "journal-0.json").read_text())
        rtol, atol = (1e-4, 2e-6) if name == "float32" else (1e-9, 1e-11)
        assert one.keys() == two.keys()
        for weight in one:
            torch.testing.assert_close(two[weight], one[weight], rtol=rtol, atol=atol)
        for line, other in zip(journal.lines, told, strict=True):
            for figure in line.keys() - {"examples_per_second", "tokens_per_second", "padding_percent"}:
                assert other[figure] == pytest.approx(line[figure], rel=1e-4), figure
