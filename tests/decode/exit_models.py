"""Tiny random models with exits, and what they must do, step by step through transformers' own modules in float64.

The reference decodes one row. At every step the whole answer so far goes through the model again, teacher-forced; the newest token's states after each exit are
judged as the engine does it. For propagated states, a layer leaves the states of the tokens that left before it as they are, and its keys and values are then
made of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from random_models import random_model
from torch import Tensor

from llmdistill.decode.confidence import MEASURES, Seen, decayed
from llmdistill.models.anatomy import stacks
from llmdistill.models.exit_settings import Confidence, ExitSettings, Policy
from llmdistill.models.exits import add_exits

LAYERS = {"t5 v1.0": {"num_layers": 6, "num_decoder_layers": 6}, "t5 v1.1": {"num_layers": 6, "num_decoder_layers": 6}}


def exiting_model(kind: str, seed: int, *, layers: Sequence[int] = (1, 3, 4), dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """Six layers, exits with norms, adapters and gates of random numbers."""
    model: Any = random_model(kind, seed, dtype=dtype, **LAYERS.get(kind, {"num_hidden_layers": 6}))
    confidence = settings.get("confidence", Confidence.TOP1)
    vocabulary = list(range(1, model.config.vocab_size, 2))[: settings.get("num_vocabulary", 0)]
    exits = add_exits(
        model, ExitSettings(layers=tuple(layers), adapter_rank=2, has_gates=confidence is Confidence.GATE, **{"confidence": confidence} | settings), vocabulary
    )
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter)
    return model.to(dtype).eval()


@torch.no_grad()
def reference(model: Any, prompt: Sequence[int], *, threshold: float, num_tokens: int) -> tuple[list[int], list[int]]:
    """The tokens of a row and how many layers each went through; there are no stop tokens."""
    settings = ExitSettings.from_json(model.config.exits)
    tokens: list[int] = []
    depths: list[int] = []
    for number in range(num_tokens):
        states = _states(model, prompt, tokens, depths if settings.policy is Policy.PROPAGATED else [])
        limit = decayed(threshold, settings.decay, number, num_tokens)
        token, depth = _leave(model, settings, states, limit)
        tokens.append(token)
        depths.append(depth)
    return tokens, depths


def _leave(model: Any, settings: ExitSettings, states: Sequence[Tensor], threshold: float) -> tuple[int, int]:
    last = stacks(model)[-1]
    scale = model.model_dim**-0.5 if hasattr(model, "model_dim") and model.config.scale_decoder_outputs else 1.0
    for place, depth in enumerate(settings.layers):
        normed = model.exits.read(place, states[depth])
        logits = model.lm_head(normed * scale)
        if settings.num_vocabulary:
            logits = logits[:, model.exits.vocabulary_K]
        gate = model.exits.gates[place] if settings.has_gates else None
        seen = Seen(state_ND=states[depth], before_ND=states[depth - 1], normed_ND=normed, logits_NK=logits, gate=gate)
        if threshold < 1 and float(MEASURES[settings.confidence].confidence_N(seen)) > threshold:
            token = int(logits.argmax(-1))
            return int(model.exits.vocabulary_K[token]) if settings.num_vocabulary else token, depth
    return int(model.lm_head(last.norm(states[-1]) * scale).argmax(-1)), len(last.layers)


def _states(model: Any, prompt: Sequence[int], tokens: Sequence[int], depths: Sequence[int]) -> list[Tensor]:
    """The newest token's states before the first layer and after each. `depths`: where earlier tokens left and their states stay as they are."""
    layers = [layer.module for layer in stacks(model)[-1].layers]
    num_given = 1 if model.config.is_encoder_decoder else len(prompt)
    states: list[Tensor] = []
    hooks = []
    for index, layer in enumerate(layers):
        left = [num_given - 1 + place for place, depth in enumerate(depths) if depth <= index]

        def hook(module: Any, inputs: Any, output: Any, left: list[int] = left) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if not states:
                states.append(inputs[0][:, -1])
            hidden = hidden.clone()
            hidden[:, left] = inputs[0][:, left]
            states.append(hidden[:, -1])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hooks.append(layer.register_forward_hook(hook))
    try:
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            model(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=torch.tensor([[start, *tokens]]), use_cache=False)
        else:
            model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return states
