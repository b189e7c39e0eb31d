"""QSVD: the dense model at full rank, importances that a finite difference confirms, splits and rotations that change nothing but the rounding."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantization_models import MODELS, calibration, logits, tiny
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from llmdistill.compress import qsvd_maths
from llmdistill.compress.answers_loss import seen_by
from llmdistill.compress.calibration import Calibration, row_loss
from llmdistill.compress.importance import Importance
from llmdistill.compress.int8 import Int8
from llmdistill.compress.low_rank_maths import Spectrum, floored, spectrum
from llmdistill.compress.qsvd import QSVD, Cross, Outputs, Rotation
from llmdistill.compress.qsvd_apply import CROSS, groups_of, importances_of, output_scales, spectra
from llmdistill.compress.qsvd_maths import Stacked
from llmdistill.compress.ranks import Allocation, Budget
from llmdistill.compress.slots import Role, slots
from llmdistill.compress.statistics import input_statistics
from llmdistill.compress.svd import SVD, Data, Scope
from llmdistill.core.spec import parse, write
from llmdistill.decode.engine import CrossCache, Decoding, Engine
from llmdistill.models import checkpoint
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["hello world"], 300, lower_case=False, ends_every_text=True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def alike(weight_OI: Tensor) -> Stacked:
    return Stacked(weight_OI=weight_OI, scale_O=torch.ones_like(weight_OI[:, 0]))


def factorised(model: Any) -> dict[str, LowRankLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LowRankLinear)}


def at_full_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group is replaced at its full rank, as if that were below break-even."""
    monkeypatch.setattr("llmdistill.compress.qsvd_apply.linear_costs", lambda *_, **__: (1, 10**6))


@pytest.mark.parametrize(
    "name, data, cross",
    [
        *(("t5 v1.1", Data.WHITENED, cross) for cross in Cross),
        *(("qwen2", data, Cross.JOINT) for data in Data),
        ("t5 v1.0", Data.PLAIN, Cross.JOINT),
        ("llama", Data.WHITENED, Cross.JOINT),
    ],
)
def test_at_full_rank_the_model_is_what_it_was(name: str, data: Data, cross: Cross, monkeypatch: pytest.MonkeyPatch) -> None:
    at_full_rank(monkeypatch)
    model = tiny(name, torch.float64)
    before = logits(model)
    QSVD(keep=1.0, data=data, cross=cross, rotation=Rotation.HADAMARD, num_gradient_rows=2).apply(model, calibration())
    torch.testing.assert_close(logits(model), before, rtol=1e-8, atol=1e-8)
    num = len({id(module.down.weight) for module in factorised(model).values()})
    assert num == {Cross.JOINT: 5, Cross.SEPARATE: 6, Cross.NONE: 4}[cross] if name.startswith("t5") else num == 2


@pytest.mark.parametrize("data, outputs", [(Data.PLAIN, Outputs.ALIKE), (Data.WHITENED, Outputs.ALIKE), (Data.WHITENED, Outputs.LOSS)])
@pytest.mark.parametrize("name", ["t5 v1.1", "qwen2"])
def test_importance_is_a_finite_difference_of_each_rows_loss(name: str, data: Data, outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    for norm in (T5LayerNorm, Qwen2RMSNorm):  # transformers' own pass through float32
        monkeypatch.setattr(norm, "forward", lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon))
    model, rows = tiny(name, torch.float64), calibration(3)
    settings = QSVD(data=data, importance=Importance.LOSS, num_gradient_rows=100)
    groups = groups_of(settings, model)
    scales = output_scales(model, groups, rows, 100) if outputs is Outputs.LOSS else {}
    found = {group.name: one for group, one in spectra(settings, model, groups, rows, scales)}
    importances = importances_of(settings, model, groups, found, rows)
    assert all(not parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    for group in (groups[0], groups[-1]):
        up_OK, down_KI = found[group.name].stacked.parts(found[group.name].spectrum)
        weight_OI = group.weight_OI()
        for index in (0, 3, up_OK.shape[1] - 1):
            part_OI = torch.outer(up_OK[:, index], down_KI[index])  # sigma_i u_i v_i^T S^-1
            far, near = (_difference(model, group, weight_OI, part_OI, rows, step) for step in (0.02, 0.01))
            expected = float(((4 * near - far) / 3).square().mean())  # to fourth order
            assert float(importances[group.name][index]) == pytest.approx(expected, rel=1e-5, abs=1e-15)


def _difference(model: Any, group: Any, weight_OI: Tensor, part_OI: Tensor, rows: Calibration, step: float) -> Tensor:
    above, below = (_row_losses(model, group, weight_OI + signed * part_OI, rows) for signed in (step, -step))
    return (above - below) / (2 * step)


def _row_losses(model: Any, group: Any, weight_OI: Tensor, rows: Calibration) -> Tensor:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for slot, part in zip(group.slots, weight_OI.split([linear.out_features for linear in group.linears]), strict=True):
            slot.module(changed).weight.copy_(part)
        return torch.stack([row_loss(rows.loss, changed, batch) for batch in rows.batches(changed)])


@pytest.mark.parametrize("importance", [Importance.LOSS, Importance.ANSWERS])
def test_the_importance_of_a_bfloat16_model_is_that_of_its_weights_in_float32(importance: Importance) -> None:
    rows, settings = calibration(3), QSVD(importance=importance)
    importances = []
    for dtype in (torch.bfloat16, torch.float64):
        model = tiny("t5 v1.1", torch.bfloat16)
        model.to(dtype) if dtype is torch.float64 else None
        groups = groups_of(settings, model)
        found = {group.name: one for group, one in spectra(replace(settings, data=Data.PLAIN), model, groups, rows, {})}
        importances.append(importances_of(settings, model, groups, found, rows))
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert all(parameter.requires_grad for parameter in model.parameters())
    for name, importance_K in importances[0].items():
        torch.testing.assert_close(importance_K[:8], importances[1][name][:8], rtol=1e-2, atol=0.0)


def test_joint_factors_are_better_than_separate_ones_at_equal_parameters() -> None:
    weights, gram_II = [random(24, 32, seed=seed) for seed in range(3)], floored(random(100, 32, seed=9).t() @ random(100, 32, seed=9)).matrix_II
    common = random(6, 32, seed=7)
    weights = [weight / 4 + random(24, 6, seed=5 + index) @ common for index, weight in enumerate(weights)]  # they look at the same few directions
    stacked = torch.cat(weights)
    rank = 6
    joint = float(spectrum(stacked, gram_II).energy_K[rank:].sum())
    of_equal_size = rank * (32 + 72) // (3 * (32 + 24))
    separate = sum(float(spectrum(weight, gram_II).energy_K[of_equal_size:].sum()) for weight in weights)
    assert joint < separate


@pytest.mark.parametrize("rotation", list(Rotation))
@pytest.mark.parametrize("rank", [1, 7, 8, 12, 24])
def test_neither_exponent_nor_rotation_changes_the_product(rank: int, rotation: Rotation) -> None:
    weight_OI, inputs_TI = random(40, 24), random(60, 24, seed=1) * random(24, seed=2).exp()
    stacked = Stacked(weight_OI=weight_OI, scale_O=random(40, seed=5).exp())
    full = spectrum(stacked.scaled_OI, inputs_TI.t() @ inputs_TI)
    torch.testing.assert_close(torch.matmul(*stacked.parts(full)), weight_OI)
    kept = qsvd_maths.chosen(full, torch.arange(rank))
    up_OK, down_KI = stacked.parts(full)
    projected = up_OK[:, :rank] @ down_KI[:rank]
    matrix = qsvd_maths.rotation(rotation, rank, seed=3)
    if matrix is not None:
        torch.testing.assert_close(matrix @ matrix.t(), torch.eye(rank, dtype=torch.float64))
    for beta in qsvd_maths.EXPONENTS:
        up_OR, down_RI = qsvd_maths.split(stacked, kept, beta, matrix)
        torch.testing.assert_close(up_OR @ down_RI, projected, rtol=1e-9, atol=1e-9)


def test_the_exponent_is_that_of_the_singular_values() -> None:
    weight_OI, inputs_TI = random(40, 24), random(60, 24, seed=1)
    kept = qsvd_maths.chosen(spectrum(weight_OI, inputs_TI.t() @ inputs_TI), torch.arange(10))
    sigma_R = kept.energy_K.sqrt()
    for beta in (0.0, 0.3, 1.0):
        up_OR, down_RI = qsvd_maths.split(alike(weight_OI), kept, beta, None)
        latents_R, columns_R = (inputs_TI @ down_RI.t()).norm(dim=0), up_OR.norm(dim=0)
        torch.testing.assert_close(latents_R / latents_R[0], (sigma_R / sigma_R[0]) ** beta)
        torch.testing.assert_close(columns_R / columns_R[0], (sigma_R / sigma_R[0]) ** (1 - beta))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rotation", list(Rotation))
def test_the_chosen_exponent_is_the_best_of_the_grid(bits: int, rotation: Rotation) -> None:
    weight_OI, inputs_TI = random(40, 32) * random(40, 1, seed=4).exp(), random(80, 32, seed=1) * (2 * random(32, seed=2)).exp()
    kept = qsvd_maths.chosen(spectrum(weight_OI, inputs_TI.t() @ inputs_TI), torch.arange(16))
    matrix = qsvd_maths.rotation(rotation, 16, seed=0)
    beta, errors = qsvd_maths.best_exponent(alike(weight_OI), kept, matrix, inputs_TI, bits)
    assert errors[beta] == min(errors.values()) <= errors[0.5]
    up_OR, down_RI = qsvd_maths.split(alike(weight_OI), kept, beta, matrix)
    by_hand = float((qsvd_maths.quantized_outputs(up_OR, down_RI, inputs_TI, bits) - inputs_TI @ weight_OI.t()).square().sum())
    assert errors[beta] == pytest.approx(by_hand)


def test_a_rotation_spreads_an_outlier_of_the_latent() -> None:
    """At 4 bits one latent that is far larger than the others leaves nothing of them, unless all channels share it."""
    weight_OI, inputs_TI = random(64, 32), random(200, 32, seed=1)
    inputs_TI[:, 0] *= 100
    kept = qsvd_maths.chosen(spectrum(weight_OI, inputs_TI.t() @ inputs_TI), torch.arange(16))
    _, down_RI = qsvd_maths.split(alike(weight_OI), kept, 1.0, None)
    plain = qsvd_maths.rounded(inputs_TI @ down_RI.t(), 4)
    for kind in (Rotation.HADAMARD, Rotation.RANDOM):
        matrix = qsvd_maths.rotation(kind, 16, seed=0)
        assert matrix is not None
        _, rotated_RI = qsvd_maths.split(alike(weight_OI), kept, 1.0, matrix)
        peak = [float((latent.abs().amax(1) / latent.norm(dim=1)).mean()) for latent in (inputs_TI @ down_RI.t(), inputs_TI @ rotated_RI.t())]
        assert peak[1] < 0.7 * peak[0]
    assert float((plain == 0).double().mean()) > 0.5


def test_an_output_that_the_loss_does_not_see_gives_way_to_those_that_it_sees() -> None:
    """And what the loss sees of outputs is the norm of its gradient's rows."""
    model, rows = tiny("llama", torch.float64), calibration(4)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, :8] = 0  # the first head's values go nowhere
    group = groups_of(QSVD(), model)[0]
    scale_O = output_scales(model, [group], seen_by(Importance.ANSWERS, rows), 4)[group.name]
    assert scale_O.square().mean() == pytest.approx(1 + qsvd_maths.LEAST_OUTPUT)
    assert float(scale_O[:8].max()) < 1.01 * qsvd_maths.LEAST_OUTPUT**0.5  # its queries
    assert float(scale_O[16:].min()) > 1.1 * qsvd_maths.LEAST_OUTPUT**0.5
    weights = [group.weight_OI(), group.weight_OI()]
    for settings, kept in zip((QSVD(outputs=Outputs.ALIKE), QSVD()), weights, strict=True):
        changed = copy.deepcopy(model)
        replace(settings, keep=0.3, ranks=Allocation.UNIFORM, importance=Importance.ENERGY).apply(changed, rows)
        modules = [slot.module(changed) for slot in group.slots]
        kept.copy_(torch.cat([module.up.weight @ module.down.weight for module in modules]).detach())
    gram_II = input_statistics(model, [group.reader], rows)[group.reader.input].gram_II
    errors_O = [(((kept - group.weight_OI()) @ gram_II) * (kept - group.weight_OI())).sum(1) for kept in weights]
    assert float(errors_O[1][:8].sum()) > float(errors_O[0][:8].sum())
    assert float((errors_O[1] * scale_O.square()).sum()) < float((errors_O[0] * scale_O.square()).sum())


def test_rounding_is_by_row_and_within_half_a_step() -> None:
    matrix = random(5, 40) * torch.tensor([1.0, 10.0, 0.1, 0.0, 3.0], dtype=torch.float64)[:, None]
    for bits in (4, 8):
        step_A1 = matrix.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert bool(((qsvd_maths.rounded(matrix, bits) - matrix).abs() <= step_A1 / 2 + 1e-12).all())


@pytest.mark.parametrize("ranks", list(Allocation))
@pytest.mark.parametrize("importance", list(Importance))
@pytest.mark.parametrize("name", ["t5 v1.1", "qwen2"])
def test_what_is_declared_is_what_the_model_holds(name: str, importance: Importance, ranks: Allocation) -> None:
    model = tiny(name)
    before, of_weights = _num_parameters(model), sum(linear.weight.numel() for group in groups_of(QSVD(), model) for linear in group.linears)
    applied = QSVD(keep=0.6, importance=importance, ranks=ranks).apply(model, calibration())
    figures: Any = applied.figures
    assert figures["parameters_in_scope_before"] == of_weights
    assert before - _num_parameters(model) == of_weights - figures["parameters_in_scope_after"]
    assert figures["parameters_in_scope_after"] <= 0.6 * of_weights
    assert {layer.path for layer in applied.layers if layer.kind == "low_rank"} == set(factorised(model))
    assert {layer.path for layer in applied.layers} == {slot.path for group in groups_of(QSVD(), tiny(name)) for slot in group.slots}
    assert all(0 <= layer.figures["relative_error"] <= 1 and 0 <= layer.figures["exponent"] <= 1 for layer in applied.layers if not layer.note)


def _num_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # a shared one comes once


def test_joint_cross_attention_shares_one_projection_over_all_layers() -> None:
    model = tiny("t5 v1.1")
    QSVD(keep=0.5, ranks=Allocation.UNIFORM).apply(model, calibration())
    cross = [slot.module(model) for slot in slots(model) if slot.role in (Role.CROSS_K, Role.CROSS_V)]
    assert len(cross) == 4
    assert len({id(module.down.weight) for module in cross}) == 1
    assert all(type(slot.module(model)) is torch.nn.Linear for slot in slots(model) if slot.role in (Role.CROSS_Q, Role.CROSS_OUT))
    assert [group.name for group in groups_of(QSVD(cross=Cross.JOINT), tiny("t5 v1.1"))].count(CROSS) == 1


@pytest.mark.parametrize("name, dtype", [*((name, torch.float32) for name in MODELS), ("t5 v1.1", torch.bfloat16), ("qwen2", torch.bfloat16)])
def test_ties_survive_saving_and_logits_are_bitwise_the_same(name: str, dtype: torch.dtype, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(name, dtype)
    QSVD(keep=0.5, rotation=Rotation.RANDOM).apply(model, calibration())
    checkpoint.save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded, _ = checkpoint.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert _num_parameters(loaded) == _num_parameters(model)
    assert {module.down.weight.dtype for module in factorised(loaded).values()} == {dtype}


def test_a_layer_at_break_even_stays_dense_and_says_so() -> None:
    model = tiny("llama")
    applied = QSVD(keep=1.0).apply(model, calibration())
    assert not factorised(model)
    assert {layer.kind for layer in applied.layers} == {"kept"}
    assert all("break-even" in layer.note for layer in applied.layers)


def test_grouped_query_attention_may_have_more_ranks_than_outputs() -> None:
    model = tiny("qwen2", torch.float64)
    biases = {path: parameter.clone() for path, parameter in model.named_parameters() if path.endswith("_proj.bias")}
    QSVD(keep=0.9, ranks=Allocation.UNIFORM).apply(model, calibration())
    modules = factorised(model)
    assert all(module.rank > module.out_features for path, module in modules.items() if path.endswith("k_proj"))
    for path, bias in biases.items():
        assert torch.equal(modules[path.removesuffix(".bias")].up.bias, bias)


def test_more_is_kept_of_what_the_loss_notices() -> None:
    """A layer whose attention goes nowhere has no importance, and gets one rank."""
    model = tiny("llama", torch.float64)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    QSVD(keep=0.3).apply(model, calibration())
    ranks = {path: module.rank for path, module in factorised(model).items()}
    assert ranks.get("model.layers.1.self_attn.q_proj") == 1
    assert ranks.get("model.layers.0.self_attn.q_proj", 99) > 1


def test_feed_forward_by_svd_first_and_attention_by_qsvd_then() -> None:
    model = tiny("t5 v1.1")
    SVD(keep=0.5, scope=(Scope.FEED_FORWARD,)).apply(model, calibration())
    QSVD(keep=0.5).apply(model, calibration())
    assert {path.rpartition(".")[2] for path in factorised(model)} >= {"q", "k", "v", "wo"}
    assert torch.isfinite(logits(model)).all()


def test_quantized_afterwards_it_is_saved_with_its_ties_and_decoded(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny("t5 v1.1")
    QSVD(keep=0.5, ranks=Allocation.UNIFORM).apply(model, calibration())
    assert Engine(model).cross_cache is CrossCache.LATENT
    _assert_decodes_as_transformers_does(model)
    Int8(max_loss_rise=10.0).apply(model, calibration())
    assert Engine(model).cross_cache is CrossCache.EXPANDED
    num = len({id(module.down.weight) for module in factorised(model).values()})
    checkpoint.save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded, _ = checkpoint.load(tmp_path)
    assert num == len({id(module.down.weight) for module in factorised(loaded).values()}) == 5
    assert torch.equal(logits(loaded), logits(model))
    _assert_decodes_as_transformers_does(loaded)


def _assert_decodes_as_transformers_does(model: Any) -> None:
    with torch.inference_mode():
        tokens = model.generate(input_ids=torch.tensor([[5, 9, 20, 3]]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert Engine(model).generate([[5, 9, 20, 3]], Decoding(max_new_tokens=6, stop_token_ids=()))[0].tokens == tuple(tokens[0, 1:].tolist())


def test_after_another_method_in_its_place_it_says_why_not() -> None:
    model = tiny("t5 v1.1")
    SVD(keep=0.5, scope=(Scope.ATTENTION,)).apply(model, calibration())
    state = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"QSVD changes linears, and encoder\.block\.0.* low_rank module already: apply QSVD before"):
        QSVD(keep=0.5).apply(model, calibration())
    assert all(torch.equal(parameter, state[name]) for name, parameter in model.named_parameters())


def test_neither_training_mode_nor_gradients_are_left_behind() -> None:
    model = tiny("t5 v1.1").train()
    model.shared.weight.requires_grad_(False)
    QSVD(keep=0.5).apply(model, calibration())
    assert model.training
    assert not model.shared.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training and module.up.weight.requires_grad and module.down.weight.requires_grad for module in factorised(model).values())


def test_a_loss_that_is_no_number_is_told() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss of calibration row 0 is nan"):
        QSVD(keep=0.5).apply(model, calibration())


@pytest.mark.parametrize(
    "wrong, message", [({"keep": 0.0}, "keep is 0"), ({"alpha": 2.0}, "alpha"), ({"bits": 1}, "bits is 1"), ({"num_gradient_rows": 0}, "num_gradient_rows")]
)
def test_wrong_settings_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QSVD(**wrong)


def test_settings_are_written_as_one_string() -> None:
    settings = QSVD(keep=0.4, budget=Budget.BYTES, cross=Cross.SEPARATE, bits=4, rotation=Rotation.HADAMARD, importance=Importance.ENERGY)
    assert parse(write(settings), (QSVD,)) == settings
    assert parse("qsvd:0.4?rotation=RANDOM&cross=NONE", (QSVD, SVD)) == QSVD(keep=0.4, rotation=Rotation.RANDOM, cross=Cross.NONE)


def test_directions_are_chosen_by_index() -> None:
    some = Spectrum(energy_K=torch.tensor([3.0, 2.0, 1.0]), left_OK=torch.eye(3))
    kept = qsvd_maths.chosen(some, torch.tensor([2, 0]))
    assert kept.energy_K.tolist() == [1, 3]
    assert torch.equal(kept.left_OK, torch.eye(3)[:, [2, 0]])
