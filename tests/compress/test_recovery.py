"""Recovery: a student crushed to rank 1 comes back towards what it was; killed and resumed runs end in the same bits; integers are trained and left behind."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_models import MODELS, calibration, logits, tiny
from torch import Tensor

from llmdistill.batches import Example, Pair
from llmdistill.compress.int4 import Int4
from llmdistill.compress.int8 import Int8
from llmdistill.compress.recover_run import QuantizationAware, Recovered, recover
from llmdistill.compress.recovery import Recover, StepStart
from llmdistill.compress.slots import HEAD, slots
from llmdistill.compress.smooth import SmoothQuant
from llmdistill.core.spec import parse, write
from llmdistill.losses.multitask import Multitask
from llmdistill.losses.recover import RecoveryLoss
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.structure import structure_of, ties_of
from llmdistill.train import Lessons
from llmdistill.train_settings import Best, Schedule, Steps, TrainSettings
from llmdistill.tuning import LoRA

SETTINGS = TrainSettings(
    batch_size=16, duration=Steps(12), learning_rate=3e-3, schedule=Schedule.CONSTANT, warmup=Steps(0), evaluate_every_steps=4, log_every_steps=4
)
RECOVER = Recover(settings=SETTINGS)


@functools.cache
def teacher(name: str) -> Any:
    """A model that is sure of what it says, and whose blocks have much to do with it."""
    model = tiny(name)
    with torch.no_grad():
        for slot in slots(model):
            slot.module(model).weight.mul_(2 if slot.path != HEAD else 4 if "t5" in name else 25)
    return model


@functools.cache
def taught(name: str) -> Lessons:
    """What a teacher says to random inputs: there is something to learn that holds for other inputs as well."""
    model = teacher(name)

    def examples(num: int, seed: int) -> list[Example]:
        input_BL = torch.randint(3, 12, (num, 4), generator=torch.Generator().manual_seed(seed))
        answer_BT = model.generate(input_BL, attention_mask=torch.ones_like(input_BL), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        answer_BT = answer_BT[:, 1:] if model.config.is_encoder_decoder else answer_BT[:, input_BL.shape[1] :]
        arrays = [[row.numpy().astype("int32") for row in tensor] for tensor in (input_BL, answer_BT)]
        return [(Pair(part=0, input=given, target=answer[:2]), Pair(part=1, input=given, target=answer)) for given, answer in zip(*arrays, strict=True)]

    return Lessons(train=examples(96, 0), validation=examples(24, 1))


class Journal:
    """Remembers what was logged, and can stop the run, as a kill would, before the step with this number."""

    def __init__(self, stop_before: int = 0) -> None:
        self.lines: list[dict[str, Any]] = []
        self.stop_before, self.step = stop_before, 0

    def log_metrics(self, **values: Any) -> None:
        self.lines.append(values)

    @contextmanager
    def progress(self, total: int, unit: str) -> Iterator[Any]:
        yield self

    def advance(self, num: int = 1) -> None:
        self.step += num
        if self.stop_before and self.step == self.stop_before:
            raise Killed


class Killed(Exception):
    pass


def crushed(name: str, rank: int = 1, *, shared: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """The teacher with every linear of its blocks at this rank; `shared` gives q, k and v of causal models one down-projection."""
    model = copy.deepcopy(teacher(name))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for slot in slots(model):
        if slot.path != HEAD:
            linear = slot.module(model)
            left_OR, values_R, right_RI = torch.linalg.svd(linear.weight.detach().float(), full_matrices=False)
            bias_O = None if linear.bias is None else linear.bias.detach()
            factors = ((left_OR * values_R)[:, :rank].to(dtype), right_RI[:rank].to(dtype))
            model.set_submodule(slot.path, LowRankLinear.from_factors(*factors, bias_O))
    if shared:
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.k_proj.down.weight = attention.v_proj.down.weight = attention.q_proj.down.weight
    return model


def run(model: Any, name: str, folder: Path, settings: Recover = RECOVER, *, journal: Journal | None = None, **options: Any) -> tuple[Recovered, Journal]:
    """Recover towards the uncompressed student."""
    weights = {"hard_weight": settings.hard_weight, "kl_weight": settings.kl_weight, "temperature": settings.temperature}
    loss = RecoveryLoss(copy.deepcopy(teacher(name)), Multitask(), **weights)
    journal = journal or Journal()
    return recover(model, loss, options.pop("lessons", None) or taught(name), settings, folder, seed=0, journal=journal, **options), journal


@pytest.mark.parametrize("name", list(MODELS))
def test_a_student_of_rank_one_comes_back(name: str, tmp_path: Path) -> None:
    model = crushed(name)
    structure = structure_of(model)
    recovered, journal = run(model, name, tmp_path, replace(RECOVER, settings=replace(SETTINGS, duration=Steps(32), evaluate_every_steps=8)))
    figures: Any = recovered.figures
    assert recovered.quantized is None
    assert structure_of(model) == structure
    for part in ("", "_label", "_rationale", "_kl_label", "_kl_rationale"):
        assert figures[f"validation_loss{part}_after"] < figures[f"validation_loss{part}_before"], part
    evaluated = [line["validation_loss"] for line in journal.lines if "validation_loss" in line]
    assert figures["validation_loss_after"] == pytest.approx(min(evaluated), rel=1e-5), "the best weights are in the model"


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


LORA = replace(RECOVER, tuning=LoRA(rank=2))
AWARE = replace(RECOVER, quantization_aware=True)


@pytest.mark.parametrize("settings", [RECOVER, LORA, AWARE], ids=["full", "lora", "aware"])
def test_a_killed_recovery_ends_in_the_same_bits(settings: Recover, tmp_path: Path) -> None:
    options: dict[str, Any] = {"aware": QuantizationAware(method=Int8(max_loss_rise=1e3), calibration=calibration())}
    settings = replace(settings, settings=replace(SETTINGS, duration=Steps(9), evaluate_every_steps=3, log_every_steps=1, checkpoint_every_s=1e-9))
    whole = crushed("qwen2", 4, shared=True)
    figures = run(whole, "qwen2", tmp_path / "whole", settings, **options)[0].figures
    with pytest.raises(Killed):
        run(crushed("qwen2", 4, shared=True), "qwen2", tmp_path / "killed", settings, journal=Journal(7), **options)
    resumed, journal = crushed("qwen2", 4, shared=True), Journal()
    again = run(resumed, "qwen2", tmp_path / "killed", settings, journal=journal, **options)[0].figures
    assert journal.lines[0]["step"] == 7, "it went on and did not begin again"
    assert {name: value for name, value in again.items() if "seconds" not in name} == {name: value for name, value in figures.items() if "seconds" not in name}
    assert ties_of(resumed) == ties_of(whole)
    assert settings.quantization_aware or ties_of(whole) == ties_of(crushed("qwen2", 4, shared=True))
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, weights_of(resumed)[name]), name


def test_lora_on_factors_is_merged_and_shared_factors_stay_one(tmp_path: Path) -> None:
    model = crushed("qwen2", 4, shared=True)
    before, ties = weights_of(model), ties_of(model)
    figures: Any = run(model, "qwen2", tmp_path, replace(LORA, settings=replace(SETTINGS, learning_rate=0.03)))[0].figures
    assert figures["validation_loss_after"] < figures["validation_loss_before"]
    after = weights_of(model)
    assert before.keys() == after.keys()
    assert ties_of(model) == ties
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith((".down.weight", ".up.weight"))}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name, method", [("t5 v1.0", Int8(max_loss_rise=1e3)), ("qwen2", Int8(max_loss_rise=1e3)), ("llama", Int4(max_loss_rise=1e3))])
def test_training_with_the_rounding_leaves_integers(name: str, method: Any, tmp_path: Path) -> None:
    plain, model = crushed(name, 6), crushed(name, 6)
    calibration_rows = calibration()
    aware = QuantizationAware(method=method, calibration=calibration_rows)
    recovered, journal = run(model, name, tmp_path, AWARE, aware=aware)
    applied = method.apply(plain, calibration_rows)
    assert structure_of(model) == structure_of(plain)
    assert ties_of(model) == ties_of(plain)
    assert recovered.quantized is not None
    assert [(layer.path, layer.kind, layer.note) for layer in recovered.quantized.layers] == [(layer.path, layer.kind, layer.note) for layer in applied.layers]
    assert recovered.quantized.figures["layers_quantized"] == applied.figures["layers_quantized"]
    figures: Any = recovered.figures
    assert figures["validation_loss_after"] < figures["validation_loss_before"]
    best = min(line["validation_loss"] for line in journal.lines if "validation_loss" in line)
    assert figures["validation_loss_after"] == pytest.approx(best, rel=1e-6), "what was evaluated is what is left"


def test_sensitive_layers_are_kept_in_training_too(tmp_path: Path) -> None:
    model = crushed("llama", 6)
    method = Int8(keep=("*.down_proj.*",), max_loss_rise=1e3)
    recovered, _ = run(model, "llama", tmp_path, AWARE, aware=QuantizationAware(method=method, calibration=calibration()))
    assert recovered.quantized is not None
    kept = {layer.path: layer.note for layer in recovered.quantized.layers if layer.kind == "kept"}
    assert kept == {f"model.layers.{layer}.mlp.down_proj.{part}": "the settings say so" for layer in (0, 1) for part in ("down", "up")}
    assert not any(isinstance(model.get_submodule(path), Int8Linear) for path in kept)


def test_the_papers_start_learns_too(tmp_path: Path) -> None:
    model = crushed("llama", 6)
    aware = QuantizationAware(method=Int8(max_loss_rise=1e3), calibration=calibration())
    figures: Any = run(model, "llama", tmp_path, replace(AWARE, steps=StepStart.PAPER), aware=aware)[0].figures
    assert figures["validation_loss_after"] < figures["validation_loss_before"]


@pytest.mark.parametrize("aware", [False, True])
def test_weights_of_two_bytes_are_trained_in_four(aware: bool, tmp_path: Path) -> None:
    model = crushed("llama", 4, dtype=torch.bfloat16)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    options: Any = {"aware": QuantizationAware(method=Int8(embedding=True, max_loss_rise=1e3), calibration=calibration())} if aware else {}
    settings = replace(AWARE if aware else RECOVER, settings=replace(SETTINGS, learning_rate=1e-3))
    figures: Any = run(model, "llama", tmp_path, settings, **options)[0].figures
    assert figures["validation_loss_after"] < figures["validation_loss_before"]
    floats = {parameter.dtype for name, parameter in model.named_parameters() if parameter.is_floating_point() and not name.endswith("scale_O")}
    assert floats == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("settings", [RECOVER, LORA], ids=["full", "lora"])
def test_a_recovery_that_harms_changes_nothing(settings: Recover, tmp_path: Path) -> None:
    model = copy.deepcopy(teacher("llama"))
    before = weights_of(model)
    settings = replace(settings, hard_weight=0.0, settings=replace(SETTINGS, learning_rate=3.0))
    recovered, _ = run(model, "llama", tmp_path, settings)
    assert recovered.figures["kept_step"] == 0
    assert recovered.figures["validation_loss_after"] == recovered.figures["validation_loss_before"] == recovered.figures["kept_validation_loss"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


def test_dropout_is_off_unless_asked_for(tmp_path: Path) -> None:
    ended = []
    for rate, asked in ((0.0, False), (0.3, False), (0.3, True)):
        model = crushed("t5 v1.1")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = rate
        for one in (model.config, model.encoder.config, model.decoder.config):
            one.dropout_rate = rate
        run(model, "t5 v1.1", tmp_path / f"{rate} {asked}", replace(RECOVER, dropout=asked, settings=replace(SETTINGS, duration=Steps(2))))
        assert {one.dropout_rate for one in (model.config, model.encoder.config, model.decoder.config)} == {rate}
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {rate}
        ended.append(weights_of(model))
    assert all(torch.equal(tensor, ended[1][name]) for name, tensor in ended[0].items())
    assert not all(torch.equal(tensor, ended[2][name]) for name, tensor in ended[0].items())


def test_the_score_decides_where_it_is_to(tmp_path: Path) -> None:
    scores = iter([0.5, 0.2, 0.4, 0.3, 0.5])  # before, three evaluations, after
    lessons = replace(taught("llama"), score=lambda model: {"validation_accuracy": next(scores)})
    model = crushed("llama")
    recovered, _ = run(model, "llama", tmp_path, replace(RECOVER, settings=replace(SETTINGS, best=Best.ACCURACY)), lessons=lessons)
    assert (recovered.figures["kept_step"], recovered.figures["validation_accuracy_before"]) == (0, 0.5)
    last = replace(RECOVER, settings=replace(SETTINGS, best=Best.LAST))
    figures = run(model, "llama", tmp_path / "last", last, lessons=Lessons(train=taught("llama").train))[0].figures
    assert not any("validation" in name for name in figures)


def test_the_teacher_is_left_as_it_was(tmp_path: Path) -> None:
    model, uncompressed = crushed("t5 v1.1"), copy.deepcopy(teacher("t5 v1.1"))
    recover(model, RecoveryLoss(uncompressed, Multitask()), taught("t5 v1.1"), RECOVER, tmp_path, seed=0, journal=Journal())
    assert all(torch.equal(tensor, teacher("t5 v1.1").state_dict()[name]) for name, tensor in uncompressed.state_dict().items())


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"kl_weight": -1.0}, "kl_weight -1.0"),
        ({"kl_weight": 0.0, "hard_weight": 0.0}, "one of them more than 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"quantization_aware": True, "tuning": LoRA()}, "LoRA freezes them"),
    )
    for settings, message in refused:
        with pytest.raises(ValueError, match=message):
            Recover(**settings)
    with pytest.raises(ValueError, match="needs an int8 or int4 after the recovery"):
        run(crushed("llama"), "llama", tmp_path, AWARE)
    with pytest.raises(ValueError, match="is for int8 and int4, and the method that follows is smooth"):
        QuantizationAware(method=SmoothQuant(), calibration=calibration())


def test_it_can_be_written_as_one_word() -> None:
    settings = Recover(kl_weight=0.5, tuning=LoRA(rank=4), quantization_aware=False)
    assert parse(write(settings), (Recover,)) == settings
