"""The loss of exits against its definition through transformers' own states, and its laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_training import VOCABULARY_SIZE, examples
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, T5Config

from llmdistill.batches import collate
from llmdistill.losses.exits import ExitLoss
from llmdistill.losses.loss import target_states_ND
from llmdistill.losses.multitask import Multitask
from llmdistill.models.exit_settings import ExitSettings
from llmdistill.models.exits import add_exits
from llmdistill.models.t5 import new_t5

DEPTHS = (1, 3)


def student(kind: str, *, num_vocabulary: int = 0, encoder_layers: tuple[int, ...] = ()) -> Any:
    torch.manual_seed(0)
    if kind == "t5":
        shape: dict[str, Any] = {"d_model": 16, "d_kv": 4, "num_heads": 3, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 4, "vocab_size": VOCABULARY_SIZE}
        rest: dict[str, Any] = {"tie_word_embeddings": True, "dropout_rate": 0.0, "decoder_start_token_id": 0}
        model: Any = new_t5(T5Config(**shape, **rest, pad_token_id=0, eos_token_id=1))
    else:
        shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "num_hidden_layers": 4}
        model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCABULARY_SIZE, pad_token_id=0, eos_token_id=1))
    model = model.double()
    vocabulary = list(range(0, VOCABULARY_SIZE, 2))[:num_vocabulary]
    exits = add_exits(
        model, ExitSettings(layers=DEPTHS, encoder_layers=encoder_layers, adapter_rank=2, num_vocabulary=num_vocabulary, has_gates=True), vocabulary
    )
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter)
    return model.double().eval()


def make_loss(**settings: Any) -> ExitLoss:
    return ExitLoss(**{"multitask": Multitask(rationale_weight=0.5), "has_gates": True, "trains_whole": True, "kl_weight": 0.7} | settings)


def test_exits_of_the_encoder_learn_what_the_whole_decoder_makes_of_their_states() -> None:
    model, rows = student("t5", encoder_layers=(1,)), examples(6)
    loss, batch = make_loss(), collate(rows, causal=False)
    without = loss.sums_P(model, batch)
    model.config.exits = model.config.exits | {"encoder_layers": []}
    decoder_alone = loss.sums_P(model, batch)
    expected = torch.zeros(7, dtype=torch.float64)
    share = 1 / (1 + 2)
    right: dict[tuple[int, int], list[Any]] = {}
    for number, row in enumerate(rows):
        for pair in row:
            tokens, target = (torch.from_numpy(one.astype("int64")) for one in (pair.input, pair.target))
            given = torch.cat([torch.tensor([pair.start]), target[:-1]])[None]
            states = model.encoder(input_ids=tokens[None], output_hidden_states=True)
            encoded = model.exits.encoded(0, states.hidden_states[1])
            last, early = (
                model(encoder_outputs=(one,), attention_mask=torch.ones(1, len(tokens)), decoder_input_ids=given).logits[0]
                for one in (states.last_hidden_state, encoded)
            )
            expected[2 + pair.part] += share * F.cross_entropy(early, target, reduction="sum")
            soft = last.log_softmax(-1)
            expected[4 + pair.part] += share * (soft.exp() * (soft - early.log_softmax(-1))).sum()
            logit = model.exits.encoder_gate(0, encoded, torch.ones(1, len(tokens), dtype=torch.bool))[0]
            right[number, pair.part] = [logit, bool((last.argmax(-1) == early.argmax(-1)).all()), len(target)]
    for logit, is_right, num_tokens in right.values():
        expected[6] += share * num_tokens * F.binary_cross_entropy_with_logits(logit, torch.tensor(float(is_right), dtype=torch.float64))
    torch.testing.assert_close(without - decoder_alone, expected)


def by_hand(model: Any, rows: Any) -> Tensor:
    """Every part's sum, one pair at a time, from the states that transformers hands out."""
    sums = torch.zeros(7, dtype=torch.float64)
    shares = [depth / (sum(DEPTHS) + 4) for depth in (*DEPTHS, 4)]
    vocabulary = model.exits.vocabulary_K if hasattr(model.exits, "vocabulary_K") else torch.arange(VOCABULARY_SIZE)
    for pair in (pair for row in rows for pair in row):
        target = torch.from_numpy(pair.target.astype("int64"))
        if model.config.is_encoder_decoder:
            given = torch.cat([torch.tensor([pair.start]), target[:-1]])
            output = model(input_ids=torch.from_numpy(pair.input.astype("int64"))[None], decoder_input_ids=given[None], output_hidden_states=True)
            states, scale, first = output.decoder_hidden_states, model.model_dim**-0.5, 0
        else:
            text = torch.cat([torch.from_numpy(pair.input.astype("int64")), target])
            output = model(input_ids=text[None, :-1], output_hidden_states=True)
            states, scale, first = output.hidden_states, 1.0, len(pair.input) - 1
        last = output.logits[0, first:]
        sums[pair.part] += shares[-1] * F.cross_entropy(last, target, reduction="sum")
        for place, depth in enumerate(DEPTHS):
            normed = model.exits.read(place, states[depth][0, first:])
            logits = model.lm_head(normed * scale)[:, vocabulary]
            for token, of_exit, of_last in zip(target, logits, last, strict=True):
                where = (vocabulary == token).nonzero()
                if len(where):
                    sums[2 + pair.part] += shares[place] * F.cross_entropy(of_exit, where[0, 0])
                    soft = of_last[vocabulary].log_softmax(-1)
                    sums[4 + pair.part] += shares[place] * (soft.exp() * (soft - of_exit.log_softmax(-1))).sum()
            right = (vocabulary[logits.argmax(-1)] == last.argmax(-1)).double()
            sums[6] += shares[place] * F.binary_cross_entropy_with_logits(model.exits.gates[place](normed)[:, 0], right, reduction="sum")
    return sums


@pytest.mark.parametrize("num_vocabulary", [0, 20])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_sums_are_those_of_the_definition(kind: str, num_vocabulary: int) -> None:
    model, rows = student(kind, num_vocabulary=num_vocabulary), examples(5)
    loss = make_loss()
    batch = collate(rows, causal=kind != "t5")
    torch.testing.assert_close(loss.sums_P(model, batch), by_hand(model, rows))
    assert loss.parts == ("label", "rationale", "exits_label", "exits_rationale", "kl_exits_label", "kl_exits_rationale", "gates")
    assert loss.weights == (1.0, 0.5, 1.0, 0.5, 0.7, 0.35, 1.0)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_one_batch_of_8_is_8_of_1(kind: str) -> None:
    model, rows, loss = student(kind), examples(8), make_loss(layer_dropout=0.5, input_noise=0.5, seed=3)
    model.train()
    whole, single = (collate(some, causal=kind != "t5") for some in (rows, rows[:1]))
    assert loss.skipped(4, whole.step) == loss.skipped(4, single.step)
    parts = sum(loss.sums_P(model, collate([row], causal=kind != "t5")) for row in rows)
    torch.testing.assert_close(loss.sums_P(model, whole), parts)
    counts: Any = sum(loss.counts_P(collate([row], causal=kind != "t5")) for row in rows)
    assert torch.equal(loss.counts_P(whole), counts)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_where_the_exits_alone_are_trained_nothing_else_has_a_gradient(kind: str) -> None:
    model = student(kind)
    make_loss(trains_whole=False).sums_P(model, collate(examples(4), causal=kind != "t5")).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    heads = {name for name, parameter in model.named_parameters() if parameter is model.lm_head.weight}
    assert {name for name in trained if name.startswith("exits.")} == {name for name, _ in model.named_parameters() if name.startswith("exits.")}
    assert {name for name in trained if not name.startswith("exits.")} <= heads  # the stage trains none of it (models.modes.only_trained)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_gates_teach_nothing_below_them_and_exits_nothing_to_the_last_layer(kind: str) -> None:
    model, batch = student(kind), collate(examples(4), causal=kind != "t5")
    make_loss().sums_P(model, batch)[-1].backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()} == {
        f"exits.gates.{place}.{what}" for place in range(2) for what in ("weight", "bias")
    }
    model = student(kind)
    make_loss().sums_P(model, batch)[4:6].sum().backward()
    last_layer = (model.decoder.block if kind == "t5" else model.model.layers)[3]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in last_layer.parameters())


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_layers_that_are_left_out_are_as_if_they_were_not_there(kind: str) -> None:
    model, batch = student(kind), collate(examples(4), causal=kind != "t5")
    last, states = target_states_ND(model, batch, DEPTHS, [1, 2])
    layers = model.decoder.block if kind == "t5" else model.model.layers
    kept = torch.nn.ModuleList([layers[0], layers[3]])
    if kind == "t5":
        model.decoder.block = kept
    else:
        model.model.layers, model.model.config.num_hidden_layers = kept, 2
    expected, (after_1,) = target_states_ND(model, batch, [1])
    torch.testing.assert_close(last, expected)
    torch.testing.assert_close(states[0], after_1)
    torch.testing.assert_close(states[1], after_1)


def test_later_layers_are_left_out_more_often_and_the_first_never() -> None:
    loss = make_loss(layer_dropout=0.6, seed=1)
    left_out = [loss.skipped(6, step) for step in range(4000)]
    shares = [sum(layer in of_step for of_step in left_out) / len(left_out) for layer in range(6)]
    assert shares[0] == 0
    for layer, share in enumerate(shares):
        assert share == pytest.approx(0.6 * (2 ** (layer / 5) - 1), abs=0.03)
    assert replace(loss, layer_dropout=0.0).skipped(6, 5) == []


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings, message in (
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"layer_dropout": 1.0}, "layer_dropout"),
        ({"input_noise": 1.0}, "input_noise"),
    ):
        with pytest.raises(ValueError, match=message):
            make_loss(**settings)
    with pytest.raises(ValueError, match="layers are not trained"):
        make_loss(trains_whole=False, layer_dropout=0.2)
