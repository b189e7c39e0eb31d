"""Int8 students decoded, side by side: `python benchmarks/int8.py`.

A randomly initialised T5 of T5-small's shape, 128 tokens in, 32 out (no stop token, so all make all 32), greedy: our engine in int8 and in float32,
transformers' generate in float32, and CTranslate2 in int8 of the same weights (`pip install 'llmdistill[bench]'`). OpenVINO in int8 is among them where
`--openvino` names the Python of an environment for it (`make .venv-openvino/installed`), since optimum-intel, which exports T5 to it, wants an older
transformers. All decode the same prompts in turn, so that whatever else the machine does meets all of them, each in a process of its own: CTranslate2 and
torch in one process share the OpenMP runtime, which then has more threads than cores, lets them sleep between any two operations, and doubles the time of
every torch model. A ratio is the median of those of each round; a turn is two decodings, of which the first, that finds caches cold, is not counted. Ours and
CTranslate2's int8 quantize weights by output channel and activations by token.

The second part factorises every linear of the blocks at several shares of its full rank, in float32 and in int8: where low rank wins wall time, and where not.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

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
OURS, CTRANSLATE2, OPENVINO = "ours, int8", "CTranslate2, int8", "OpenVINO, int8"
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
    parser.add_argument("--openvino", type=Path, default=None, help="the Python of an environment with optimum-intel[openvino,nncf]")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the figures")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.tokens_in} tokens in, {arguments.tokens_out} out, greedy")
    print(f"weights: float32 {megabytes(t5_small()):.1f} MB, int8 {megabytes(quantized(t5_small())):.1f} MB")
    figures: dict[str, Any] = {}
    for batch_size in arguments.batch_sizes:
        work = Work(batch_size, arguments.tokens_in, arguments.tokens_out, arguments.threads)
        peers: dict[str, MakeSide] = {"transformers, float32": transformers_side, "ours, float32": our_side, OURS: partial(our_side, int8=True)}
        peers[CTRANSLATE2] = ctranslate2_side
        if arguments.openvino:
            peers[OPENVINO] = partial(openvino_side, python=arguments.openvino)
        ratios = figures[f"batch_{batch_size}"] = report(peers, work, arguments.repeats)
        is_met = ratios["transformers, float32"] >= GOAL and all(ratios[name] > 1 for name in (CTRANSLATE2, OPENVINO) if name in ratios)
        print(f"  goal: {GOAL:.0f} times transformers, and ahead of the others in int8: {'met' if is_met else 'missed'}", flush=True)
    for batch_size in arguments.batch_sizes if arguments.rank_shares else ():
        print("low rank in the blocks, our engine")
        work = Work(batch_size, arguments.tokens_in, arguments.tokens_out, arguments.threads)
        sides: dict[str, MakeSide] = {"full, float32": our_side, OURS: partial(our_side, int8=True)}
        for share in arguments.rank_shares:
            sides[f"rank {share}, float32"] = partial(our_side, share=share)
            sides[f"rank {share}, int8"] = partial(our_side, share=share, int8=True)
        figures[f"low_rank_batch_{batch_size}"] = report(sides, work, arguments.repeats)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Work:
    """What every side decodes."""

    batch_size: int
    tokens_in: int
    tokens_out: int
    num_threads: int

    def prompts(self) -> torch.Tensor:
        return torch.randint(2, VOCABULARY_SIZE, (self.batch_size, self.tokens_in), generator=torch.Generator().manual_seed(0))


MakeSide: TypeAlias = "Callable[[Work], Callable[[], object]]"


class Side:
    """Something that decodes, in a process of its own."""

    def __init__(self, make: MakeSide, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, work, other), daemon=True)
        self.process.start()
        other.close()

    def seconds(self) -> float:
        """Of one more decoding of the prompts."""
        self.pipe.send("again")
        return self.pipe.recv()

    def stop(self) -> None:
        self.pipe.close()
        self.process.join()


def _serve(make: MakeSide, work: Work, pipe: Connection) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(work.num_threads)
    decode = make(work)
    with suppress(EOFError):
        while pipe.recv():
            decode()  # the others have just had the caches
            begin = time.perf_counter()
            decode()
            pipe.send(time.perf_counter() - begin)


def t5_small() -> T5ForConditionalGeneration:
    """d_model 512, d_kv 64, d_ff 2048, 8 heads, 6 + 6 layers, vocabulary 32128."""
    torch.manual_seed(0)
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


def transformers_side(work: Work) -> Callable[[], object]:
    model: Any = t5_small()
    prompts, num_tokens = work.prompts(), work.tokens_out
    mask = torch.ones_like(prompts)

    def decode() -> object:
        with torch.inference_mode():
            return model.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)

    return decode


def our_side(work: Work, *, int8: bool = False, share: float | None = None) -> Callable[[], object]:
    model = t5_small() if share is None else low_rank(t5_small(), share)
    engine = Engine(quantized(model) if int8 else model, max_batch_rows=work.batch_size)
    rows, decoding = work.prompts().tolist(), Decoding(max_new_tokens=work.tokens_out)
    return lambda: engine.generate(rows, decoding)


def ctranslate2_side(work: Work) -> Callable[[], object]:
    """The same weights, converted by CTranslate2's own converter; the tokenizer is one word a token."""
    import ctranslate2
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY_SIZE)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2", pad_token="w0", eos_token="w1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        t5_small().save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        ctranslate2.converters.TransformersConverter(str(folder / "model")).convert(str(folder / "converted"), quantization="int8")
        translator = ctranslate2.Translator(str(folder / "converted"), device="cpu", compute_type="int8", intra_threads=work.num_threads, inter_threads=1)
    tokens = [[f"w{token}" for token in row] for row in work.prompts().tolist()]
    how: Any = {"beam_size": 1, "max_decoding_length": work.tokens_out, "min_decoding_length": work.tokens_out, "max_batch_size": len(tokens)}
    return lambda: translator.translate_batch(tokens, **how)


def openvino_side(work: Work, *, python: Path) -> Callable[[], object]:
    """The same weights, by benchmarks/openvino_side.py; this process only asks it and waits."""
    with tempfile.TemporaryDirectory() as folder:
        t5_small().save_pretrained(folder)
        command = [str(python), str(Path(__file__).with_name("openvino_side.py")), folder, str(work.num_threads), str(work.tokens_out)]
        side = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert side.stdin is not None
        assert side.stdout is not None
        pipe_in, pipe_out = side.stdin, side.stdout

        def ask(line: str) -> str:
            pipe_in.write(line + "\n")
            pipe_in.flush()
            return pipe_out.readline()

        pipe_in.write(json.dumps(work.prompts().tolist()) + "\n")
        if not ask("again"):
            raise RuntimeError(f"{shlex.join(command)} ended with {side.wait()}; `make .venv-openvino/installed` makes a Python that can run it")
    return lambda: ask("again")


def report(makes: dict[str, MakeSide], work: Work, repeats: int) -> dict[str, float]:
    """Prints a line a side; how many times as fast as each side the int8 engine is, and its tokens per second."""
    sides = {name: Side(make, work) for name, make in makes.items()}
    for side in sides.values():
        side.seconds()
    rounds = [{name: side.seconds() for name, side in sides.items()} for _ in range(repeats)]
    for side in sides.values():
        side.stop()
    ratios = {name: statistics.median(one[name] / one[OURS] for one in rounds) for name in sides}
    num_tokens = work.batch_size * work.tokens_out
    for name in sides:
        seconds = [one[name] for one in rounds]
        median = statistics.median(seconds)
        print(
            f"  batch {work.batch_size:2}  {name:22} {1000 * median:8.1f} ms (fastest {1000 * min(seconds):8.1f})  {num_tokens / median:6.0f} tokens/s, "
            f"{ratios[name]:5.2f} times ours in int8",
            flush=True,
        )
    return {**ratios, "tokens_per_second": num_tokens / statistics.median(one[OURS] for one in rounds)}


if __name__ == "__main__":
    main()
