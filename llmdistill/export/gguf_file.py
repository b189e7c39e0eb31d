"""A dense Llama or Qwen2 class student as one GGUF file: llama.cpp's names for settings and tensors, and its order of a Llama's rotary channels.

transformers rotates channel i with channel i + width/2 of a head, llama.cpp's llama rotates neighbours; so the rows of q and k are interleaved. Its qwen2
does as transformers. The sources are the GGUF specification (ggml/docs/gguf.md), the name tables of the package gguf, and the arithmetic of llama.cpp's two
graphs. Positions of type llama3 are written as the factors by which its frequencies differ (tensor rope_freqs), as llama.cpp wants them.

Norms and biases are float32 whatever the matrices are.

Shapes: O rows of a matrix or elements of a bias, W width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmdistill.export.dense import because_of_activation, because_of_positions, check, load_dense, refuse
from llmdistill.export.gguf_tokenizer import add_tokenizer, because_of_tokenizer
from llmdistill.export.whole import whole

if TYPE_CHECKING:
    from llmdistill.export.formats import GGUF

PROGRAM = "GGUF"
MODEL_TYPES = ("llama", "qwen2")
POSITIONS = ("default", "linear", "llama3")
MAX_F16 = 65504
Q8_0_BLOCK = 32


def write(settings: GGUF, folder: Path, out: Path) -> None:
    """Write the checkpoint in `folder` to the new file `out`."""
    if out.suffix != ".gguf":
        raise ValueError(f"{out} is to be a GGUF file: end its name in .gguf")
    config: Any
    config, tokenizer = check(folder, out, PROGRAM, MODEL_TYPES, leave_exits=settings.leave_exits)
    refuse(folder, PROGRAM, [*_reasons(config, settings.numbers.name), *because_of_tokenizer(tokenizer, config.vocab_size)])
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    model: Any = load_dense(folder)
    with whole(out) as writing:
        writer = GGUFWriter(writing, model.config.model_type)
        name = settings.numbers.name
        writer.add_name(folder.resolve().name)
        writer.add_file_type(LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"])
        writer.add_quantization_version(2)
        _add_settings(writer, model.config)
        add_tokenizer(writer, tokenizer, model.config.vocab_size)
        _add_stop_tokens(writer, model.generation_config)
        for tensor_name, values in tensors(model):
            _add_tensor(writer, tensor_name, values, GGMLQuantizationType[name] if values.ndim > 1 else GGMLQuantizationType.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name in llama.cpp; a head that is the embedding is left out."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    config = model.config
    names = get_tensor_name_map(MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for path, tensor in model.state_dict().items():
        if path == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        assert name is not None, path
        values, linear = tensor.detach().numpy(), path.split(".")[-2]
        yield name, interleaved(values, heads[linear]) if config.model_type == "llama" and linear in heads else values
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _frequency_factors(model)


def interleaved(values_O: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's order: the first of one half of a head, the first of the other, the second of the one..."""
    return values_O.reshape(num_heads, 2, -1, *values_O.shape[1:]).swapaxes(1, 2).reshape(values_O.shape)


def _reasons(config: Any, numbers: str) -> list[str]:
    reasons = because_of_positions(config, POSITIONS) + because_of_activation(config)
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        reasons.append("it has sliding-window attention")
    widths = {_head_width(config) * config.num_attention_heads, config.hidden_size, config.intermediate_size}
    odd = sorted(width for width in widths if numbers == "Q8_0" and width % Q8_0_BLOCK)
    if odd:
        reasons.append(f"Q8_0 has blocks of {Q8_0_BLOCK} inputs, and it has linears of {', '.join(map(str, odd))} inputs: use gguf:F16")
    return reasons


def _add_settings(writer: Any, config: Any) -> None:
    from gguf import RopeScalingType

    rope, width = config.rope_parameters, _head_width(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_stop_tokens(writer: Any, generation_config: Any) -> None:
    """GGUF has room for three."""
    stops = getattr(generation_config, "eos_token_id", None)
    numbers = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    places = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    if len(numbers) > len(places):
        raise ValueError(f"the student stops at the tokens {numbers}, and a GGUF has room for {len(places)}: leave some out of generation_config.json")
    for add, number in zip(places, numbers, strict=False):
        add(number)


def _add_tensor(writer: Any, name: str, values: np.ndarray, kind: Any) -> None:
    from gguf.quants import quantize

    if kind.name == "F16" and np.abs(values).max() > MAX_F16:
        raise ValueError(f"{name} has numbers up to {np.abs(values).max():.0f}, and F16 ends at {MAX_F16}: use gguf:BF16")
    writer.add_tensor(name, quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def _frequency_factors(model: Any) -> np.ndarray:
    """How many times slower than by the base alone each pair of channels turns."""
    frequencies = model.model.rotary_emb.inv_freq.numpy()
    exponents = np.arange(len(frequencies), dtype=np.float64) / len(frequencies)
    return (model.config.rope_parameters["rope_theta"] ** -exponents / frequencies).astype(np.float32)


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
