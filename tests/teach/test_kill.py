"""SIGKILL at random moments: what was reported done is kept, and nothing that was answered is asked again.

A small process without torch forks the writers, so that 200 of them start in milliseconds; each asks a teacher of its own through the real `ask` and cache, and
says in a log what it asks and what is done. Several write into one cache at once, and are killed whatever they do.
"""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from llmdistill.teach.cache import CompletionCache, Question
from llmdistill.teach.teacher import Sampling

ROOT = Path(__file__).parents[2]
NUM_KILLS = 200
NUM_WRITERS = 4
NUM_QUESTIONS = 60  # of one writer at once: those it had before the kill, and new ones

WRITERS = f"""
import os, sys
from pathlib import Path
from llmdistill.teach.ask import Budget, ask
from llmdistill.teach.cache import CompletionCache, Question
from llmdistill.teach.teacher import Completion, Request, Sampling
assert "torch" not in sys.modules and "transformers" not in sys.modules
folder = Path(sys.argv[1])

class Teacher:
    model, revision, dollars_per_million_tokens_in, dollars_per_million_tokens_out = "fake", "1", 0.0, 0.0
    def __init__(self, log): self.log = log
    def complete(self, requests, sampling, done):
        for index, request in enumerate(requests):
            os.write(self.log, f"asked {{request.prompt}}\\n".encode())
            done(index, Completion(text=request.prompt * 20, tokens_in=1, tokens_out=1, seconds=0.0, finish_reason="stop"))
            os.write(self.log, f"done {{request.prompt}}\\n".encode())

def write(writer, first):
    log = os.open(folder / f"log{{writer}}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    questions = [Question(model="fake", revision="1", prompt=f"{{writer}}-{{first + n}}", sampling=Sampling()) for n in range({NUM_QUESTIONS})]
    with CompletionCache(folder) as cache:
        found = cache.find(questions)
        missing = {{q: Request(prompt=q.prompt) for q in questions if q.fingerprint not in found}}
        ask(Teacher(log), cache, missing, Sampling(), Budget(), lambda spent: None)

print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            write(*map(int, line.split()))
        except BaseException:
            import traceback
            (folder / "failed").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    while True:  # reap those that were killed
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0: break
        except ChildProcessError: break
"""


def wait_for_lines(log: Path, num_bytes: int) -> None:
    """Until the log has grown: so the moments are spread over a writer's work however slow the machine is."""

    def size() -> int:
        return log.stat().st_size if log.exists() else 0

    target, deadline = size() + num_bytes, time.monotonic() + 2.0
    while size() < target and time.monotonic() < deadline:
        time.sleep(0.0005)


def test_two_hundred_kills_lose_nothing_and_ask_nothing_twice(tmp_path: Path) -> None:
    chance = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", WRITERS, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as forker:
        assert forker.stdin is not None
        assert forker.stdout is not None
        assert forker.stdout.readline() == "ready\n"

        def start(writer: int) -> int:
            assert forker.stdin is not None
            assert forker.stdout is not None
            log = tmp_path / f"log{writer}"
            num_done = log.read_text().count("done") if log.exists() else 0
            forker.stdin.write(f"{writer} {max(0, num_done - NUM_QUESTIONS // 2)}\n")
            return int(forker.stdout.readline())

        num_kills = 0
        while num_kills < NUM_KILLS:
            running = [start(writer) for writer in range(NUM_WRITERS)]
            wait_for_lines(tmp_path / f"log{chance.randrange(NUM_WRITERS)}", num_bytes=chance.randrange(200))
            for pid in chance.sample(running, NUM_WRITERS):
                time.sleep(chance.uniform(0.0, 0.005))
                assert not (tmp_path / "failed").exists(), (tmp_path / "failed").read_text()
                with contextlib.suppress(ProcessLookupError):  # a writer may have come to its end, on a machine where this process waits for its turn
                    os.kill(pid, signal.SIGKILL)
                    num_kills += 1
        forker.stdin.close()
        forker.wait(timeout=30)
    assert not (tmp_path / "failed").exists(), (tmp_path / "failed").read_text()

    asked: Counter[str] = Counter()
    done: set[str] = set()
    for writer in range(NUM_WRITERS):
        for line in (tmp_path / f"log{writer}").read_text().splitlines():
            what, prompt = line.split()
            if what == "done":
                done.add(prompt)
            else:
                assert prompt not in done, f"{prompt} was done and is asked again"
                asked[prompt] += 1
    assert len(done) >= NUM_KILLS, "too little was written for the test to mean anything"
    assert sum(num - 1 for num in asked.values()) <= NUM_KILLS, "a kill may cost the one question that was under way, and no more"
    with CompletionCache(tmp_path) as cache:
        held = cache.find(Question(model="fake", revision="1", prompt=prompt, sampling=Sampling()) for prompt in done)
        assert len(held) == len(done)
        assert {completion.text for completion in held.values()} == {prompt * 20 for prompt in done}
    with sqlite3.connect(tmp_path / "completions.sqlite3") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_writers_of_one_question_keep_one_answer(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from llmdistill.teach.cache import CompletionCache, Question\n"
        "from llmdistill.teach.teacher import Completion, Sampling\n"
        "with CompletionCache(Path(sys.argv[1])) as cache:\n"
        "    for n in range(100):\n"
        "        answer = Completion(text=sys.argv[2], tokens_in=1, tokens_out=1, seconds=0.0, finish_reason='stop')\n"
        "        cache.record(Question(model='fake', revision='1', prompt=str(n), sampling=Sampling()), answer)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name], cwd=ROOT) for name in "abc"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    with CompletionCache(tmp_path) as cache:
        held = cache.find(Question(model="fake", revision="1", prompt=str(n), sampling=Sampling()) for n in range(100))
    assert len(held) == 100
    assert {completion.text for completion in held.values()} <= set("abc")
