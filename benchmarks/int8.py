"""Int8 students decoded, side by side: `python benchmarks/int8.py`.

A randomly initialised T5 of T5-small's shape, 128 tokens in, 32 out (no stop token, so all make all 32), greedy: our engine in int8 and in float32,
transformers' generate in float32, and CTranslate2 in int8 of the same weights (`pip install 'llmdistill[bench]'`). All decode the same prompts in one process,
in turn, so that whatever else the machine does meets all of them; a ratio is the median of those of each round. Ours and CTranslate2's int8 quantize weights by
output channel and activations by token. OpenVINO is not among them: optimum-intel 2.2, which exports T5 to it, wants transformers
below 5.6.

The second part factorises every linear of the blocks at several shares of its full rank, in float32 and in int8: where low rank wins wall time, and where not.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from llmdistill.compress.slots import Role, slots
from llmdistill.decode.engine import Decoding, Engine
from llmdistill.models.int8_embedding import Int8Embedding
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.low_rank_linear import LowRankLinear

GOAL = 3.0
OURS, FULL = "ours, int8", "full, int8"
VOCABULARY_SIZE = 32128
PATHS = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=32)
    parser.add_argument("--rank-shares", type=float, nargs="*", default=[0.5, 0.25], help="of the ranks of the second part; none leaves it out")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the figures")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.tokens_in} tokens in, {arguments.tokens_out} out, greedy")
    model = t5_small()
    int8 = quantized(model)
    print(f"weights: float32 {megabytes(model):.1f} MB, int8 {megabytes(int8):.1f} MB")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for batch_size in arguments.batch_sizes:
            prompts = torch.randint(2, VOCABULARY_SIZE, (batch_size, arguments.tokens_in), generator=torch.Generator().manual_seed(0))
            sides = {"transformers, float32": transformers_side(model, prompts, arguments.tokens_out)}
            sides |= {name: our_side(which, prompts, arguments.tokens_out) for name, which in (("ours, float32", model), (OURS, int8))}
            sides["CTranslate2, int8"] = ctranslate2_side(model, prompts, arguments.tokens_out, Path(folder), arguments.threads)
            figures[f"batch_{batch_size}"] = report(sides, batch_size, arguments)
            ratios = figures[f"batch_{batch_size}"]
            is_met = ratios["transformers, float32"] >= GOAL and ratios["CTranslate2, int8"] > 1
            print(f"  goal: {GOAL:.0f} times transformers, and ahead of CTranslate2: {'met' if is_met else 'missed'}", flush=True)
    for batch_size in arguments.batch_sizes:
        prompts = torch.randint(2, VOCABULARY_SIZE, (batch_size, arguments.tokens_in), generator=torch.Generator().manual_seed(0))
        sides = {"full, float32": our_side(model, prompts, arguments.tokens_out), FULL: our_side(int8, prompts, arguments.tokens_out)}
        for share in arguments.rank_shares:
            low = low_rank(model, share)
            sides[f"rank {share}, float32"] = our_side(low, prompts, arguments.tokens_out)
            sides[f"rank {share}, int8"] = our_side(quantized(low), prompts, arguments.tokens_out)
        if arguments.rank_shares:
            print("low rank in the blocks, our engine")
            figures[f"low_rank_batch_{batch_size}"] = report(sides, batch_size, arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def t5_small() -> T5ForConditionalGeneration:
    """d_model 512, d_kv 64, d_ff 2048, 8 heads, 6 + 6 layers, vocabulary 32128."""
    config = T5Config(d_model=512, d_kv=64, d_ff=2048, num_heads=8, num_layers=6, vocab_size=VOCABULARY_SIZE)
    model = T5ForConditionalGeneration(config).eval()
    assert model.generation_config is not None
    model.generation_config.decoder_start_token_id = 0
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def quantized(model: T5ForConditionalGeneration) -> T5ForConditionalGeneration:
    """A copy with every linear, the embedding and the head in int8."""
    made: Any = copy.deepcopy(model)
    embedding = Int8Embedding.from_embedding(made.shared)
    for path in PATHS:
        made.set_submodule(path, embedding)
    made.lm_head = embedding.head()
    for path, module in list(made.named_modules()):
        if type(module) is nn.Linear:
            made.set_submodule(path, Int8Linear.from_linear(module))
    return made


def low_rank(model: T5ForConditionalGeneration, share: float) -> T5ForConditionalGeneration:
    """A copy whose linears, but for the head, have this share of their full rank; random factors will do, since only time is measured."""
    made: Any = copy.deepcopy(model)
    for slot in slots(made):
        if slot.role is not Role.HEAD:
            linear = slot.module(made)
            rank = round(share * min(linear.in_features, linear.out_features))
            made.set_submodule(slot.path, LowRankLinear(linear.in_features, linear.out_features, rank, bias=False))
    return made


def megabytes(model: nn.Module) -> float:
    return sum(parameter.nbytes for parameter in model.parameters()) / 1e6


def transformers_side(model: Any, prompts: torch.Tensor, num_tokens: int) -> Callable[[], object]:
    mask = torch.ones_like(prompts)

    def decode() -> object:
        with torch.inference_mode():
            return model.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)

    return decode


def our_side(model: nn.Module, prompts: torch.Tensor, num_tokens: int) -> Callable[[], object]:
    engine, rows, decoding = Engine(model, max_batch_rows=len(prompts)), prompts.tolist(), Decoding(max_new_tokens=num_tokens)
    return lambda: engine.generate(rows, decoding)


def ctranslate2_side(model: Any, prompts: torch.Tensor, num_tokens: int, folder: Path, num_threads: int) -> Callable[[], object]:
    """The same weights, converted by CTranslate2's own converter; the tokenizer is one word a token."""
    import ctranslate2
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    converted = folder / "ctranslate2"
    if not converted.exists():
        words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY_SIZE)}, unk_token="w2"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2", pad_token="w0", eos_token="w1")
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        ctranslate2.converters.TransformersConverter(str(folder / "model")).convert(str(converted), quantization="int8")
    translator = ctranslate2.Translator(str(converted), device="cpu", compute_type="int8", intra_threads=num_threads, inter_threads=1)
    tokens = [[f"w{token}" for token in row] for row in prompts.tolist()]
    how: Any = {"beam_size": 1, "max_decoding_length": num_tokens, "min_decoding_length": num_tokens, "max_batch_size": len(tokens)}
    return lambda: translator.translate_batch(tokens, **how)


def report(sides: dict[str, Callable[[], object]], batch_size: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Prints a line a side; how many times as fast as each side the int8 engine is, and its tokens per second."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for decode in sides.values():
        decode()
    for _ in range(arguments.repeats):
        for name, decode in sides.items():
            begin = time.perf_counter()
            decode()
            seconds[name].append(time.perf_counter() - begin)
    ours = seconds[next(name for name in sides if name in (OURS, FULL))]
    ratios = {name: statistics.median(theirs / our for theirs, our in zip(seconds[name], ours, strict=True)) for name in sides}
    num_tokens = batch_size * arguments.tokens_out
    for name in sides:
        median, best = statistics.median(seconds[name]), min(seconds[name])
        print(
            f"  batch {batch_size:2}  {name:22} {1000 * median:8.1f} ms (fastest {1000 * best:8.1f})  {num_tokens / median:6.0f} tokens/s, "
            f"{ratios[name]:5.2f} times ours in int8",
            flush=True,
        )
    return {**ratios, "tokens_per_second": num_tokens / statistics.median(ours)}


if __name__ == "__main__":
    main()
