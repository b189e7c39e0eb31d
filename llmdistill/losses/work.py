"""How much of a model's work is done: multiplications with weights, of the modules that decide something and of the whole, on given rows.

Counted are the linears, token by token: a layer's own, cross-attention's keys and values for the tokens that are read, the output head for the tokens that are
said, and what gates and saliencies themselves take. Attention's products of tokens with tokens are left out, on both sides.

It is a count, and no time: what a CPU does with it is for benchmarks/dynamic.py to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llmdistill.batches import Example, collate, split
from llmdistill.losses.gates import DECODER, ENCODER, deciding_by, hard, real_tokens, stack_of
from llmdistill.losses.loss import target_logits_NV
from llmdistill.models.anatomy import stacks
from llmdistill.models.channel_gated_feed_forward import ChannelGatedFeedForward
from llmdistill.models.deciding import deciding
from llmdistill.models.modes import evaluating
from llmdistill.models.skipping import skipped
from llmdistill.train_settings import TrainSettings


@torch.no_grad()
def shares_of_work(model: Any, examples: Sequence[Example], settings: TrainSettings) -> dict[str, float]:
    """Of the modules that decide something, by stack and together, and of the whole model, the share that is done on these rows."""
    modules, per_token = deciding(model), _per_token(model)
    costs = {path: module.num_multiplications for path, module in skipped(model).items()}
    all_of, done_of = dict.fromkeys(per_token, 0.0), dict.fromkeys(per_token, 0.0)
    whole = overhead = 0.0
    with evaluating(model):
        for piece in split(examples, settings, 1)[0]:
            batch = collate(piece, causal=not model.config.is_encoder_decoder).to(model.device)
            num_tokens = {stack: len(tokens.index_N) for stack, tokens in real_tokens(batch).items()}
            whole += sum(per_token[stack] * number for stack, number in num_tokens.items()) + len(batch.target_N) * _size(model.lm_head)
            with deciding_by(model, costs, hard) as decided:
                target_logits_NV(model, batch)
            for path, module in modules.items():
                stack = stack_of(path)
                of_all = module.num_multiplications * num_tokens[stack]
                all_of[stack] += of_all
                done_of[stack] += float(decided.cost_of(path, batch)) if path in costs else of_all * _kept(module)
                overhead += _size(_decider(module)) * num_tokens[stack]
    if not sum(all_of.values()):
        raise ValueError("the model has no module that decides something, or there are no rows; give both")
    shares = {f"share_{stack}": done_of[stack] / all_of[stack] for stack in all_of if all_of[stack]}
    skipped_work = sum(all_of.values()) - sum(done_of.values())
    return shares | {"share_gated": sum(done_of.values()) / sum(all_of.values()), "share_model": (whole + overhead - skipped_work) / whole}


def _per_token(model: Any) -> dict[str, int]:
    """Multiplications of one token of each stack, without the head."""
    found = {ENCODER: 0, DECODER: 0} if model.config.is_encoder_decoder else {DECODER: 0}
    for stack in stacks(model):
        for layer in stack.layers:
            for place in layer.places:
                found[ENCODER if place.role in ("cross_k", "cross_v") else stack.name] += _size(place.module)
    return found


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def _kept(module: Any) -> float:
    assert isinstance(module, ChannelGatedFeedForward)
    return module.kept / module.groups


def _decider(module: Any) -> Any:
    return module.saliency if isinstance(module, ChannelGatedFeedForward) else module.gate
