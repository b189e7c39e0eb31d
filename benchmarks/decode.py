"""Our decode engine against transformers' generate, side by side: `python benchmarks/decode.py`.

A randomly initialised model of T5-small's shape, 128 tokens in, 32 out (no stop token, so both make all 32), greedy, float32. Both decode the same prompts
in one process, in turn, so that whatever else the machine does meets both; the ratio is that of the medians. The tokens of both are compared first.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from llmdistill.decode.engine import Decoding, Engine

GOAL = 1.3


def t5_small() -> T5ForConditionalGeneration:
    """d_model 512, d_kv 64, d_ff 2048, 8 heads, 6 + 6 layers, vocabulary 32128."""
    config = T5Config(d_model=512, d_kv=64, d_ff=2048, num_heads=8, num_layers=6, vocab_size=32128)
    model = T5ForConditionalGeneration(config)
    assert model.generation_config is not None
    model.generation_config.decoder_start_token_id = 0
    return model


def small_llama() -> LlamaForCausalLM:
    """The width and heads of SmolLM2-135M, 6 of its 30 layers."""
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True
    )
    return LlamaForCausalLM(config)


def compare(name: str, model: PreTrainedModel, batch_size: int, num_tokens_in: int, num_tokens_out: int, repeats: int) -> float:
    """Prints one line; transformers' seconds over ours."""
    model.eval()
    generation_config = model.generation_config
    assert generation_config is not None
    generation_config.eos_token_id = None
    generation_config.pad_token_id = 0
    tokens = torch.randint(2, 32000, (batch_size, num_tokens_in), generator=torch.Generator().manual_seed(0))
    prompts, mask = tokens.tolist(), torch.ones_like(tokens)
    engine = Engine(model, max_batch_rows=batch_size)
    decoding = Decoding(max_new_tokens=num_tokens_out)

    def theirs() -> list[list[int]]:
        with torch.inference_mode():
            made = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=num_tokens_out, min_new_tokens=num_tokens_out, do_sample=False)  # pyright: ignore[reportCallIssue]
        return made[:, -num_tokens_out:].tolist()

    def ours() -> list[list[int]]:
        return [list(generated.tokens) for generated in engine.generate(prompts, decoding)]

    num_equal = sum(a == b for a, b in zip(theirs(), ours(), strict=True))
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(repeats):
        for side, decode in (("theirs", theirs), ("ours", ours)):
            begin = time.perf_counter()
            decode()
            seconds[side].append(time.perf_counter() - begin)
    their_ms, our_ms = (statistics.median(seconds[side]) * 1000 for side in ("theirs", "ours"))
    best_ratio = min(seconds["theirs"]) / min(seconds["ours"])
    ratio = their_ms / our_ms
    print(
        f"{name:10} batch {batch_size:2}: transformers {their_ms:8.1f} ms, ours {our_ms:8.1f} ms "
        f"({batch_size * num_tokens_out / our_ms * 1000:6.0f} tokens/s), "
        f"ratio {ratio:.2f} (of the fastest runs {best_ratio:.2f}), equal rows {num_equal}/{batch_size}",
        flush=True,
    )
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=32)
    parser.add_argument("--causal", action="store_true", help="a small model of the Llama class as well, for which there is no goal")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.tokens_in} tokens in, {arguments.tokens_out} out, float32, greedy")
    sizes = (arguments.tokens_in, arguments.tokens_out, arguments.repeats)
    model = t5_small()
    ratios = [compare("T5-small", model, batch_size, *sizes) for batch_size in arguments.batch_sizes]
    print(f"goal {GOAL}: {'met' if min(ratios) >= GOAL else 'missed'} (lowest ratio {min(ratios):.2f})")
    if arguments.causal:
        causal = small_llama()
        for batch_size in arguments.batch_sizes:
            compare("Llama", causal, batch_size, *sizes)


if __name__ == "__main__":
    main()
