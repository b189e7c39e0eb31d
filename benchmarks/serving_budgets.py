"""What budgets are worth under load: `llmdistill run quickstart`, then `python benchmarks/serving_budgets.py`; or `--random`, which needs nothing.

Servers of the quickstart's elastic student (label only, messages of the test split), each a process of its own with one thread for the model:

    plain         FastAPI and transformers' generate, one request at a time, the whole student
    ctranslate2   FastAPI and CTranslate2, all that waits in one batch, the whole student converted to float32
    whole         ours, the whole student
    budgets       ours, the sub-networks that the search measured, with the target for p95: the server moves along them

That student is so small that most of an answer's time is HTTP's. `--random` serves an elastic T5-small of random weights instead (prompts and answers as in
serving.py), whose server has its whole and its smallest sub-network to choose from; without ctranslate2, which gives all rows of a batch one length.

The load is open (serving.py): Poisson arrivals whose rate grows by half each time, for as long as a server keeps up. Told are p50, p95 and p99 of the latency,
how many answers a second, the processor time that the server spent on each, how many are right by the known intents, and in the end the most answers a second
at which p95 is within the target. The first quarter of each run is not counted: a controller has to see the load before it can do anything about it. At each
rate the servers take turns, some times over, and of each server the run with the least p95 counts: what else the machine does only adds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import serving
from serving import Measured, ServerProcess, load, make_checkpoint, one_by_one, serve_plain, server_process

GROWTH = 1.5
KEEPS_UP = 3
"""A server whose p95 is above so many times the target is not asked at higher rates."""
MAX_TOKENS = 32
SIDES = ("plain", "ctranslate2", "whole", "budgets")
WARM_UP = 0.25


def asked(arguments: argparse.Namespace, num_requests: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Requests, and the right answers to them."""
    if arguments.random:
        return serving.make_requests("t5-small", num_requests), [""] * num_requests
    return make_requests(arguments.checkpoint, num_requests)


def make_requests(checkpoint: Path, num_requests: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages of the test split, drawn at random, as the student reads them; and their intents."""
    from llmdistill.losses.prompts import PREDICT
    from llmdistill.serve.predict import TaskSection
    from llmdistill.tasks.tickets import tickets

    task = TaskSection.from_config(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")), is_encoder_decoder=True)
    rows = [row for row in tickets().rows() if row.split == "test"]
    drawn = random.Random(0).choices(rows, k=num_requests)
    prompts = [task.prompt(PREDICT, task.text({name: row.fields[name] for name in task.field_names})) for row in drawn]
    return [{"model": "model", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0} for prompt in prompts], [str(row.gold) for row in drawn]


def make_random(folder: Path) -> Path:
    """An elastic T5-small of random weights."""
    from llmdistill.elastic.axes import Axes
    from llmdistill.elastic.kept import keep
    from llmdistill.elastic.measure import shape_of
    from llmdistill.models.checkpoint import load, save

    make_checkpoint("t5-small", folder / "plain")
    model, tokenizer = load(folder / "plain")
    keep(model, Axes(ffn=(0.5,), heads=(0.5,), depth=(0.5,), width=(0.5,)).space(shape_of(model)))
    save(model, tokenizer, folder / "elastic", lineage=[], card="a benchmark")
    return folder / "elastic"


def convert(checkpoint: Path, out: Path) -> None:
    """For CTranslate2; in a process that is not timed, because it needs torch too."""
    import ctranslate2

    ctranslate2.converters.TransformersConverter(str(checkpoint)).convert(str(out))


def serve_ctranslate2(checkpoint: Path, converted: Path, num_threads: int) -> None:
    """What waits is one batch. No torch in this process: the two share an OpenMP runtime."""
    import ctranslate2
    import uvicorn
    from fastapi import FastAPI
    from tokenizers import Tokenizer

    translator = ctranslate2.Translator(str(converted), device="cpu", compute_type="float32", intra_threads=num_threads, inter_threads=1)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    app, waiting = FastAPI(), asyncio.Queue[tuple[str, asyncio.Future[str]]]()

    def answer(prompts: list[str]) -> list[str]:
        tokens = [encoding.tokens for encoding in tokenizer.encode_batch(prompts)]
        results = translator.translate_batch(tokens, beam_size=1, max_decoding_length=MAX_TOKENS, max_batch_size=32)
        return tokenizer.decode_batch([[tokenizer.token_to_id(token) or 0 for token in result.hypotheses[0]] for result in results])

    async def work() -> None:
        while True:
            batch = [await waiting.get()]
            while not waiting.empty() and len(batch) < 32:
                batch.append(waiting.get_nowait())
            for text, (_, future) in zip(await asyncio.to_thread(answer, [prompt for prompt, _ in batch]), batch, strict=True):
                future.set_result(text)

    async def completions(body: dict[str, Any]) -> dict[str, Any]:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await waiting.put((body["prompt"], future))
        return {"choices": [{"text": await future}]}

    app.add_api_route("/v1/completions", completions, methods=["POST"])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))

    async def run() -> None:
        working = asyncio.create_task(work())
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        print(f"serving ctranslate2 on http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", flush=True)
        await serving
        working.cancel()

    asyncio.run(run())


def serve_ours(checkpoint: Path, front: str, target_ms: float) -> None:
    from llmdistill.serve.app import serve
    from llmdistill.serve.settings import ServeSettings

    limits = {"max_queue_rows": 100_000, "max_open_requests": 100_000}
    serve(checkpoint, port=0, front=front, settings=ServeSettings(model_name="model", target_p95_ms=target_ms, **limits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/quickstart/latest/elastic"))
    parser.add_argument("--front", default="runs/quickstart/latest/search")
    parser.add_argument("--random", action="store_true", help="a T5-small of random weights instead")
    parser.add_argument("--target-ms", type=float, default=100.0)
    parser.add_argument("--first-rate", type=float, default=40.0, help="requests a second")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each server at each rate")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run")
    parser.add_argument("--threads", type=int, default=1, help="of the model, in each server; the load generator needs a core too")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--side", choices=[*SIDES, "convert"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments)
        return
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        if arguments.random:
            arguments.checkpoint, arguments.front = make_random(Path(temporary)), ""
            arguments.sides.remove("ctranslate2")
        options = ["--checkpoint", str(arguments.checkpoint), "--front", arguments.front, "--target-ms", str(arguments.target_ms)]
        converted = Path(temporary) / "converted"
        servers = {side: stack.enter_context(server_process(side, converted, arguments.threads, script=__file__, options=options)) for side in arguments.sides}
        runs = climb(servers, arguments)
    best = {
        side: max(
            (run["answers_per_second"] for run in runs if run["side"] == side and run["is_complete"] and run["p95_ms"] <= arguments.target_ms), default=0.0
        )
        for side in servers
    }
    for side, rate in best.items():
        ratios = ", ".join(f"{rate / other:.2f} times {name}" for name, other in best.items() if name != side and other)
        print(f"{side:>11}: {rate:6.1f} answers/s with p95 within {arguments.target_ms:g} ms: {ratios}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"target_ms": arguments.target_ms, "runs": runs, "answers_per_second_within_target": best}, indent=2) + "\n")


def climb(servers: dict[str, ServerProcess], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Faster and faster, for each server until it does not keep up."""
    requests, _ = asked(arguments, 30)
    for side, server in servers.items():
        print(f"{side:>11}: {max(asyncio.run(one_by_one(server.url, requests)) for _ in range(arguments.repeats)):.1f} answers/s one by one", flush=True)
    runs: list[dict[str, Any]] = []
    rate, left = arguments.first_rate, dict(servers)
    while left:
        requests, intents = asked(arguments, round(rate * arguments.seconds))
        measured: dict[str, list[Measured]] = {side: [] for side in left}
        begin = {side: server.cpu_seconds() for side, server in left.items()}
        for _ in range(arguments.repeats):
            for side, server in left.items():
                measured[side].append(asyncio.run(load(server.url, requests, rate, limit_seconds=4 * arguments.seconds, warm_up=WARM_UP)))
        for side, all_runs in measured.items():
            complete = [run for run in all_runs if run.is_complete]
            run = min(complete or all_runs, key=lambda run: run.percentile(95))
            cpu_ms = 1000 * (left[side].cpu_seconds() - begin[side]) / max(1, sum(bool(text) for run in all_runs for text in run.texts))
            runs.append({"side": side, "rate": rate, "is_complete": run.is_complete, **figures_of(run, intents), "cpu_ms_per_answer": cpu_ms})
            quantiles = " ".join(f"p{percent} {run.percentile(percent):7.1f} ms" for percent in (50, 95, 99))
            said = f"{run.answers_per_second:6.1f} answers/s, {cpu_ms:6.2f} CPU ms each"
            said += "" if arguments.random else f", {100 * runs[-1]['accuracy']:.1f}% right"
            print(f"{side:>11}: {rate:6.1f}/s: {quantiles}  {said}", flush=True)
            if not run.is_complete or run.percentile(95) > KEEPS_UP * arguments.target_ms:
                del left[side]
        rate *= GROWTH
    return runs


def figures_of(measured: Measured, intents: list[str]) -> dict[str, float]:
    counted = [(text, intent) for text, intent in zip(measured.texts, intents, strict=True) if text]
    return {
        **{f"p{percent}_ms": measured.percentile(percent) for percent in (50, 95, 99)},
        "answers_per_second": measured.answers_per_second,
        "accuracy": sum(text.strip() == intent for text, intent in counted) / max(1, len(counted)),
    }


def run_side(arguments: argparse.Namespace) -> None:
    """This file as a server."""
    checkpoint, converted = arguments.checkpoint, arguments.folder
    if arguments.side == "convert":
        convert(checkpoint, converted)
        return
    if arguments.side == "ctranslate2":
        import subprocess
        import sys

        subprocess.run([sys.executable, __file__, "--side", "convert", "--checkpoint", str(checkpoint), "--folder", str(converted)], check=True)
        serve_ctranslate2(checkpoint, converted, arguments.threads)
        return
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.side == "plain":
        serve_plain(checkpoint)
    elif arguments.side == "whole":
        serve_ours(checkpoint, "", float("inf"))
    else:
        serve_ours(checkpoint, arguments.front, arguments.target_ms)


if __name__ == "__main__":
    main()
