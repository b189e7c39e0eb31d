"""Tucker and CP: exact at full rank, errors that ranks and sweeps never raise, and models that are saved, decoded and counted as they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, T5Config

from llmdistill.batches import Example, Pair
from llmdistill.compress import tensors_maths as maths
from llmdistill.compress.calibration import Calibration
from llmdistill.compress.low_rank_maths import floored
from llmdistill.compress.slots import Role, slots
from llmdistill.compress.tensors import CP, Data, Stack, Tucker
from llmdistill.core.spec import parse, write
from llmdistill.decode.engine import Decoding, Engine
from llmdistill.losses.multitask import LabelOnly
from llmdistill.models import checkpoint
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.t5 import new_t5
from llmdistill.models.tensor_linear import CPLinear, TuckerLinear
from llmdistill.models.tokenizer import train_tokenizer

VOCABULARY_SIZE = 96
IDS: dict[str, Any] = {"vocab_size": VOCABULARY_SIZE, "pad_token_id": 0, "eos_token_id": 1}
T5: dict[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 1, "decoder_start_token_id": 0, **IDS}
CAUSAL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **IDS}
MODELS: dict[str, Callable[[], Any]] = {
    "t5 v1.0": lambda: new_t5(T5Config(**T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": True})),
    "t5 v1.1": lambda: new_t5(T5Config(**T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL, bos_token_id=None, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**CAUSAL, bos_token_id=None, tie_word_embeddings=False)),
}
METHODS: dict[str, Any] = {
    "tucker": Tucker(keep=0.5),
    "tucker of a layer": Tucker(keep=0.4, stack=Stack.LAYER, data=Data.PLAIN),
    "tucker, all modes cut": Tucker(keep=(5, 3, 3), data=Data.PLAIN),
    "cp": CP(keep=0.6),
    "cp of a layer": CP(keep=0.5, stack=Stack.LAYER, data=Data.PLAIN),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model whose norms and biases are random, so that it does not repeat one token for ever."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5)
    return model.to(dtype).eval()


def calibration(num: int = 24) -> Calibration:
    rng = np.random.default_rng(0)

    def tokens(at_least: int, at_most: int) -> Any:
        return rng.integers(3, VOCABULARY_SIZE, rng.integers(at_least, at_most + 1)).astype(np.int32)

    rows: list[Example] = [(Pair(part=0, input=tokens(4, 12), target=tokens(2, 6)),) for _ in range(num)]
    return Calibration(examples=rows, loss=LabelOnly())


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error(factors: maths.Factors, weight_MDN: Tensor) -> float:
    return float((factors.dense_MDN() - weight_MDN).norm() / weight_MDN.norm())


SHAPE = (9, 4, 6)


def test_tucker_at_full_rank_gives_the_tensor_back() -> None:
    weight_MDN = tensor(*SHAPE)
    assert error(maths.tucker(weight_MDN, SHAPE, sweeps=5), weight_MDN) < 1e-12
    planted = maths.TuckerFactors(core_RKP=tensor(3, 2, 2), width_MR=tensor(9, 3), head_DK=tensor(4, 2), mix_NP=tensor(6, 2)).dense_MDN()
    assert error(maths.tucker(planted, (3, 2, 2), sweeps=5), planted) < 1e-12
    assert maths.tucker_ranks(planted, planted.numel() - 1) == (3, 2, 2)  # no more than there is, whatever the budget


def test_cp_at_full_rank_gives_the_tensor_back() -> None:
    weight_MDN = tensor(*SHAPE)
    assert error(maths.cp(weight_MDN, 4 * 6, sweeps=5), weight_MDN) < 1e-12  # a component for every singular value of every head
    assert maths.cp(weight_MDN, 100, sweeps=5).width_MC.shape[1] == 24
    planted = maths.CPFactors(width_MC=tensor(9, 3), head_DC=tensor(4, 3), mix_NC=tensor(6, 3)).dense_MDN()
    assert error(maths.cp(planted, 3, sweeps=300), planted) < 1e-4


@pytest.mark.parametrize("sweeps", [0, 10])
def test_the_error_of_tucker_does_not_grow_with_the_budget(sweeps: int) -> None:
    weight_MDN = tensor(*SHAPE)
    errors, bounds = [], []
    for budget in range(30, weight_MDN.numel() + 1, 6):
        ranks = maths.tucker_ranks(weight_MDN, budget)
        assert maths.tucker_parameters(SHAPE, ranks) <= budget
        bounds.append(error(maths.tucker(weight_MDN, ranks, sweeps=0), weight_MDN))
        errors.append(error(maths.tucker(weight_MDN, ranks, sweeps=sweeps), weight_MDN))
    assert all(after <= before + 1e-12 for before, after in pairwise(bounds))  # of HOSVD, for which ranks are chosen
    assert all(swept <= bound + 1e-12 for swept, bound in zip(errors, bounds, strict=True))  # and sweeping only improves on it


def test_the_ranks_of_tucker_are_the_best_of_all_that_fit() -> None:
    weight_MDN, budget = tensor(6, 3, 4), 40
    fitting = [
        ranks
        for ranks in [(r, k, p) for r in range(1, 7) for k in range(1, 4) for p in range(1, 5)]
        if maths.possible_ranks((6, 3, 4), ranks) == ranks and maths.tucker_parameters((6, 3, 4), ranks) <= budget
    ]
    errors = {ranks: error(maths.tucker(weight_MDN, ranks, sweeps=0), weight_MDN) for ranks in fitting}
    assert errors[maths.tucker_ranks(weight_MDN, budget)] == pytest.approx(min(errors.values()))


def test_nested_ranks_of_tucker_never_raise_the_error() -> None:
    weight_MDN = tensor(*SHAPE)
    for mode in range(3):
        errors = []
        for rank in range(1, SHAPE[mode] + 1):
            ranks = [5, 3, 4]
            ranks[mode] = rank
            errors.append(error(maths.tucker(weight_MDN, ranks, sweeps=50), weight_MDN))
        assert all(after <= before + 1e-6 for before, after in pairwise(errors))


def test_cp_is_bounded_by_starts_that_never_grow_with_rank_and_sweeps_only_improve() -> None:
    weight_MDN = tensor(*SHAPE)
    last = 1.0
    for rank in (2, 5, 9, 14, 20):
        by_heads = torch.linalg.svdvals(weight_MDN.movedim(2, 0)).flatten().sort(descending=True).values[rank:]
        by_channels = torch.linalg.svdvals(weight_MDN.movedim(1, 0)).flatten().sort(descending=True).values[rank:]
        bound = min(float(by_heads.norm()), float(by_channels.norm())) / float(weight_MDN.norm())
        errors = [error(maths.cp(weight_MDN, rank, sweeps=sweeps), weight_MDN) for sweeps in (0, 1, 3, 5, 8, 20, 60)]
        assert errors[0] == pytest.approx(bound)
        assert bound <= last
        assert all(after <= before + 1e-12 for before, after in pairwise(errors))
        last = bound


def test_with_the_model_width_alone_tucker_is_the_truncated_svd_of_all_heads_side_by_side() -> None:
    weight_MDN = tensor(*SHAPE)
    left_over = torch.linalg.svdvals(weight_MDN.flatten(1))[4:].norm() / weight_MDN.norm()
    assert error(maths.tucker(weight_MDN, (4, 4, 6), sweeps=10), weight_MDN) == pytest.approx(float(left_over))


def test_a_zero_tensor_and_a_single_head_are_no_trouble() -> None:
    for weight_MDN in (torch.zeros(*SHAPE, dtype=torch.float64), tensor(9, 4, 1)):
        for factors in (maths.tucker(weight_MDN, (2, 2, 1), sweeps=3), maths.cp(weight_MDN, 2, sweeps=3)):
            assert bool(torch.isfinite(factors.dense_MDN()).all())
            assert float((factors.dense_MDN() - weight_MDN).norm()) <= float(weight_MDN.norm())


def test_the_whitener_gives_the_norm_of_the_outputs_and_stands_dead_channels() -> None:
    rows_TM, weight_MO = tensor(5, 9), tensor(9, 4)  # fewer rows than channels, and one channel is dead
    rows_TM[:, 2] = 0
    root_MM, inverse_MM = maths.whitener(floored(rows_TM.t() @ rows_TM).matrix_II)
    torch.testing.assert_close(root_MM @ inverse_MM, torch.eye(9, dtype=torch.float64))
    assert float((root_MM @ weight_MO).norm()) == pytest.approx(float((rows_TM @ weight_MO).norm()), rel=1e-4)


def test_few_rows_are_told_and_no_trouble() -> None:
    for method in (Tucker(keep=0.5), CP(keep=0.5)):
        model = build("llama")
        few = Calibration(examples=[(Pair(part=0, input=np.array([3, 4], np.int32), target=np.array([5], np.int32)),)], loss=LabelOnly())
        applied = method.apply(model, few)
        assert all("more rows may help" in layer.note for layer in applied.layers if layer.path.endswith("q_proj"))
        assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
        assert all(layer.figures["relative_weight_error"] < 1.5 for layer in applied.layers)


def test_the_backend_of_tensorly_is_as_it_was() -> None:
    import tensorly

    library: Any = tensorly
    before = library.get_backend()
    maths.cp(tensor(*SHAPE), 3, sweeps=2)
    assert library.get_backend() == before


def attention_parameters(model: Any) -> int:
    """Of all modules in attention slots, what is shared counted once, without biases."""
    found = {}
    for slot in slots(model):
        if slot.role.is_attention:
            found |= {id(one): one for name, one in slot.module(model).named_parameters() if not name.endswith(("bias", "bias_O"))}
    return sum(one.numel() for one in found.values())


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("method", list(METHODS))
def test_a_model_stays_within_its_budget_loads_bitwise_and_decodes_as_transformers_does(name: str, method: str, tmp_path: Path) -> None:
    model = build(name)
    before = attention_parameters(model)
    biases = {path: one.detach().clone() for path, one in model.named_parameters() if path.endswith(("proj.bias",))}
    applied = METHODS[method].apply(model, calibration())
    assert applied.figures["attention_parameters_before"] == before
    assert applied.figures["attention_parameters_after"] == attention_parameters(model)
    assert attention_parameters(model) <= before * (METHODS[method].keep if isinstance(METHODS[method].keep, float) else 1)
    assert any(layer.kind != "kept" for layer in applied.layers)
    for path, bias in biases.items():
        module: Any = model.get_submodule(path.removesuffix(".bias"))
        module = module.up if isinstance(module, LowRankLinear) else module
        ours: Any = module.bias if isinstance(module, nn.Linear) else module.bias_O
        assert torch.equal(ours, bias)

    tokenizer = train_tokenizer(["hello world"], 300, lower_case=False, ends_every_text=True)
    checkpoint.save(model, tokenizer, tmp_path, lineage=[], card="")
    loaded: Any = checkpoint.load(tmp_path)[0]
    ids_BL = torch.randint(3, VOCABULARY_SIZE, (3, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids_BL} | ({"decoder_input_ids": ids_BL[:, :4]} if model.config.is_encoder_decoder else {})
    with torch.inference_mode():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
        reference = loaded.double().generate(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), generation_config=config)
    ours = Engine(loaded).generate(ids_BL.tolist(), Decoding(max_new_tokens=8))
    first = 1 if model.config.is_encoder_decoder else ids_BL.shape[1]
    for made, expected in zip(ours, reference[:, first:].tolist(), strict=True):
        assert list(made.tokens) == (expected[: expected.index(1)] if 1 in expected else expected)


@pytest.mark.parametrize("name", ["t5 v1.1", "llama"])
@pytest.mark.parametrize("method", [Tucker(keep=(16, 3, 100), data=Data.PLAIN), Tucker(keep=(8, 4, 100)), CP(keep=12, data=Data.PLAIN), CP(keep=12)])
@torch.no_grad()
def test_the_module_is_the_dense_reconstruction(name: str, method: Tucker | CP) -> None:
    """What the compressed model computes is what the dense one does with the multiplied-out weights; and the weights' errors are as told."""
    model, dense = build(name, torch.float64), build(name, torch.float64)
    applied = method.apply(model, calibration())
    told = {layer.path: layer.figures for layer in applied.layers}
    for slot in slots(model):
        module, linear = slot.module(model), slot.module(dense)
        if type(module) in (TuckerLinear, CPLinear, LowRankLinear):
            weight_OI = module.up.weight @ module.down.weight if isinstance(module, LowRankLinear) else module.dense_OI(torch.float64)
            assert told[slot.path]["relative_weight_error"] == pytest.approx(float((weight_OI - linear.weight).norm() / linear.weight.norm()))
            linear.weight.data.copy_(weight_OI)
    ids_BL = torch.randint(3, VOCABULARY_SIZE, (2, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids_BL} | ({"decoder_input_ids": ids_BL} if model.config.is_encoder_decoder else {})
    torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits)


@pytest.mark.parametrize("make", [Tucker, CP])
@torch.no_grad()
def test_whitening_lowers_the_error_of_the_outputs(make: Any) -> None:
    """The told output error is the one measured on the inputs of the calibration rows, and lower than that of the plain decomposition."""
    rows = calibration()
    measured = {}
    for data in Data:
        model, dense = build("llama", torch.float64), build("llama", torch.float64)
        applied = make(keep=0.6, data=data, sweeps=30).apply(model, rows)
        inputs: list[Tensor] = []
        query = dense.model.layers[0].self_attn.q_proj
        query.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].reshape(-1, 16)))
        rows.mean_loss(dense)
        x_TI = torch.cat(inputs)
        told = {layer.path: layer.figures for layer in applied.layers}
        errors = []
        for path in [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]:
            ours, theirs = (one.get_submodule(path)(x_TI) for one in (model, dense))
            errors.append(float((ours - theirs).norm() / theirs.norm()))
            if data is Data.WHITENED:
                assert told[path]["relative_error"] == pytest.approx(errors[-1], rel=1e-3)
        measured[data] = sum(error**2 for error in errors)
    assert measured[Data.WHITENED] < measured[Data.PLAIN]


def test_a_small_matrix_is_not_given_up() -> None:
    """The same model with other units of its values, which o undoes, is compressed alike."""
    for method in (Tucker(keep=0.5), CP(keep=0.5), Tucker(keep=0.5, data=Data.PLAIN)):
        errors = []
        for scale in (1.0, 1e-3):
            model = build("llama", torch.float64)
            for layer in model.model.layers:
                layer.self_attn.v_proj.weight.data *= scale
                layer.self_attn.o_proj.weight.data /= scale
            errors.append([layer.figures["relative_weight_error"] for layer in method.apply(model, calibration()).layers])
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_what_is_shared_is_one_parameter_and_special_cases_are_low_rank_linears() -> None:
    model = build("llama")
    CP(keep=0.5).apply(model, calibration())
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.width_RM is attention.k_proj.width_RM is attention.v_proj.width_RM
    assert attention.q_proj.head_DR is attention.v_proj.head_DR
    model = build("llama")
    Tucker(keep=(6, 4, 100), data=Data.PLAIN).apply(model, calibration())  # the heads of k are 2 and all of them 8; more is not there
    attention = model.model.layers[0].self_attn
    assert all(type(attention.get_submodule(f"{name}_proj")) is LowRankLinear for name in "qkvo")
    assert attention.q_proj.down.weight is attention.k_proj.down.weight
    model = build("llama")
    Tucker(keep=(10, 4, 100), data=Data.PLAIN).apply(model, calibration())
    assert type(model.model.layers[0].self_attn.k_proj) is TuckerLinear  # k has 8 outputs, and a low-rank linear would refuse rank 10


def test_bfloat16_weights_keep_their_dtype() -> None:
    for method in (Tucker(keep=0.5), CP(keep=0.5)):
        model = build("qwen2", torch.bfloat16)
        method.apply(model, calibration())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        ids_BL = torch.randint(3, VOCABULARY_SIZE, (2, 6), generator=torch.Generator().manual_seed(1))
        assert bool(torch.isfinite(model(input_ids=ids_BL).logits).all())


def test_the_same_settings_give_the_same_weights() -> None:
    for method in (Tucker(keep=0.5), CP(keep=0.5)):
        first, second = build("t5 v1.1"), build("t5 v1.1")
        method.apply(first, calibration())
        method.apply(second, calibration())
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_factors_learn() -> None:
    model = build("t5 v1.1")
    model.train()
    CP(keep=0.5).apply(model, calibration())
    assert model.encoder.block[0].layer[0].SelfAttention.q.training
    ids_BL = torch.randint(3, VOCABULARY_SIZE, (2, 6), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids_BL, labels=ids_BL).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name.endswith(("_RM", "_DR", "_HR")))


def test_ranks_beyond_break_even_keep_the_layer_dense_and_say_so() -> None:
    for method in (Tucker(keep=(15, 4, 100)), CP(keep=40)):
        model = build("llama")
        applied = method.apply(model, calibration())
        assert all(layer.kind == "kept" and "parameters, and the dense weights have" in layer.note for layer in applied.layers if "v_proj" in layer.path)
        assert all(type(slot.module(model)) is nn.Linear for slot in slots(model) if slot.role is Role.V)


def test_what_cannot_be_done_is_said_before_anything_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    for method in (Tucker(keep=0.01), CP(keep=0.01)):
        with pytest.raises(ValueError, match="parameters are too few"):
            method.apply(model, calibration())
    assert all(type(slot.module(model)) is nn.Linear for slot in slots(model))
    CP(keep=0.5).apply(model, calibration())
    with pytest.raises(ValueError, match=r"tucker changes linears, and model.layers.0.self_attn.q_proj holds a cp module already"):
        Tucker(keep=0.5).apply(model, calibration())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'llmdistill\[tensors\]'"):
        CP(keep=0.5).apply(model, calibration())


@pytest.mark.parametrize(
    "make, settings, told",
    [
        (Tucker, {"keep": 1.0}, "Tucker.keep is 1.0; a share is above 0 and below 1"),
        (Tucker, {"keep": (3, 0, 1)}, "give three ranks of 1 or more"),
        (CP, {"keep": 0}, "CP.keep is 0; give a rank of 1 or more"),
        (CP, {"sweeps": -1}, "CP.sweeps is -1; give 0 or more"),
        (CP, {"stack": Stack.LAYER}, "cannot whiten a stack of a whole layer"),
    ],
)
def test_bad_settings_say_what_is_wrong(make: Any, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make(**settings)


@pytest.mark.parametrize("text", ["tucker:0.4?data=PLAIN", "tucker:8,4,6", "tucker", "cp:0.7?sweeps=3", "cp:12?stack=LAYER&data=PLAIN"])
def test_settings_are_one_string(text: str) -> None:
    method = parse(text, (Tucker, CP))
    assert parse(write(method), (Tucker, CP)) == method
    assert write(method) == text
