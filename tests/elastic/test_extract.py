"""Extraction: what runs in place is what comes out, bitwise, as a folder that loads; a stock one where the shape allows."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_models import AXES, DENSE, MODELS, PROMPTS, elastic_model, logits, random_model
from transformers import PreTrainedTokenizerBase

from llmdistill.decode.engine import Decoding, Engine
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.choice import parse, write
from llmdistill.elastic.cost import flops, num_bytes, num_parameters
from llmdistill.elastic.extract import extract, extracted, is_stock
from llmdistill.elastic.kept import active_of, is_elastic, keep, space_of
from llmdistill.elastic.measure import shape_of
from llmdistill.elastic.space import Space, Subnet
from llmdistill.elastic.subnet import activate, running, with_subnet
from llmdistill.models import checkpoint
from llmdistill.models.resized import resize
from llmdistill.models.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["some text"], 262, lower_case=False, ends_every_text=True)


def tokens(model: Any) -> list[Any]:
    return Engine(model, max_batch_rows=4).generate(PROMPTS, Decoding(max_new_tokens=5)) + Engine(model).generate(
        PROMPTS, Decoding(max_new_tokens=4, num_beams=2)
    )


def some(space: Space, num: int = 5) -> list[Subnet]:
    return [space.smallest(), space.largest(), *(space.sample(random.Random(seed)) for seed in range(num))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_in_place_is_the_extraction_bitwise_before_and_after_the_disk(
    name: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, space = elastic_model(name, dtype=dtype, decoder=(2, 0, 1))
    for number, subnet in enumerate(some(space, 4 if dtype is torch.float32 else 1)):
        with with_subnet(model, subnet):
            in_place = logits(model), tokens(model)
        small = extracted(model, subnet)
        assert not is_elastic(small)
        assert torch.equal(logits(small), in_place[0])
        assert tokens(small) == in_place[1]  # log-probabilities too
        folder = tmp_path / str(number)
        checkpoint.save(small, tokenizer, folder, lineage=[], card="")
        loaded, _ = checkpoint.load(folder)
        assert torch.equal(logits(loaded), in_place[0])
        assert type(loaded).__name__.startswith("Structured") != is_stock(space, subnet)
        assert ("sizes" in json.loads((folder / "config.json").read_text())) != is_stock(space, subnet)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_by_arithmetic(name: str) -> None:
    model, space = elastic_model(name)
    for subnet in some(space, 5):
        number = sum(parameter.numel() for parameter in extracted(model, subnet).parameters())
        assert num_parameters(space, subnet) == number
        assert num_bytes(space, subnet, bytes_per_parameter=2) == 2 * number


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_those_that_torch_counts(name: str) -> None:
    """Of one token each, where stock attention computes no more than the engine's: it does not skip what the causal mask hides."""
    from torch.utils.flop_counter import FlopCounterMode

    model, space = elastic_model(name)
    for subnet in some(space, 3):
        small = extracted(model, subnet)
        small.set_attn_implementation("eager")
        prompt = [[5, 6, 7, 8]] if small.config.is_encoder_decoder else [[5]]
        inputs: Any = {"input_ids": torch.tensor(prompt)} | ({"decoder_input_ids": torch.tensor([[0]])} if small.config.is_encoder_decoder else {})
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            small(**inputs)
        assert flops(space, subnet, prompt_tokens=len(prompt[0]), new_tokens=1) == counter.get_total_flops()


def test_longer_texts_cost_more_and_more_a_token() -> None:
    space = elastic_model("llama")[1]
    subnet = space.largest()
    costs = [flops(space, subnet, prompt_tokens=10, new_tokens=number) for number in (1, 2, 3)]
    assert costs[2] - costs[1] > costs[1] - costs[0] > 0
    with pytest.raises(ValueError, match="new_tokens 0"):
        flops(space, subnet, prompt_tokens=1, new_tokens=0)


def test_even_ones_load_in_stock_transformers_without_llmdistill(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folders = []
    for name in DENSE:
        model, space = elastic_model(name, replace(AXES, even=True))
        for subnet in [space.smallest(), space.sample(random.Random(5))]:
            assert is_stock(space, subnet)
            small = extracted(model, subnet)
            folders.append(str(tmp_path / str(len(folders))))
            checkpoint.save(small, tokenizer, Path(folders[-1]), lineage=[], card="")
            torch.save(logits(small), folders[-1] + "/logits.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
for folder in {folders}:
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    except ValueError:
        model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(7) < torch.tensor([7, 5, 3])[:, None]).long()
    more = {{"decoder_input_ids": ids[:, :5]}} if model.config.is_encoder_decoder else {{}}
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids, attention_mask=mask, **more).logits
    assert torch.equal(logits, torch.load(folder + "/logits.pt")), folder
assert "llmdistill" not in sys.modules
"""
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["t5 v1.1", "t5 low rank", "llama grouped"])
def test_an_elastic_checkpoint_keeps_its_space(name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, space = elastic_model(name)
    chosen = space.sample(random.Random(3))
    keep(model, space, chosen)
    checkpoint.save(model, tokenizer, tmp_path / "elastic", lineage=[{"technique": "elastic"}], card="# Elastic")
    loaded, _ = checkpoint.load(tmp_path / "elastic")
    assert (space_of(loaded), active_of(loaded)) == (space, chosen)
    assert torch.equal(logits(loaded), logits(model))
    activate(loaded, active_of(loaded))
    with with_subnet(model, chosen):
        assert torch.equal(logits(loaded), logits(model))

    text = write(chosen, space)
    assert extract(tmp_path / "elastic", text, tmp_path / "small") == chosen
    small, _ = checkpoint.load(tmp_path / "small")
    assert torch.equal(logits(small), logits(loaded))
    lineage = json.loads((tmp_path / "small" / "lineage.json").read_text())
    assert [entry["technique"] for entry in lineage] == ["elastic", "extract"]
    assert lineage[1]["settings"] == {"subnet": text}
    assert text in (tmp_path / "small" / "README.md").read_text()
    with pytest.raises(ValueError, match="exists already"):
        extract(tmp_path / "elastic", text, tmp_path / "small")
    with pytest.raises(ValueError, match="not elastic"):
        extract(tmp_path / "small", text, tmp_path / "smaller")


def test_extraction_leaves_the_model_and_what_runs_in_it() -> None:
    model, space = elastic_model("t5 v1.0")
    activate(model, space.smallest())
    before = logits(model)
    small = extracted(model, space.largest())
    assert running(model) == space.smallest()
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), before)
    assert small.lm_head.weight is small.shared.weight is small.decoder.embed_tokens.weight


def test_a_shared_factor_stays_shared() -> None:
    model, space = elastic_model("t5 low rank")
    for subnet in some(space, 10):
        attentions = [block.layer[0].SelfAttention for block in extracted(model, subnet).decoder.block]
        shared = [attention for attention in attentions if hasattr(attention.q, "down")]
        assert all(attention.q.down.weight is attention.k.down.weight for attention in shared)


def test_an_uneven_one_can_be_made_elastic_no_more_but_trains_and_saves(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, space = elastic_model("llama grouped")
    small = extracted(model, parse("ffn=8+16+32,heads=2+4+2", space))
    with pytest.raises(ValueError, match="differ in size"):
        shape_of(small)
    small.save_pretrained(tmp_path / "stock")  # transformers' own way writes what its class cannot read: only checkpoint.save is ours
    checkpoint.save(small, tokenizer, tmp_path / "ours", lineage=[], card="")
    loaded, _ = checkpoint.load(tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "again")
    again, _ = checkpoint.load(tmp_path / "ours")
    assert torch.equal(logits(again), logits(small))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["sizes"] == {"decoder": {"heads": [2, 4, 2], "ffn_widths": [8, 16, 32]}}


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"encoder": {"heads": [4] * 3, "ffn_widths": [8] * 3}}, "'encoder' has .* stacks are decoder of 3 layers"),
        ({"decoder": {"heads": [4] * 2, "ffn_widths": [8] * 3}}, "do not fit"),
        ({"decoder": {"heads": [3, 4, 4], "ffn_widths": [8] * 3}}, "multiples of 2 heads"),
    ],
)
def test_sizes_that_do_not_fit_say_so(sizes: dict[str, dict[str, list[int]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize(random_model("llama grouped"), sizes)
    with pytest.raises(ValueError, match="one number for all its layers"):
        resize(random_model("t5 v1.0"), {"decoder": {"heads": [1, 2, 3], "ffn_widths": [8] * 3}})


def test_what_transformers_llama_cannot_say_is_ours(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A width that is no multiple of the heads, though all layers are alike."""
    model, space = elastic_model("llama", Axes(ffn=(1.0,), heads=(0.75,), depth=(1.0,)))
    subnet = parse("heads=3", space)
    assert not is_stock(space, subnet)
    small = extracted(model, subnet)
    checkpoint.save(small, tokenizer, tmp_path / "small", lineage=[], card="")
    loaded, _ = checkpoint.load(tmp_path / "small")
    with with_subnet(model, subnet):
        assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="leave those heads out"):
        Axes(ffn=(1.0,), heads=(0.75,), depth=(1.0,), even=True).space(shape_of(random_model("llama")))
