"""LSQ: gradients are the paper's, and those of finite differences; what is trained is what the integer modules compute; shared weights stay shared."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantization_models import calibration, logits, tiny
from torch import Tensor, nn

from llmdistill.compress.int4 import Int4
from llmdistill.compress.int8 import Int8
from llmdistill.compress.lsq import Grid, LSQEmbedding, LSQLinear, convert, fake_quantize, install_lsq, paper_step
from llmdistill.compress.recovery import StepStart
from llmdistill.models import checkpoint
from llmdistill.models.int4_linear import Int4Linear
from llmdistill.models.int8_embedding import Int8Embedding
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.low_rank_embedding import LowRankEmbedding
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.structure import structure_of, ties_of

INT8, INT4 = Int8(max_loss_rise=1e3), Int4(head=True, max_loss_rise=1e3)


def quantized(model: Any, method: Any) -> Any:
    other = copy.deepcopy(model)
    method.apply(other, calibration())
    return other


def shared_down(dtype: torch.dtype = torch.float32) -> Any:
    """A Qwen2 whose first q, k and v are of low rank and share their down-projection."""
    model = tiny("qwen2", dtype)
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = getattr(attention, name)
        left_OR, values_R, right_RI = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        setattr(attention, name, LowRankLinear.from_factors((left_OR * values_R)[:, :8].to(dtype), right_RI[:8].to(dtype), linear.bias.detach()))
    attention.k_proj.down.weight = attention.v_proj.down.weight = attention.q_proj.down.weight
    return model


def move(model: nn.Module, size: float = 0.02) -> None:
    """Stands for training: every trainable number moves."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * size)


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("low, high, zeros", [(-127, 127, False), (-8, 7, False), (-8, 7, True)])
def test_gradients_are_the_papers(low: int, high: int, zeros: bool) -> None:
    weight, slope = draw(5, 30).requires_grad_(), draw(5, 30, seed=1)
    step = (0.5 + torch.rand(5, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).mul_(2 / high).requires_grad_()
    zero = draw(5, 1, seed=4).mul_(0.1).requires_grad_() if zeros else None
    fake = fake_quantize(weight, step, zero, low, high)
    fake.backward(slope)
    with torch.no_grad():
        value = (weight - (0 if zero is None else zero)) / step
        inside = (value > low) & (value < high)
        assert 0 < inside.sum() < inside.numel(), "some are clipped"
        torch.testing.assert_close(fake, value.clamp(low, high).round() * step + (0 if zero is None else zero))
        equation_3 = torch.where(value <= low, float(low), torch.where(value >= high, float(high), value.round() - value))
        torch.testing.assert_close(step.grad, (slope * equation_3).sum(1, keepdim=True) / (30 * high) ** 0.5)
        torch.testing.assert_close(weight.grad, slope * inside)
        if zero is not None:
            torch.testing.assert_close(zero.grad, (slope * ~inside).sum(1, keepdim=True))


def test_gradients_are_finite_differences_of_the_function_without_jumps() -> None:
    """Rounding adds what it adds at this point, everywhere near: then the function is smooth, but for the ends of the clip."""
    weight, zero, slope, low, high = draw(4, 20), draw(4, 1, seed=1) * 0.1, draw(4, 20, seed=2), -8, 7
    step = torch.full((4, 1), 0.2, dtype=torch.float64)
    value = (weight - zero) / step
    added = (value.clamp(low, high).round() - value.clamp(low, high)).detach()
    assert (value.abs() - 7.5).abs().min() > 1e-3

    def smooth(weight: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        return ((((weight - zero) / step).clamp(low, high) + added) * step + zero).mul(slope).sum()

    given = [one.clone().requires_grad_() for one in (weight, step, zero)]
    (fake_quantize(given[0], given[1], given[2], low, high) * slope).sum().backward()
    for number, one in enumerate((weight, step, zero)):
        differences = torch.zeros_like(one)
        for index in range(one.numel()):
            change = torch.zeros_like(one)
            change.view(-1)[index] = 1e-6
            ends = [smooth(*(other + sign * change if other is one else other for other in (weight, step, zero))) for sign in (1, -1)]
            differences.view(-1)[index] = (ends[0] - ends[1]) / 2e-6
        gradient: Any = given[number].grad
        torch.testing.assert_close(gradient * ((20 * high) ** 0.5 if number == 1 else 1), differences, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["t5 v1.0", "t5 v1.1", "llama", "llama tied", "qwen2"])
def test_training_begins_where_quantization_without_it_ends(name: str) -> None:
    model = tiny(name)
    for method in (INT8, INT4):
        fake, integers = copy.deepcopy(model), quantized(model, method)
        paths = install_lsq(fake, integers)
        assert set(paths) == {path for path, entry in structure_of(integers).items() if entry["kind"].startswith("int")}
        torch.testing.assert_close(logits(fake), logits(integers), rtol=1e-5, atol=1e-5)


def test_the_papers_start_is_twice_the_mean_by_the_root_of_the_largest_code() -> None:
    model = tiny("llama")
    fake = copy.deepcopy(model)
    install_lsq(fake, quantized(model, INT8), start=StepStart.PAPER)
    weight_OI = model.model.layers[0].mlp.up_proj.weight.detach()
    step_O = fake.model.layers[0].mlp.up_proj.grid.step_and_zero_OG1()[0].flatten()
    torch.testing.assert_close(step_O, 2 * weight_OI.abs().mean(1) / 127**0.5)
    linear = nn.Linear(40, 3)  # a short last group
    like = Int4Linear(40, 3, 32, bias=False)
    step_OG1, zero_OG1 = Grid(linear.weight, like, StepStart.PAPER).step_and_zero_OG1()
    parts = (linear.weight[:, :32], linear.weight[:, 32:])
    expected_OG = torch.cat([paper_step(part, 7) for part in parts], 1)
    torch.testing.assert_close(step_OG1[..., 0], expected_OG.bfloat16().float())
    assert zero_OG1 is not None
    assert not zero_OG1.any()


@pytest.mark.parametrize("method", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("name", ["t5 v1.0", "t5 v1.1", "llama", "llama tied", "qwen2", "shared"])
def test_converted_integers_compute_what_was_trained(name: str, method: Any, tmp_path: Path) -> None:
    model = shared_down() if name == "shared" else tiny(name)
    integers = quantized(model, method)
    install_lsq(model, integers)
    move(model)
    evaluated = logits(model.eval())
    with torch.enable_grad():
        ids_BL = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
        inputs: Any = {"input_ids": ids_BL} | ({"decoder_input_ids": ids_BL[:, :5]} if model.config.is_encoder_decoder else {})
        trained = model(**inputs).logits.detach()
    errors = convert(model)
    assert torch.equal(logits(model), evaluated), "evaluation during training is that of the integers"
    error = ((logits(model) - trained).norm() / trained.norm()).item()
    assert error < (2e-2 if method is INT4 else 5e-3), "the int4 kernel rounds its inputs to bfloat16; a row's rounding may fall the other way"
    assert (structure_of(model), ties_of(model)) == (structure_of(integers), ties_of(integers))
    assert set(errors) == {path for path, entry in structure_of(model).items() if entry["kind"].startswith("int")}
    assert all(0 < value < 0.6 for value in errors.values())
    checkpoint.save(model, _tokenizer(), tmp_path, lineage=[], card="")
    again, _ = checkpoint.load(tmp_path)
    assert torch.equal(logits(again), evaluated)


def _tokenizer() -> Any:
    from llmdistill.models.tokenizer import train_tokenizer

    return train_tokenizer(["a b c"], 270, lower_case=False, ends_every_text=True)


def test_in_float64_the_four_bit_weights_are_the_same_exactly() -> None:
    model = tiny("llama", torch.float64)
    install_lsq(model, quantized(model, INT4))
    move(model)
    with torch.enable_grad():
        trained = model(input_ids=torch.arange(3, 9)[None]).logits.detach()
    convert(model)
    torch.testing.assert_close(model(input_ids=torch.arange(3, 9)[None]).logits.detach(), trained, rtol=1e-6, atol=1e-6)


def test_rows_are_rounded_as_the_integer_product_does() -> None:
    linear = nn.Linear(48, 20)
    grid = Grid(linear.weight, Int8Linear.from_linear(linear), StepStart.FITTED)
    fake, hidden = LSQLinear(linear, grid).train(), draw(2, 9, 48).float().requires_grad_()
    output = fake(hidden)
    torch.testing.assert_close(output, fake.converted()(hidden), rtol=1e-5, atol=1e-5)
    output.backward(torch.ones_like(output))
    torch.testing.assert_close(hidden.grad, grid.fake(linear.weight).sum(0).expand(2, 9, 48))


def test_shared_weights_have_one_step() -> None:
    model = shared_down()
    install_lsq(model, quantized(model, INT8))
    q, k = (model.model.layers[0].self_attn.get_submodule(f"{name}_proj.down") for name in "qk")
    assert q.weight is k.weight
    assert q.grid is k.grid
    assert model.lm_head.grid is model.model.embed_tokens.grid, "embedding and head are one matrix"
    t5 = tiny("t5 v1.0")
    install_lsq(t5, quantized(t5, INT8))
    assert t5.shared.grid is t5.encoder.embed_tokens.grid is t5.decoder.embed_tokens.grid
    assert isinstance(t5.shared, LSQEmbedding)
    assert t5.lm_head.weight is t5.shared.weight
    convert(t5)
    assert isinstance(t5.shared, Int8Embedding)
    assert t5.lm_head.weight is t5.shared.weight
    assert t5.lm_head.scale_O is t5.encoder.embed_tokens.scale_O


def test_an_embedding_of_low_rank_that_is_one_module_gets_steps_once() -> None:
    model = tiny("t5 v1.0")
    embedding = LowRankEmbedding.from_factors(torch.randn(60, 8), torch.randn(8, 32))
    for path in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
        model.set_submodule(path, embedding)
    model.set_submodule("lm_head", embedding.head())
    install_lsq(model, quantized(model, INT8))
    assert isinstance(model.shared.table, LSQEmbedding)
    assert model.shared.table is model.decoder.embed_tokens.table
    assert model.lm_head.up.grid is model.shared.table.grid
    move(model)
    evaluated = logits(model.eval())
    convert(model)
    assert torch.equal(logits(model), evaluated)
    assert model.lm_head.up.weight is model.shared.table.weight


def test_every_step_learns_and_none_is_decayed() -> None:
    model = tiny("t5 v1.0").train()
    install_lsq(model, quantized(model, INT8))
    ids_BL = torch.arange(3, 60)[None]
    F.cross_entropy(model(input_ids=ids_BL, decoder_input_ids=ids_BL).logits[0], ids_BL[0]).backward()
    steps = {name: parameter for name, parameter in model.named_parameters() if "lsq" in name}
    assert steps
    for name, parameter in steps.items():
        assert parameter.ndim == 1, "train_setup decays matrices"
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_weights_without_a_scale_can_come_alive() -> None:
    linear = nn.Linear(32, 4, bias=False)
    with torch.no_grad():
        linear.weight[1] = 0
    for like in (Int8Linear.from_linear(linear), Int4Linear(32, 4, 32, bias=False)):
        grid = Grid(linear.weight, like, StepStart.FITTED)
        weight = linear.weight.detach().clone().requires_grad_()
        fake_OI = grid.fake(weight)
        assert not fake_OI[1].any()
        fake_OI.sum().backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad[1], torch.ones(32))


def test_evaluation_sees_changed_weights() -> None:
    model = tiny("llama")
    install_lsq(model, quantized(model, INT8))
    before = logits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model.train()(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    optimizer.step()
    after = logits(model.eval())
    assert not torch.equal(before, after)
    convert(model)
    assert torch.equal(logits(model), after)


def test_what_is_kept_is_kept() -> None:
    model = tiny("llama")
    method = Int8(keep=("*down_proj",), embedding=False, head=False, max_loss_rise=1e3)
    install_lsq(model, quantized(model, method))
    assert {type(module) for name, module in model.named_modules() if name.endswith("down_proj")} == {nn.Linear}
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding
    with pytest.raises(ValueError, match=r"holds a LSQLinear, .* install it once"):
        install_lsq(model, quantized(tiny("llama"), method))


def test_fake_quantization_cannot_be_saved(tmp_path: Path) -> None:
    model = tiny("llama")
    install_lsq(model, quantized(model, INT8))
    with pytest.raises(ValueError, match=r"cannot be loaded again: .*lsq_step.* replace modules only by kinds that the structure knows"):
        checkpoint.save(model, _tokenizer(), tmp_path / "saved", lineage=[], card="")
    assert not (tmp_path / "saved").exists()
