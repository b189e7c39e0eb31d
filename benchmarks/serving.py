"""Our server beside a plain transformers server under the same load: `python benchmarks/serving.py`.

The plain server is what one writes first: FastAPI, and `generate` for one request at a time. Both are processes of their own on the loopback, serve the same
randomly initialised checkpoint in float32 and are sent the same requests (prompts of 16 to 128 tokens, answers of 4 to 32, greedy; no stop token, so both
write all of it). The load is open: requests leave at random times that do not wait for answers, as those of independent users do, and a latency counts from
the time at which its request was due. The rates are multiples of what the plain server manages one by one; "flood" sends everything at once. Each run has a
bounded number of requests and ends after --limit-seconds; what is not answered by then is counted as such.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

NUM_WORDS = {"t5-small": 32_000, "tiny": 200}
FLOOD = float("inf")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run against one server, after its warm-up."""

    latencies_ms: list[float]
    texts: list[str]  # of all requests; empty where there was no answer
    seconds: float
    is_complete: bool  # all were answered

    def percentile(self, percent: int) -> float:
        return statistics.quantiles(self.latencies_ms, n=100, method="inclusive")[percent - 1] if len(self.latencies_ms) > 1 else float("nan")

    @property
    def answers_per_second(self) -> float:
        return len(self.latencies_ms) / self.seconds


def make_checkpoint(size: str, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config

    from llmdistill.models.checkpoint import save
    from llmdistill.models.t5 import new_t5

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{word}": word + 3 for word in range(NUM_WORDS[size])}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    shape: dict[str, Any] = {"t5-small": {"num_layers": 6}, "tiny": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 2}}[size]
    torch.manual_seed(0)
    model = new_t5(T5Config(vocab_size=len(vocabulary), tie_word_embeddings=False, **shape)).eval()  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        model.lm_head.weight[:3] = 0  # no special tokens: every answer is text, and as long as was asked for
    assert model.generation_config is not None
    model.generation_config.update(decoder_start_token_id=0, pad_token_id=0, eos_token_id=None)
    save(model, tokenizer, folder, lineage=[], card="a benchmark")


def serve_plain(folder: Path) -> None:
    """One request at a time through generate."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    app, one_at_a_time = FastAPI(), asyncio.Lock()

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            inputs = tokenizer(body["prompt"], return_tensors="pt", return_token_type_ids=False)
            tokens = model.generate(**inputs, max_new_tokens=body["max_tokens"], do_sample=False)
        return {"choices": [{"text": tokenizer.decode(tokens[0], skip_special_tokens=True)}]}

    async def completions(body: dict[str, Any]) -> dict[str, Any]:
        async with one_at_a_time:
            return await asyncio.to_thread(answer, body)

    app.add_api_route("/v1/completions", completions, methods=["POST"])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        print(f"serving plain on http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", flush=True)
        await serving

    asyncio.run(run())


def serve_ours(folder: Path) -> None:
    from llmdistill.serve.app import serve
    from llmdistill.serve.settings import ServeSettings

    serve(folder, port=0, settings=ServeSettings(model_name="model", max_queue_rows=100_000, max_open_requests=100_000))


class ServerProcess(NamedTuple):
    """A server that runs, and its address."""

    url: str
    pid: int

    def cpu_seconds(self) -> float:
        """That it has used so far (Linux), which other work on the machine adds little to."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def server_process(side: str, folder: Path, num_threads: int, *, script: str = __file__, options: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """Runs a script as a server."""
    command = [sys.executable, script, "--side", side, "--folder", str(folder), "--threads", str(num_threads), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {side} server did not start")
        yield ServerProcess(line.split()[-1], process.pid)
    finally:
        process.terminate()
        process.wait()


def make_requests(size: str, num_requests: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    prompts = [" ".join(f"w{draw.randrange(NUM_WORDS[size])}" for _ in range(draw.randint(15, 127))) for _ in range(num_requests)]
    return [{"model": "model", "prompt": prompt, "max_tokens": draw.randint(4, 32), "temperature": 0} for prompt in prompts]


async def post(url: str, data: bytes) -> tuple[int, bytes]:
    """One request on a connection of its own; a client library would take more time than the answers do."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        answer_head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        return int(answer_head.split()[1]), answer
    finally:
        writer.close()


async def load(url: str, requests: list[dict[str, Any]], rate_per_second: float, limit_seconds: float, warm_up: float = 0.0) -> Measured:
    """Sends each request when it is due and waits for what comes. Of the first ones, this share, latencies and answers a second are not counted."""
    draw = random.Random(1)
    dues, due = [], 0.0
    for _ in requests:
        dues.append(due)
        due += 0.0 if rate_per_second == FLOOD else draw.expovariate(rate_per_second)
    first = int(warm_up * len(requests))
    latencies: list[float] = []
    texts = [""] * len(requests)
    last = begin = time.perf_counter()

    async def send(index: int) -> None:
        nonlocal last
        await asyncio.sleep(begin + dues[index] - time.perf_counter())
        status, answer = await post(url, json.dumps(requests[index]).encode())
        last = time.perf_counter()
        if status == 200:
            texts[index] = json.loads(answer)["choices"][0]["text"]
            if index >= first:
                latencies.append((last - begin - dues[index]) * 1000)

    tasks = [asyncio.create_task(send(index)) for index in range(len(requests))]
    _, unanswered = await asyncio.wait(tasks, timeout=limit_seconds)
    for task in unanswered:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await post(url, json.dumps(requests[0]).encode())  # behind what a server still does for clients that are gone: the next run begins idle
    seconds = (limit_seconds if unanswered else last - begin) - dues[first]
    return Measured(latencies_ms=latencies, texts=texts, seconds=seconds, is_complete=len(latencies) == len(requests) - first)


async def one_by_one(url: str, requests: list[dict[str, Any]]) -> float:
    """Answers per second when each request waits for the one before."""
    await post(url, json.dumps(requests[0]).encode())
    begin = time.perf_counter()
    for request in requests:
        await post(url, json.dumps(request).encode())
    return len(requests) / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=NUM_WORDS, default="t5-small")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each server; the load generator needs a core too")
    parser.add_argument("--num-requests", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.9, 2.0], help="multiples of the plain server's one-by-one rate")
    parser.add_argument("--limit-seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--side", choices=["plain", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        import torch

        torch.set_num_threads(arguments.threads)
        {"plain": serve_plain, "ours": serve_ours}[arguments.side](arguments.folder)
        return
    requests = make_requests(arguments.size, arguments.num_requests)
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        make_checkpoint(arguments.size, folder)
        with server_process("plain", folder, arguments.threads) as plain, server_process("ours", folder, arguments.threads) as ours:
            base_rate = asyncio.run(one_by_one(plain.url, requests[:20]))
            our_rate = asyncio.run(one_by_one(ours.url, requests[:20]))
            rates = f"plain {base_rate:.1f} answers/s, ours {our_rate:.1f}, ratio {our_rate / base_rate:.2f}"
            print(f"{arguments.size}, {arguments.threads} threads; one by one: {rates}", flush=True)
            for multiple in [*arguments.rates, FLOOD]:
                measured = {
                    side: asyncio.run(load(server.url, requests, multiple * base_rate, arguments.limit_seconds))
                    for side, server in [("plain", plain), ("ours", ours)]
                }
                figures.append(show("flood" if multiple == FLOOD else f"{multiple:g}x = {multiple * base_rate:.1f}/s", measured["plain"], measured["ours"]))
    batching_ratio = figures[-1]["ours_answers_per_second"] / our_rate
    print(f"continuous batching: ours answers {batching_ratio:.2f} times as many a second in a flood as one by one", flush=True)
    if arguments.json:
        ratios = {"one_by_one_ratio": our_rate / base_rate, "continuous_batching_ratio": batching_ratio}
        arguments.json.write_text(json.dumps({**ratios, "runs": figures}, indent=2) + "\n")


def show(name: str, plain: Measured, ours: Measured) -> dict[str, Any]:
    """Prints one load; its figures."""
    for side, run in [("plain", plain), ("ours", ours)]:
        quantiles = " ".join(f"p{percent} {run.percentile(percent):8.1f} ms" for percent in (50, 95, 99))
        print(f"{name:>16} {side:5}: {quantiles}  {run.answers_per_second:6.1f} answers/s  {len(run.latencies_ms)}/{len(run.texts)} answered")
    both = [(a, b) for a, b in zip(plain.texts, ours.texts, strict=True) if a and b]
    num_equal = sum(a == b for a, b in both)
    throughput, latency = ours.answers_per_second / plain.answers_per_second, plain.percentile(95) / ours.percentile(95)
    print(f"{name:>16} ratio: throughput {throughput:.2f}, p95 latency {latency:.2f} times shorter; equal answers {num_equal}/{len(both)}", flush=True)
    return {
        "load": name,
        "throughput_ratio": throughput,
        "latency_p95_ratio": latency,
        **{f"{side}_p{percent}_ms": run.percentile(percent) for side, run in [("plain", plain), ("ours", ours)] for percent in (50, 95, 99)},
        **{f"{side}_answers_per_second": run.answers_per_second for side, run in [("plain", plain), ("ours", ours)]},
    }


if __name__ == "__main__":
    main()
