"""A crowd and a vandal at the server: `python benchmarks/serving_stress.py --checkpoint runs/quickstart/latest/label_only`.

A server with its usual limits gets 1,000 requests at once, and then 10,000 that are malformed: bytes that are no JSON, JSON that is no request, requests with a
field of the wrong type, out of range, or unknown, prompts that are too long, budgets that cannot be kept. What may come back is an answer, a 4xx that says what
was wrong, or overload's 429 and 503; any other 5xx, and a server that does not answer at the end, is a failure, and so is the exit status then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from serving import post, server_process

NUM_AT_ONCE, NUM_MALFORMED = 1000, 10_000
MAX_OPEN = 64  # malformed ones that are under way together
GOOD = {"model": "model", "prompt": "where is my parcel?", "max_tokens": 16, "temperature": 0}
FIELDS = ("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "stream", "stream_options", "llmdistill", "tools", "nonsense")
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1e308, 2**70, "", "x", "\ud800", "word " * 9000, [], [[]], [-1], [10**12], {}, {"a": {"b": []}}, [None] * 300)
BUDGETS: tuple[Any, ...] = (
    {"max_latency_ms": 1e-9},
    {"max_latency_ms": -1},
    {"subnet": "width=1"},
    {"subnet": 3},
    {"exit_risk": 2},
    {"tokens": "yes"},
    {"x": 1},
)


def malformed(draw: random.Random) -> bytes:
    """One body that should not be."""
    kind = draw.randrange(4)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    if kind == 1:
        data = json.dumps(GOOD).encode()
        return data[: draw.randrange(len(data))]
    if kind == 2:
        return json.dumps(GOOD | {"llmdistill": draw.choice(BUDGETS)}).encode()
    return json.dumps(GOOD | {draw.choice(FIELDS): draw.choice(VALUES) for _ in range(draw.randint(1, 3))}).encode()


async def at_once(url: str) -> Counter[int]:
    """The statuses of the crowd."""
    data = json.dumps(GOOD).encode()
    return Counter(status for status, _ in await asyncio.gather(*(post(url, data) for _ in range(NUM_AT_ONCE))))


async def vandalise(url: str) -> Counter[int]:
    """The statuses of what is malformed."""
    draw, places = random.Random(0), asyncio.Semaphore(MAX_OPEN)

    async def send(data: bytes) -> int:
        async with places:
            return (await post(url, data))[0]

    return Counter(await asyncio.gather(*(send(malformed(draw)) for _ in range(NUM_MALFORMED))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/quickstart/latest/label_only"))
    parser.add_argument("--side", choices=["server"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        from llmdistill.serve.app import serve
        from llmdistill.serve.settings import ServeSettings

        serve(arguments.folder, port=0, settings=ServeSettings(model_name="model"))
        return
    failed = False
    with server_process("server", arguments.checkpoint, 1, script=__file__) as server:
        for name, work in [(f"{NUM_AT_ONCE} at once", at_once), (f"{NUM_MALFORMED} malformed", vandalise)]:
            statuses = asyncio.run(work(server.url))
            failed |= any(status >= 500 and status != 503 for status in statuses)
            print(f"{name}: " + ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items())), flush=True)
        status, answer = asyncio.run(post(server.url, json.dumps(GOOD).encode()))
        failed |= status != 200
        print(f"afterwards: {status} {json.loads(answer)['choices'][0]['text']!r}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
