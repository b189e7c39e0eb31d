"""Elastic students and compression, one after the other: what goes together, and what says that it does not."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_models import AXES, DENSE, elastic_model, logits, random_model, rows

from llmdistill.compress.calibration import Calibration
from llmdistill.compress.int8 import Int8
from llmdistill.compress.methods import CompressionMethod
from llmdistill.compress.qsvd import QSVD, Cross
from llmdistill.compress.ranks import Allocation
from llmdistill.compress.slots import slots
from llmdistill.compress.smooth import SmoothQuant
from llmdistill.compress.statistics import input_statistics
from llmdistill.compress.svd import SVD, Data, Scope
from llmdistill.decode.engine import Decoding, Engine
from llmdistill.elastic.cost import num_parameters
from llmdistill.elastic.extract import extracted
from llmdistill.elastic.importance import importance
from llmdistill.elastic.kept import is_elastic, keep, space_of
from llmdistill.elastic.layer_order import layer_orders
from llmdistill.elastic.measure import shape_of
from llmdistill.elastic.sorting import order_by, sort
from llmdistill.elastic.space import Space
from llmdistill.elastic.subnet import with_subnet
from llmdistill.losses.multitask import Multitask
from llmdistill.models import checkpoint
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.tokenizer import train_tokenizer

CALIBRATION = Calibration(examples=rows(6), loss=Multitask())
UNIFORM = SVD(keep=0.5, ranks=Allocation.UNIFORM)
FACTORISING: dict[str, CompressionMethod] = {
    "svd": SVD(keep=0.5),
    "qsvd": QSVD(keep=0.7, cross=Cross.SEPARATE),
    "qsvd of high rank": QSVD(keep=0.97, cross=Cross.NONE, ranks=Allocation.UNIFORM),  # above the outputs of a grouped-query key
}
TOKENIZER = train_tokenizer(["some text"], 262, lower_case=False, ends_every_text=True)


def factorised(name: str, method: CompressionMethod) -> tuple[Any, Space]:
    """Factorised, then sorted and made elastic in all axes."""
    model = random_model(name)
    method.apply(model, CALIBRATION)
    before = logits(model)
    sort(model, order_by(importance(model, rows(3), Multitask()), channels=True))
    assert torch.allclose(logits(model), before, rtol=1e-3, atol=1e-4), "sorting changes no function"
    space = AXES.space(shape_of(model), layer_orders(model, rows(3), Multitask(), fewest=2))
    keep(model, space)
    return model, space


@pytest.mark.parametrize("method", FACTORISING)
@pytest.mark.parametrize("name", ["t5 v1.0", "t5 v1.1", "llama grouped", "qwen2"])
def test_a_factorised_student_becomes_elastic_in_its_ranks_too(name: str, method: str, tmp_path: Path) -> None:
    model, space = factorised(name, FACTORISING[method])
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    assert any(stack.ranks == (0.5, 1.0) for stack in space.stacks)
    assert torch.equal(logits(extracted(model, space.largest())), logits(model)), "the largest is the whole, whatever its ranks"
    checkpoint.save(model, TOKENIZER, tmp_path / "elastic", lineage=[], card="")
    loaded, _ = checkpoint.load(tmp_path / "elastic")
    assert space_of(loaded) == space
    for number, subnet in enumerate([space.smallest(), *(space.sample(random.Random(seed)) for seed in range(3))]):
        with with_subnet(loaded, subnet):
            in_place = logits(loaded)
        small = extracted(model, subnet)
        assert sum(parameter.numel() for parameter in small.parameters()) == num_parameters(space, subnet)
        assert torch.allclose(logits(small), in_place, rtol=1e-4, atol=1e-5)  # ranks need not be multiples of 8 (subnet.py)
        checkpoint.save(small, TOKENIZER, tmp_path / str(number), lineage=[], card="")
        again, _ = checkpoint.load(tmp_path / str(number))
        assert {name: tensor.tolist() for name, tensor in again.state_dict().items()} == {name: tensor.tolist() for name, tensor in small.state_dict().items()}


@pytest.mark.parametrize(
    "method",
    [UNIFORM, replace(UNIFORM, data=Data.PLAIN), QSVD(keep=0.5, cross=Cross.SEPARATE, ranks=Allocation.UNIFORM)],
    ids=["whitened", "plain", "qsvd"],
)
def test_half_the_ranks_are_what_half_the_budget_would_have_kept(method: SVD | QSVD) -> None:
    """The first singular values are the ones that count, so the rank axis cuts as the method itself does."""
    model, half = random_model("t5 v1.1"), random_model("t5 v1.1")
    method.apply(model, CALIBRATION)
    replace(method, keep=0.25).apply(half, CALIBRATION)
    space = replace(AXES, ffn=(1.0,), heads=(1.0,), depth=(1.0,), width=(1.0,)).space(shape_of(model))
    keep(model, space)
    with with_subnet(model, space.smallest()):
        assert torch.allclose(logits(model), logits(half), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits(model), logits(half), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "method, message",
    [
        (QSVD(keep=0.5, cross=Cross.JOINT), r"share a factor.*cross=SEPARATE"),
        (SVD(keep=0.3, scope=(Scope.EMBEDDINGS,)), "low_rank_embedding module"),
        (Int8(), "int8"),
    ],
    ids=["qsvd joint", "embeddings", "int8"],
)
def test_what_cannot_be_cut_is_not_made_elastic(method: CompressionMethod, message: str) -> None:
    model = random_model("t5 v1.1")
    method.apply(model, CALIBRATION)
    with pytest.raises(ValueError, match=message):
        shape_of(model)


@pytest.mark.parametrize("method", [SVD(keep=0.5), QSVD(keep=0.5), Int8(head=False, embedding=False, max_loss_rise=1e6)], ids=lambda method: method.kind)
@pytest.mark.parametrize("name", ["t5 v1.1", "llama grouped"])
def test_a_space_that_is_stale_is_neither_run_nor_extracted_nor_saved(name: str, method: CompressionMethod, tmp_path: Path) -> None:
    model, space = elastic_model(name)
    method.apply(model, CALIBRATION)
    with pytest.raises(ValueError, match="changed after it was made elastic"), with_subnet(model, space.smallest()):
        pass
    with pytest.raises(ValueError, match="Extract one first"):
        extracted(model, space.smallest())
    with pytest.raises(ValueError, match="modules were replaced after it was made so"):
        checkpoint.save(model, TOKENIZER, tmp_path / "stale", lineage=[], card="")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"made for a model of other sizes or ranks|share a factor|quantize after extraction"):
        keep(model, space)


def test_low_rank_students_may_be_factorised_no_further_once_elastic(tmp_path: Path) -> None:
    model, space = factorised("t5 v1.1", SVD(keep=0.5, scope=(Scope.FEED_FORWARD,)))
    SVD(keep=0.5, scope=(Scope.ATTENTION,)).apply(model, CALIBRATION)
    with pytest.raises(ValueError, match="changed after it was made elastic"):
        extracted(model, space.largest())
    with pytest.raises(ValueError, match="modules were replaced"):
        checkpoint.save(model, TOKENIZER, tmp_path / "stale", lineage=[], card="")


@pytest.mark.parametrize("name", ["t5 v1.0", "llama grouped"])
def test_scales_in_norms_leave_the_sub_networks_what_they_were(name: str, tmp_path: Path) -> None:
    """SmoothQuant replaces nothing: what it divides and multiplies is in every prefix alike, so the space holds."""
    model, space = elastic_model(name)
    subnets = [space.smallest(), *(space.sample(random.Random(seed)) for seed in range(3))]
    before = [logits(extracted(model, subnet)) for subnet in subnets]
    SmoothQuant().apply(model, CALIBRATION)
    for subnet, expected in zip(subnets, before, strict=True):
        assert torch.allclose(logits(extracted(model, subnet)), expected, rtol=1e-3, atol=1e-4)
    checkpoint.save(model, TOKENIZER, tmp_path / "smooth", lineage=[], card="")


@pytest.mark.parametrize("name", DENSE)
def test_statistics_are_those_of_the_sub_network_alone(name: str) -> None:
    """Whitening and activation scales taken in place are bitwise the extraction's: one sub-network after another shares nothing."""
    model, space = elastic_model(name)
    different = set()
    for subnet in [space.smallest(), *(space.sample(random.Random(seed)) for seed in range(3)), space.largest(), space.smallest()]:
        with with_subnet(model, subnet):
            in_place = input_statistics(model, slots(model), CALIBRATION)
        small = extracted(model, subnet)
        alone = input_statistics(small, slots(small), CALIBRATION)
        assert in_place.keys() == alone.keys()
        for key, one in in_place.items():
            assert one.num_tokens == alone[key].num_tokens
            for tensor in ("gram_II", "sum_magnitude_I", "largest_magnitude_I"):
                assert torch.equal(getattr(one, tensor), getattr(alone[key], tensor)), (key, tensor)
        different.add(float(in_place["lm_head"].gram_II.sum()))
    assert len(different) >= 4, "sub-networks have statistics of their own"


@pytest.mark.parametrize("name", ["t5 v1.1", "llama grouped", "qwen2"])
def test_an_uneven_sub_network_is_factorised_quantized_and_decoded(name: str, tmp_path: Path) -> None:
    model, space = elastic_model(name)
    small = extracted(model, space.sample(random.Random(3)))
    assert not is_elastic(small)
    num_bytes = sum(parameter.nbytes for parameter in small.parameters())
    for method in (QSVD(keep=0.8), SVD(keep=0.6, scope=(Scope.FEED_FORWARD,)), SmoothQuant(), Int8(max_loss_rise=1e6)):
        method.apply(small, CALIBRATION)
    assert sum(parameter.nbytes for parameter in small.parameters()) < num_bytes
    checkpoint.save(small, TOKENIZER, tmp_path / "small", lineage=[], card="")
    loaded, _ = checkpoint.load(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(small))
    prompts, decoding = [[5, 9, 31], [40, 3]], Decoding(max_new_tokens=4)
    assert Engine(loaded).generate(prompts, decoding) == Engine(small).generate(prompts, decoding)
